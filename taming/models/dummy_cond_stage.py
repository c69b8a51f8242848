"""Stands in for a condition stage where the condition comes as tokens already."""

from torch import Tensor, nn


class DummyCondStage(nn.Module):
    """Passes tokens (B, M), int64, through: layouts of objects, for instance, which the data set encodes.

    Args:
        conditional_key: entry of the batch that holds the tokens, "objects_bbox" for instance.
    """

    def __init__(self, conditional_key: str):
        super().__init__()
        self.conditional_key = conditional_key

    @staticmethod
    def encode(c: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Tokens (B, M) to (tokens, None, (None, None, tokens)), as a stage with a codebook gives them."""
        return c, None, (None, None, c)

    @staticmethod
    def decode(c: Tensor) -> Tensor:
        return c

    @staticmethod
    def to_rgb(c: Tensor) -> Tensor:
        return c
