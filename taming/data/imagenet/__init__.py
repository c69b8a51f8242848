"""ImageNet, whole or restricted, with depth, edges or low resolutions."""

from taming.data.imagenet.datasets import *  # noqa: F403
