"""Published checkpoints of other projects, known by the names and shapes of their tensors.

One file per project. Each says what its checkpoints look like, which model of this package they are, with
which arguments, and what its tensors are called here.
"""

from taming.checkpoint.families.base import Family, Published
from taming.checkpoint.families.registry import FAMILIES, identify

__all__ = ["FAMILIES", "Family", "Published", "identify"]
