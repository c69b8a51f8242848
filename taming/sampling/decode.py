"""Token by token through a transformer with cached keys and values.

B batch, T tokens, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from taming.sampling.filters import Number
from taming.sampling.logits_sampler import Callback, Chooser, Generators, check_logits, report
from taming.sampling.schedules import Setting

WORTH_A_CACHE = 64  # steps; a new cache reads all tokens so far once more


class CachedTransformer(Protocol):
    """What a stage-2 network must offer to be sampled from."""

    block_size: int

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Memory for the keys and values of `length` positions; how many are filled is its `length`.

        Set to 0, it forgets them all.
        """

    def extend(self, idx: Tensor, cache: Any) -> Tensor:
        """Append tokens (B, T) to the cache; logits (B, V) of what follows the last."""


@torch.no_grad()  # not inference mode, whose tensors autograd refuses later
def sample_tokens(
    transformer: CachedTransformer, prefix: Tensor, steps: int, *, temperature: Setting = 1.0,
    top_k: Number | None = None, top_p: Number | None = None, min_p: Number | None = None,
    greedy: bool = False, guidance: Setting = 1.0, null_prefix: Tensor | None = None,
    generator: Generators = None, callback: Callback | None = None, n_codes: int | None = None,
) -> Tensor:
    """Draw `steps` codes after a prefix, one at a time (ancestral sampling of eq. 9, Esser et al. 2021).

    Args:
        transformer: the network, in eval mode.
        prefix: codes (B, T), T >= 1: condition or start token, then image codes that are given.
        steps: how many codes to draw; T + steps - 1 must fit the transformer's block size.
        temperature: a number, one per image (B,), or a schedule of these: see `taming.sampling.schedules`.
        top_k, top_p, min_p: a number, or one per image (B,): see `filter_logits`.
        greedy: take the most likely code each time; nothing is random then.
        guidance: scale s of classifier-free guidance (Ho and Salimans 2022), as `temperature` is given: the
            logits are null + s * (given - null). Both halves run in one batch, and no second half at all
            where s is 1 at every step; a stretch of 64 steps or more at either end, too, does without.
        null_prefix: the prefix with null tokens in place of the condition, (B, T) or (1, T).
        generator: one per row, so that a row does not depend on the batch it is in, or a single one, which
            seeds the rows in order; the global random numbers when None.
        callback: called after each step with its number (from 0) and the codes so far (B, step + 1); if it
            returns False, sampling stops there.
        n_codes: draw among the first so many tokens only, where the vocabulary is larger than the codebook.

    Returns:
        The new codes (B, steps), int64, without the prefix.

    Raises:
        ValueError: an empty prefix, too long a sequence, bad sampling arguments, guidance without null
            tokens, or logits that are not numbers, which is looked for at the first step and every 64.
        Cancelled: by the callback; it holds the codes so far.
    """
    batch_size, length = prefix.shape
    _check_lengths(prefix, null_prefix, steps, transformer.block_size)
    codes = torch.empty(batch_size, steps, dtype=torch.int64, device=prefix.device)
    if steps == 0:
        return codes
    choose = Chooser(
        batch_size, steps, prefix.device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        greedy=greedy, guidance=guidance, has_null=null_prefix is not None, generator=generator,
        n_codes=n_codes,
    )
    guided_steps, halves, cache = _guided_stretch(choose.guided), 0, None
    for step in range(steps):
        if halves != 1 + (step in guided_steps):  # the first step, or one that begins or ends a stretch
            halves = 1 + (step in guided_steps)
            cache = transformer.new_cache(halves * batch_size, length + steps - 1)
            prefixes = [prefix, null_prefix][:halves]
            tokens = torch.cat([
                torch.cat((part.expand(batch_size, -1), codes[:, :step]), dim=1) for part in prefixes
            ])
        logits = transformer.extend(tokens, cache)  # (B, V), or (2B, V)
        check_logits(logits, step, last=step == steps - 1)
        codes[:, step] = choose(logits[:, None], slice(step, step + 1))[:, 0]
        tokens = codes[:, step, None].repeat(halves, 1)
        report(callback, step, codes[:, : step + 1])
    return codes


def _check_lengths(prefix: Tensor, null_prefix: Tensor | None, steps: int, block_size: int) -> None:
    batch_size, length = prefix.shape
    if length == 0:
        raise ValueError("the prefix is empty: begin with a start token (SOSProvider) or a condition")
    if length + steps - 1 > block_size:
        raise ValueError(
            f"{length} tokens given and {steps} to draw need a block size of {length + steps - 1}; "
            f"the transformer's is {block_size}: draw fewer, or use the sliding window"
        )
    if null_prefix is not None and tuple(null_prefix.shape) not in ((batch_size, length), (1, length)):
        raise ValueError(
            f"null_prefix {tuple(null_prefix.shape)} does not fit the prefix {(batch_size, length)}: give "
            "null tokens in place of the condition, and the same codes behind them"
        )


def _guided_stretch(guided: list[bool]) -> range:
    """From the first to the last guided step, or to an end that is too near for a cache of its own."""
    steps = len(guided)
    if not any(guided):
        return range(0)
    first, end = guided.index(True), steps - guided[::-1].index(True)
    return range(first if first >= WORTH_A_CACHE else 0, end if steps - end >= WORTH_A_CACHE else steps)
