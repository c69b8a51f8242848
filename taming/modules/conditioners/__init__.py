"""Condition stages: from a condition to the tokens that a transformer reads."""
