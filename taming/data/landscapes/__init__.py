"""Painted landscapes with everything that a model can be conditioned on: data without a download."""

from taming.data.landscapes.datasets import KEYS, POSE_KEYS, Landscapes

__all__ = ["KEYS", "POSE_KEYS", "Landscapes"]
