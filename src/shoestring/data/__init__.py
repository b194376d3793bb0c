"""Corpora, packing and the traces store."""
