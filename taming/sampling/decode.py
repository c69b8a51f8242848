"""Token by token through a transformer with cached keys and values.

B batch, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from taming.sampling.filters import draw, filter_logits

Generators = torch.Generator | Sequence[torch.Generator] | None
CHECK_EVERY = 64  # steps; looking at logits makes an accelerator wait


class CachedTransformer(Protocol):
    """What a stage-2 network must offer to be sampled from."""

    block_size: int

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Memory for the keys and values of `length` positions; how many are filled is its `length`.

        Set to 0, it forgets them all.
        """

    def extend(self, idx: Tensor, cache: Any) -> Tensor:
        """Append tokens (B, T) to the cache; logits (B, V) of what follows the last."""


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator per image, from (seed, number of the image) alone: image 7 is the same in any batch.

    No two of the first 2**32 images of a seed share a stream.
    """
    keys = hashlib.sha256(str(int(seed)).encode()).digest()
    return [torch.Generator().manual_seed(_shuffled(int(index), keys)) for index in indices]


def _shuffled(index: int, keys: bytes) -> int:
    """A permutation of the 32-bit numbers, chosen by the keys; torch's CPU generator heeds 32 bits only."""
    for i in range(0, 32, 8):
        index ^= int.from_bytes(keys[i : i + 4], "little")
        index = index * (int.from_bytes(keys[i + 4 : i + 8], "little") | 1) & 0xFFFFFFFF  # odd: invertible
        index ^= index >> 16
    return index & 0xFFFFFFFF


def uniform_numbers(batch_size: int, steps: int, generator: Generators) -> Tensor:
    """Numbers in [0, 1), (B, steps), on the CPU: row i from generator i, or from a seed of the only one.

    They are drawn where each generator lives, so that they do not depend on the transformer's device.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds = [int(torch.randint(2**62, (), generator=generator, device=device)) for _ in range(batch_size)]
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for a batch of {batch_size}: give one per row, or one")
    rows = [torch.rand(steps, dtype=torch.float64, generator=g, device=g.device) for g in generator]
    return torch.stack([row.cpu() for row in rows])


def check_logits(logits: Tensor, step: int, last: bool) -> None:
    """Raise ValueError if logits are NaN; looks at them every `CHECK_EVERY` steps and at the last."""
    if (step % CHECK_EVERY == 0 or last) and logits.isnan().any():
        raise ValueError(f"the logits of step {step} are NaN: the weights or the precision are broken")


@torch.no_grad()  # not inference mode, whose tensors autograd refuses later
def sample_tokens(
    transformer: CachedTransformer, prefix: Tensor, steps: int, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, greedy: bool = False,
    generator: Generators = None, callback: Callable[[int, Tensor], None] | None = None,
    n_codes: int | None = None,
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
        n_codes: draw among the first so many tokens only, where the vocabulary is larger than the codebook.

    Returns:
        The new codes (B, steps), int64, without the prefix.

    Raises:
        ValueError: an empty prefix, too long a sequence, bad sampling arguments, or logits that are not
            numbers, which is looked for at the first step and every 64.
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
        logits = transformer.extend(tokens, cache)[:, :n_codes]  # (B, V)
        check_logits(logits, step, last=step == steps - 1)
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
