"""shoestring: train a DeepSeek-V3-style model, make it reason, distil it, and see the bill."""

__version__ = "0.1.0"
