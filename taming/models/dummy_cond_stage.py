"""A condition stage for conditions that come as tokens already."""

from collections.abc import Callable, Sequence

from torch import Tensor

from taming.modules.conditioners.base import AbstractEncoder, Encoded, Size
from taming.parameters import PositiveInt


class DummyCondStage(AbstractEncoder):
    """Passes tokens (B, M), int64, through: layouts of objects, for instance, which the data set encodes.

    Args:
        conditional_key: entry of the batch that holds the tokens, "objects_bbox" for instance.
        length: number of tokens M, if it is known before the data are.
    """

    def __init__(self, conditional_key: str, length: PositiveInt | None = None):
        super().__init__()
        self.conditional_key, self.length = conditional_key, length

    def token_shape(self, height: int, width: int) -> tuple[int, ...] | None:
        """Shape of the tokens of one image, (M,), or None if the data decide."""
        return None if self.length is None else (self.length,)

    def encode(self, c: Tensor) -> Encoded:
        """Turn tokens (B, M) into (tokens, None, (None, None, tokens)), as a stage with a codebook would."""
        return c, None, (None, None, c)

    def decode(self, c: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return c

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return tokens

    def to_rgb(  # type: ignore[override]  # the name of 2021
        self, c: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> Tensor:
        """Plot tokens where the data set can; return them as they are otherwise."""
        return c if plot is None or size is None else plot(c, size)
