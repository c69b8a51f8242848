"""The contract of a prior: a distribution over the codes of an image, given a condition.

B batch, N codes in the order in which the prior reads them, M condition tokens, V vocabulary, h w grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.sampling import SamplingOptions, sample_tokens, sample_window, window_nll
from taming.sampling.logits_sampler import Callback, Generators
from taming.sampling.window import Condition


class Prior(nn.Module):
    """A second-stage network p(codes | condition).

    Attributes:
        vocab_size: V; codes and condition tokens share it, unless `condition_vocab_size` is set: then the
            number of codes.
        condition_vocab_size: number of condition tokens, null token included, of a prior that has embeddings
            of their own for them; None if they share the vocabulary of the codes.
        block_size: longest sequence that it reads, condition + codes - 1.
        on_grid: it reads the codes as a grid, in raster order, and needs no start token: its `layout` names
            the grids, and its `block_size` follows.
        in_steps: sampling decides on many codes in a step, not on one after another.
        levels: number of grids of codes that it models at once, those of a tokenizer's `levels`.
        embedding_from_codebook: the embeddings of the codes start from the vectors of the codes; see
            `init_from_codebook`.
    """

    vocab_size: int
    condition_vocab_size: int | None = None
    block_size: int
    on_grid: bool = False
    in_steps: bool = False
    levels: int = 1
    embedding_from_codebook: bool = False

    def init_from_codebook(self, codebook: Tensor) -> None:
        """Start the embeddings of the codes from the vectors of the codes (K, C).

        Called after building, of priors with `embedding_from_codebook`; see `project_codebook`.
        """
        raise NotImplementedError

    @property
    def likelihood(self) -> str:
        """What the sum of `log_prob` is, for reports: "exact", or which bound."""
        return "exact"

    def set_batches_seen(self, batches: int) -> None:
        """Take the number of batches that were learned from, before each loss, for schedules of training."""

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

    def code_logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return logits (B, N, V) of codes, given the condition (B, M) and the codes (B, N) before each.

        Raises:
            ValueError: the prior does not predict one code after another.
        """
        raise ValueError(f"{type(self).__name__} has no logits given the codes before: call log_prob")

    def sample(
        self, condition: Tensor, shape: tuple[int, int], options: SamplingOptions | None = None, *,
        null_condition: Tensor | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None, known: Tensor | None = None,
    ) -> Tensor:
        """Sample codes (B, N), N = h * w.

        Args:
            condition: tokens (B, M).
            shape: (h, w), that of training.
            options, generator, callback, codebook_size: see `taming.sampling.sample_tokens`.
            null_condition: null tokens in place of the condition, (B or 1, M), for guidance.
            known: the first codes (B, n), n < N, which are given and stay.
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

    def window_nll(self, condition: Condition, codes: Any, **arguments: Any) -> Any:
        """Return the nats (B, H, W) of each code of a grid of any size; see `taming.sampling.window_nll`.

        Raises:
            ValueError: a prior through which no window can slide.
        """
        raise ValueError(f"{type(self).__name__} reads the training size only: no window can slide")


@torch.no_grad()
def project_codebook(weight: Tensor, codebook: Tensor) -> None:
    """Fill embeddings (K, D) with a random projection of code vectors (K, C), at their mean and deviation.

    Vectors are centred and scaled first. A Gaussian projection keeps their angles up to a small error
    (Johnson and Lindenstrauss 1984), so that similar codes begin with similar embeddings.
    """
    vectors = codebook.to(weight) - codebook.to(weight).mean(0)
    projected = vectors @ torch.randn(vectors.shape[1], weight.shape[1], device=weight.device)
    mean, deviation = weight.mean(), weight.std()
    weight.copy_(mean + deviation * projected / projected.std().clamp_min(1e-12))


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

    @property
    def code_head(self) -> Any:
        """What makes codes of features, if `forward` and `extend` return features in place of logits.

        See `taming.modules.priors.bar.BitHead`; None where they return logits.
        """
        return None

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
        callback: Callback | None = None, codebook_size: int | None = None, known: Tensor | None = None,
    ) -> Tensor:
        """Sample codes (B, N) one by one; see `Prior.sample`."""
        known, null_prefix = condition[:, :0] if known is None else known, None
        if null_condition is not None:
            null_prefix = torch.cat((null_condition.expand(len(condition), -1), known), dim=1)
        codes = sample_tokens(
            self, torch.cat((condition, known), dim=1), shape[0] * shape[1] - known.shape[1], options,
            null_prefix=null_prefix, generator=generator, callback=callback, codebook_size=codebook_size,
        )
        return torch.cat((known, codes), dim=1)

    def sample_window(
        self, condition: Condition, options: SamplingOptions | None = None, **arguments: Any
    ) -> Tensor:
        """Sample a grid of codes (B, H, W) of any size through the window of the training size."""
        return sample_window(self, condition, options, **arguments)

    def window_nll(self, condition: Condition, codes: Tensor, **arguments: Any) -> Tensor:
        """Return the nats (B, H, W) of each code of a grid, each in its window of the training size."""
        return window_nll(self, condition, codes, **arguments)
