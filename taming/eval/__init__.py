"""Evaluation: how good images are, with the protocol in the result."""
