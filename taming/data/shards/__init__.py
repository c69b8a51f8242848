"""Images and what belongs to them in tar files that are read in place."""

from taming.data.shards.dataset import PARTS, TarShards

__all__ = ["PARTS", "TarShards"]
