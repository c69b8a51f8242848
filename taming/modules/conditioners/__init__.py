"""Condition stages: from a condition to the tokens that a prior reads before the codes of an image."""

from taming.modules.conditioners.base import AbstractEncoder, Conditioner
from taming.modules.conditioners.image import ImageConditioner
from taming.modules.conditioners.label_grid import LabelGrid
from taming.modules.conditioners.label_map import LabelMapConditioner

__all__ = ["AbstractEncoder", "Conditioner", "ImageConditioner", "LabelGrid", "LabelMapConditioner"]
