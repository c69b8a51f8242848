"""Autoregressive sampling with cached keys and values.

B batch, T tokens, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from taming.sampling.logits_sampler import Callback, Generators, LogitsSampler, check_logits, report
from taming.sampling.options import SamplingOptions, resolve

WORTH_A_CACHE = 64  # steps; a new cache reads all tokens so far again


class CachedTransformer(Protocol):
    """What an autoregressive network must offer to be sampled from."""

    block_size: int

    def __call__(self, idx: Tensor) -> tuple[Tensor, Any]:
        """Return logits (B, T, V) of what follows each of the tokens (B, T), and anything else."""

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Allocate memory for the keys and values of `length` positions.

        Its attribute `length` says how many are filled; 0 forgets them all.
        """

    def extend(self, idx: Tensor, cache: Any) -> Tensor:
        """Append tokens (B, T) to the cache; return logits (B, V) of what follows the last."""


@torch.no_grad()  # not inference mode, whose tensors autograd does not accept later
def sample_tokens(
    transformer: CachedTransformer, prefix: Tensor, steps: int, options: SamplingOptions | None = None, *,
    null_prefix: Tensor | None = None, generator: Generators = None, callback: Callback | None = None,
    codebook_size: int | None = None, **changes: Any,
) -> Tensor:
    """Sample `steps` codes after a prefix, one at a time (ancestral sampling of eq. 9, Esser et al. 2021).

    Args:
        transformer: the network, in eval mode.
        prefix: codes (B, T), T >= 1: condition or start token, then image codes that are given.
        steps: how many codes to sample; T + steps - 1 must fit the transformer's block size.
        options: temperature, filters, guidance, ...; `changes` are applied on top, `top_k=100` for instance.
            With guidance both halves run in one batch; stretches of 64 steps or more at either end where the
            scale is 1 run without the second half.
        null_prefix: the prefix with null tokens in place of the condition, (B, T) or (1, T).
        generator: one per row, so that a row does not depend on the batch it is in, or a single one, which
            seeds the rows in order; when None, `options.seed`, or else torch's global random numbers.
        callback: called after each step with its number (from 0) and the codes so far (B, step + 1);
            sampling stops if it returns False.
        codebook_size: sample among the first so many tokens only, where the vocabulary is larger.

    Returns:
        The new codes (B, steps), int64, without the prefix.

    Raises:
        ValueError: an empty prefix, too long a sequence, options out of range, guidance without null tokens,
            or logits that are NaN, which is checked at the first step and every 64.
        Cancelled: by the callback; it holds the codes so far.
    """
    batch_size, length = prefix.shape
    _check_lengths(prefix, null_prefix, steps, transformer.block_size)
    codes = torch.empty(batch_size, steps, dtype=torch.int64, device=prefix.device)
    if steps == 0:
        return codes
    sample = LogitsSampler(
        batch_size, steps, prefix.device, resolve(options, changes), has_null=null_prefix is not None,
        generator=generator, codebook_size=codebook_size, head=getattr(transformer, "code_head", None),
    )
    guided_steps, halves, cache = _guided_stretch(sample.guided), 0, None
    for step in range(steps):
        if halves != 1 + (step in guided_steps):  # the first step, or one that begins or ends a stretch
            halves = 1 + (step in guided_steps)
            cache = transformer.new_cache(halves * batch_size, length + steps - 1)
            prefixes = [prefix, null_prefix][:halves]
            tokens = torch.cat([
                torch.cat((part.expand(batch_size, -1), codes[:, :step]), dim=1)
                for part in prefixes if part is not None
            ])
        logits = transformer.extend(tokens, cache)  # (B, V), or (2B, V)
        check_logits(logits, step, last=step == steps - 1)
        codes[:, step] = sample(logits[:, None], slice(step, step + 1))[:, 0]
        tokens = codes[:, step, None].repeat(halves, 1)
        report(callback, step, codes[:, : step + 1])
    return codes


def _check_lengths(prefix: Tensor, null_prefix: Tensor | None, steps: int, block_size: int) -> None:
    batch_size, length = prefix.shape
    if length == 0:
        raise ValueError("the prefix is empty: begin with a start token (SOSProvider) or a condition")
    if length + steps - 1 > block_size:
        raise ValueError(
            f"{length} tokens given and {steps} to sample need a block size of {length + steps - 1}; "
            f"the transformer's is {block_size}: sample fewer, or use the sliding window"
        )
    if null_prefix is not None and tuple(null_prefix.shape) not in ((batch_size, length), (1, length)):
        raise ValueError(
            f"null_prefix {tuple(null_prefix.shape)} does not fit the prefix {(batch_size, length)}: give "
            "null tokens in place of the condition, and the same codes behind them"
        )


def _guided_stretch(guided: list[bool]) -> range:
    """Return the steps from the first to the last guided one, extended to an end too near for a new cache."""
    steps = len(guided)
    if not any(guided):
        return range(0)
    first, end = guided.index(True), steps - guided[::-1].index(True)
    return range(first if first >= WORTH_A_CACHE else 0, end if steps - end >= WORTH_A_CACHE else steps)
