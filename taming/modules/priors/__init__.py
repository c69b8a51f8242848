"""Priors: distributions over the codes of an image, given a condition."""

from taming.modules.priors.base import AutoregressivePrior, Prior

__all__ = ["AutoregressivePrior", "Prior"]
