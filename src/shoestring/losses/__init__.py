"""Objectives, one a file. Each is `loss(hidden_ND, weight_VD, tokens, **options) -> (sum over tokens, metrics)`.

The sum is divided once, in `train/step.py`, by the token weight of the whole optimiser batch, so that any split
into micro-batches gives the same gradient.
"""
