"""Layers, one idea a file: norm, RoPE/YaRN, MLA, GQA, MoE, MTP, FP8, each with its plain twin."""
