"""Tokenizer, chat templates, rendering with loss masks."""
