"""Transformers that turn images into a sequence of tokens, and back."""
