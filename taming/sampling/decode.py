"""Token by token through a transformer with cached keys and values.

B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from taming.sampling.filters import draw, filter_logits

Generators = torch.Generator | Sequence[torch.Generator] | None


class CachedTransformer(Protocol):
    """What a stage-2 network must offer to be sampled from."""

    block_size: int

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Memory for the keys and values of `length` positions."""

    def extend(self, idx: Tensor, cache: Any) -> Tensor:
        """Append tokens (B, T) to the cache; logits (B, V) of what follows the last."""


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator per image, from (seed, number of the image) alone: image 7 is the same in any batch."""
    # a generator's own seeding mixes well, so that neighbouring numbers give unrelated streams
    return [torch.Generator().manual_seed(((seed & 0xFFFFFFFF) << 31) + index) for index in indices]


def uniform_numbers(batch_size: int, steps: int, generator: Generators) -> Tensor:
    """Numbers in [0, 1), (B, steps): row i from generator i, or from the i-th seed drawn of a single
    generator."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds = [int(torch.randint(2**62, (), generator=generator, device=device)) for _ in range(batch_size)]
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for a batch of {batch_size}: give one per image, or a single one")
    return torch.stack([torch.rand(steps, dtype=torch.float64, generator=g, device=g.device).cpu() for g in generator])


@torch.inference_mode()
def sample_tokens(
    transformer: CachedTransformer, prefix: Tensor, steps: int, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, greedy: bool = False, generator: Generators = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw `steps` codes after a prefix, one at a time (ancestral sampling of eq. 9, Esser et al. 2021).

    Args:
        transformer: the network, in eval mode.
        prefix: codes (B, T), T >= 1: condition or start token, then image codes that are given.
        steps: how many codes to draw; T + steps - 1 must fit the transformer's block size.
        temperature, top_k, top_p: see `filter_logits`.
        greedy: take the most likely code each time; nothing is random then.
        generator: one per row, so that a row does not depend on the batch it is in, or a single one, which
            seeds the rows in order; the global random numbers when None.
        callback: called after each step with its number (from 0) and the codes so far (B, step + 1).

    Returns:
        The new codes (B, steps), int64, without the prefix.

    Raises:
        ValueError: an empty prefix, too long a sequence, bad sampling arguments, logits that are not numbers.
    """
    batch_size, length = prefix.shape
    if length == 0:
        raise ValueError("the prefix is empty: begin with a start token (SOSProvider) or a condition")
    if length + steps - 1 > transformer.block_size:
        raise ValueError(
            f"{length} tokens given and {steps} to draw need a block size of {length + steps - 1}; "
            f"the transformer's is {transformer.block_size}: draw fewer, or use the sliding window"
        )
    numbers = None if greedy else uniform_numbers(batch_size, steps, generator).to(prefix.device)
    codes = torch.empty(batch_size, steps, dtype=torch.int64, device=prefix.device)
    if steps == 0:
        return codes
    cache = transformer.new_cache(batch_size, length + steps - 1)
    tokens = prefix
    for step in range(steps):
        logits = transformer.extend(tokens, cache)  # (B, V)
        if logits.isnan().any():
            raise ValueError(f"the logits of step {step} are not numbers (NaN): the weights or the precision are broken")
        if greedy:
            drawn = logits.argmax(-1)
        else:
            filtered = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            drawn = draw(filtered, numbers[:, step])
        codes[:, step] = drawn
        tokens = drawn[:, None]
        if callback is not None:
            callback(step, codes[:, : step + 1])
    return codes
