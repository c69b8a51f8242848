"""One step of a sampler: from the logits of some positions to the codes sampled there.

B batch, S steps, Q positions sampled at once, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.sampling.filters import filter_logits, sample_from
from taming.sampling.options import SamplingOptions
from taming.sampling.schedules import per_step

Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, Tensor], object]
CHECK_EVERY = 64  # steps; looking at logits makes an accelerator wait


class Cancelled(Exception):
    """A callback returned False, and the sampler stopped.

    `codes` is what the callback saw last: the codes so far of `sample_tokens`, the grid of `sample_window`
    (0 where nothing is sampled yet). `step` is the number of the last step.
    """

    def __init__(self, step: int, codes: Tensor):
        super().__init__(f"sampling was cancelled after step {step}")
        self.step, self.codes = step, codes


def report(callback: Callback | None, step: int, codes: Tensor) -> None:
    """Call the callback, if there is one; raise Cancelled if it returns False, and nothing but False."""
    if callback is not None and callback(step, codes) is False:
        raise Cancelled(step, codes)


class LogitsSampler:
    """Samples the codes of each step from its logits (B, Q, V), after mixing the guided ones.

    Args:
        batch_size, steps: B, S.
        device: where the logits will be.
        options: see `SamplingOptions`.
        has_null: whether null tokens are given; guidance other than 1 needs them.
        generator, codebook_size: see `sample_tokens`.
        codes_per_step: number of codes that one step samples, each with a random number of its own.
        head: makes codes of features, which then take the place of logits; see
            `taming.modules.priors.bar.BitHead`.

    Raises:
        ValueError: a temperature that is not above 0, guidance without null tokens.
    """

    def __init__(
        self, batch_size: int, steps: int, device: torch.device, options: SamplingOptions, *, has_null: bool,
        generator: Generators, codebook_size: int | None, codes_per_step: int = 1,
        head: Any = None,
    ):
        if head is not None:  # filters are for each group of bits: more values than it has are all of them
            options = options.replace(top_k=at_most(options.top_k, head.group_size))
            codes_per_step, codebook_size = head.groups, None
        self.head = head
        self.filters = {"top_k": options.top_k, "top_p": options.top_p, "min_p": options.min_p}
        self.greedy, self.codebook_size = options.greedy, codebook_size
        temperature = options.temperature
        self.temperature: float | Tensor = 1.0  # or (S, B)
        if callable(temperature) or isinstance(temperature, Tensor):
            self.temperature = per_step("temperature", temperature, steps, batch_size)
            if not (self.temperature > 0).all():  # found now, not when a schedule comes there
                raise ValueError(f"temperature must be above 0, not {self.temperature.min().item():g}")
        else:
            self.temperature = temperature
        self.scales = per_step("guidance", options.guidance_at(steps), steps, batch_size)  # (S, B)
        self.guided = (self.scales != 1).any(1).tolist()  # by step
        if any(self.guided) and not has_null:
            raise ValueError(
                f"guidance of {self.scales[self.scales != 1][0].item():g} needs null tokens in place of the "
                "condition: give null_prefix= (null_condition= of a window), of a model that was trained "
                "with them (cond_dropout)"
            )
        self.numbers: Tensor | None = None
        if not self.greedy:
            if generator is None and options.seed is not None:
                generator = image_generators(options.seed, range(batch_size))
            numbers = uniform_numbers(batch_size, steps * codes_per_step, generator)
            self.numbers = numbers.view(batch_size, steps, codes_per_step).to(device)  # (B, S, 1 or more)

    def __call__(self, logits: Tensor, steps: slice | list[int]) -> Tensor:
        """Sample codes (B, Q) of Q steps from logits (B, Q, V), null ones last if (2B, Q, V).

        If a step samples several codes, it is one step of Q codes.
        """
        if self.head is None:
            return self.choose(self.guide(logits, steps), steps)
        halves = len(logits) // len(self.scales[0])
        parts = logits.new_zeros(
            len(self.scales[0]), logits.shape[1], self.head.groups, dtype=torch.int64
        )  # (B, Q, G)
        masked = torch.ones_like(parts, dtype=torch.bool)
        for group in range(self.head.groups):  # in the order of the exact chain
            read, hidden = (each.repeat(halves, 1, 1) for each in (parts, masked))
            guided = self.guide(self.head(logits, read, hidden)[:, :, group], steps)
            parts[..., group] = self.choose(guided, steps, group)
            masked[..., group] = False
        return self.head.join(parts)

    def guide(self, logits: Tensor, steps: slice | list[int]) -> Tensor:
        """Return logits (B, Q, V) of the codes that are allowed; those of both halves (2B, Q, V) mixed."""
        logits = logits[..., : self.codebook_size]
        if len(logits) > len(self.scales[0]):
            given, null = logits.float().chunk(2)
            # Ho and Salimans 2022; lerp gives the very logits of the condition where the scale is 1
            logits = torch.lerp(null, given, self.scales[steps].T[..., None].to(logits.device))
        return logits

    def choose(self, logits: Tensor, steps: slice | list[int], part: int | None = None) -> Tensor:
        """Sample codes (B, Q), or a part of each, from logits (B, Q, V) that `guide` returned."""
        if self.numbers is None:  # greedy
            return logits.argmax(-1)
        temperature = self.temperature
        if torch.is_tensor(temperature):
            temperature = temperature[steps].T.expand(logits.shape[:2])  # (B, Q)
        logits = filter_logits(logits, temperature=temperature, **self.filters)
        numbers = self.numbers[:, steps] if part is None else self.numbers[:, steps, part]
        return sample_from(logits.flatten(0, 1), numbers.flatten()).view(logits.shape[:2])


def at_most(value: Any, most: int) -> Any:
    """Limit a number, or a tensor of numbers; None stays."""
    if value is None:
        return None
    return value.clamp(max=most) if isinstance(value, Tensor) else min(value, most)


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """Make one generator per image from (seed, number of the image): image 7 is the same in any batch.

    No two of the first 2**32 images of a seed share a stream of random numbers.
    """
    keys = hashlib.sha256(str(int(seed)).encode()).digest()
    return [torch.Generator().manual_seed(_shuffled(int(index), keys)) for index in indices]


def _shuffled(index: int, keys: bytes) -> int:
    """Permute the 32-bit numbers by the keys; torch's CPU generator uses 32 bits of a seed."""
    for i in range(0, 32, 8):
        index ^= int.from_bytes(keys[i : i + 4], "little")
        index = index * (int.from_bytes(keys[i + 4 : i + 8], "little") | 1) & 0xFFFFFFFF  # odd: invertible
        index ^= index >> 16
    return index & 0xFFFFFFFF


def uniform_numbers(batch_size: int, steps: int, generator: Generators) -> Tensor:
    """Return numbers in [0, 1), (B, steps), on the CPU: row i from generator i, or from one generator.

    They are made on each generator's device, so that they do not depend on the transformer's.
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
