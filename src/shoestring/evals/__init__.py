"""Measuring a model: pass@k and cons@k with standard errors, paired comparison."""
