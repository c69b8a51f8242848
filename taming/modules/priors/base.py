"""The contract of a prior: a distribution over the codes of an image, given a condition.

B batch, N codes in the order in which the prior reads them, M condition tokens, V vocabulary, h w grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.sampling import SamplingOptions, sample_tokens, sample_window
from taming.sampling.logits_sampler import Callback, Generators
from taming.sampling.window import Condition


class Prior(nn.Module):
    """A second-stage network p(codes | condition).

    Attributes:
        vocab_size: V; codes and condition tokens share it.
        block_size: longest sequence that it reads, condition + codes - 1.
        on_grid: it reads the codes as a grid, in raster order, and needs no start token: its `layout` names
            the grids, and its `block_size` follows.
        levels: number of grids of codes that it models at once, those of a tokenizer's `levels`.
    """

    vocab_size: int
    block_size: int
    on_grid: bool = False
    levels: int = 1

    def log_prob(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return log p of each code (B, N), in nats, 0 or less.

        Args:
            codes: (B, N) int64.
            condition: tokens (B, M) int64.
            inputs: codes (B, N) to read in place of `codes`, some of them replaced in training.
        """
        raise NotImplementedError

    def loss(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what training minimizes, (): the mean of -log p over all codes, in nats per code."""
        return -self.log_prob(codes, condition, inputs).mean()

    def sample(
        self, condition: Tensor, shape: tuple[int, int], options: SamplingOptions | None = None, *,
        null_condition: Tensor | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None,
    ) -> Tensor:
        """Sample codes (B, N), N = h * w.

        Args:
            condition: tokens (B, M).
            shape: (h, w), that of training.
            options, generator, callback, codebook_size: see `taming.sampling.sample_tokens`.
            null_condition: null tokens in place of the condition, (B or 1, M), for guidance.
        """
        raise NotImplementedError

    def sample_window(
        self, condition: Condition, options: SamplingOptions | None = None, **arguments: Any
    ) -> Tensor:
        """Sample a grid of codes (B, H, W) of any size; see `taming.sampling.sample_window`.

        Raises:
            ValueError: a prior through which no window can slide.
        """
        raise ValueError(
            f"{type(self).__name__} generates the training size only: no window can slide over a larger grid"
        )


class AutoregressivePrior(Prior):
    """A prior that predicts one code after the other: `forward`, `new_cache` and `extend` are its own.

    It can be sampled from code by code, and by a sliding window (`taming.sampling.CachedTransformer`).
    """

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Allocate memory for the keys and values of `length` positions."""
        raise NotImplementedError

    def extend(self, idx: Tensor, cache: Any) -> Tensor:
        """Append tokens (B, T) to the cache; return logits (B, V) of what follows the last."""
        raise NotImplementedError

    def code_logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return logits (B, N, V) of codes, given the condition (B, M) and the codes (B, N) before each."""
        tokens = torch.cat((condition, codes), dim=1)  # (B, M + N)
        logits, _ = self(tokens[:, :-1])  # (B, M + N - 1, V)
        return logits[:, condition.shape[1] - 1:]  # the last condition token predicts the first code

    def log_prob(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return log p of each code (B, N), in nats: eq. 9 and 10 of Esser et al. 2021."""
        logits = self.code_logits(codes if inputs is None else inputs, condition)
        return -F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none")

    def loss(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy, (), in nats per code."""
        logits = self.code_logits(codes if inputs is None else inputs, condition)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    def sample(
        self, condition: Tensor, shape: tuple[int, int], options: SamplingOptions | None = None, *,
        null_condition: Tensor | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None,
    ) -> Tensor:
        """Sample codes (B, N) one by one; see `Prior.sample`."""
        return sample_tokens(
            self, condition, shape[0] * shape[1], options, null_prefix=null_condition, generator=generator,
            callback=callback, codebook_size=codebook_size,
        )

    def sample_window(
        self, condition: Condition, options: SamplingOptions | None = None, **arguments: Any
    ) -> Tensor:
        """Sample a grid of codes (B, H, W) of any size through the window of the training size."""
        return sample_window(self, condition, options, **arguments)
