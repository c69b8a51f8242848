"""How codes are sampled: one set of options for commands, page, models and samplers."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from taming.sampling.filters import Number
from taming.sampling.schedules import GUIDANCE_SCHEDULES, MASK_SCHEDULES, Schedule, guidance_schedule
from taming.util import number

PRECISIONS = ("32", "bf16", "16")
MASK_ORDERS = ("confidence", "halton")
OF_MASKED_PRIORS = ("steps", "mask_schedule", "mask_order", "mask_temperature")


def _option(default: Any, help: str, read: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field with what a command line needs: help, how a word becomes a value, and more (short, choices)."""
    return dataclasses.field(default=default, metadata={"help": help, "type": read, **more})


def step_interval(text: str) -> tuple[int, int | None]:
    """Read FIRST,LAST, the numbers of two steps; LAST may be left out."""
    first, _, last = text.partition(",")
    if not first.strip().isdecimal() or not (last.strip().isdecimal() or not last.strip()):
        raise argparse.ArgumentTypeError(f"{text}: give FIRST,LAST, numbers of steps from 0, or FIRST alone")
    return int(first), int(last) if last.strip() else None


@dataclass(frozen=True)
class SamplingOptions:
    """Options of `sample_tokens`, `sample_window`, `Net2NetTransformer.generate`, the commands and the page.

    A field's metadata holds what a command line shows and checks: `help`, `type`, `short`, `choices`.

    Attributes:
        temperature: logits are divided by it, above 0; a number, one per image (B,), or a schedule of these
            (see `taming.sampling.schedules`).
        top_k: sample among the k most likely codes; None keeps all. Also one per image (B,).
        top_p: sample among the most likely codes of total probability p (nucleus), in (0, 1]; also (B,).
        min_p: sample among codes with at least that share of the most likely one's probability; also (B,).
        greedy: take the most likely code each time; nothing is random then.
        guidance: scale s of classifier-free guidance (Ho and Salimans 2022), given as `temperature` is: the
            logits are null + s * (given - null). 1 costs nothing; other values need null tokens.
        guidance_schedule: how the scale rises from 1 to `guidance` over the steps: "constant", "linear",
            "cosine" or "power-cosine"; see `taming.sampling.schedules.guidance_schedule`.
        guidance_power: p of "power-cosine", above 0; the larger, the later the scale rises.
        guidance_interval: first and last step with guidance, from 0, both included; None for no end. The
            scale is 1 in all other steps (Kynkaanniemi et al. 2024). Steps are the codes of the image, in
            the order in which they are sampled.
        stride: codes that are sampled before the window moves, on images larger than in training.
        wavefront: compute all positions that do not depend on each other in one batch; for stride 1.
        seed: image number i of a seed is the same in any batch; None uses torch's global random numbers.
        precision: of the transformer's weights when a command or the page loads it.
        steps, mask_schedule, mask_order, mask_temperature: how a masked prior decides on its codes; see
            `taming.sampling.masked`. For other priors they are an error.
    """

    temperature: Schedule = _option(
        1.0, "divides the logits; below 1 gives more likely images", number(float, 0, above=True), short="-t"
    )
    top_k: Number | None = _option(
        None, "sample among the k most likely codes; default: all", number(int, 1), short="-k"
    )
    top_p: Number | None = _option(
        None, "sample among the most likely codes of total probability p, 0 to 1; default: all",
        number(float, 0, 1, above=True), short="-p",
    )
    min_p: Number | None = _option(
        None, "sample among codes with at least this share, 0 to 1, of the most likely one's probability; "
        "default: all", number(float, 0, 1),
    )
    greedy: bool = _option(False, "take the most likely code each time; nothing is random then")
    guidance: Schedule = _option(
        1.0, "scale of classifier-free guidance: above 1, images follow their condition more; needs a model "
        "trained with a null_token", number(float, 0),
    )
    guidance_schedule: str = _option(
        "constant", "how guidance rises from 1 to its scale over the steps", choices=GUIDANCE_SCHEDULES
    )
    guidance_power: float = _option(
        4.0, "of the power-cosine schedule: the larger, the later it rises", number(float, 0, above=True)
    )
    guidance_interval: tuple[int, int | None] | None = _option(
        None, "FIRST,LAST: guide these steps alone, from 0, both included; default: all", step_interval
    )
    stride: int = _option(
        1, "codes sampled before the window moves, on images larger than in training; more is faster",
        number(int, 1),
    )
    wavefront: bool = _option(
        False, "compute all codes that do not depend on each other at once; the same images, for stride 1"
    )
    seed: int | None = _option(None, "another seed gives other images", number(int, 0))
    precision: str = _option(
        "32", "bits of the transformer's weights; bf16 takes half the memory and time; 16 is for older GPUs",
        choices=PRECISIONS,
    )
    steps: int = _option(12, "masked priors: number of steps that decide on all codes", number(int, 1))
    mask_schedule: str = _option(
        "cosine", "masked priors: share of the codes that is still open after each step",
        choices=tuple(MASK_SCHEDULES),
    )
    mask_order: str = _option(
        "confidence", "masked priors: which codes are decided first: the most certain, or those that spread "
        "most evenly over the image", choices=MASK_ORDERS,
    )
    mask_temperature: float = _option(
        4.5, "masked priors: noise in the order of the most certain codes, falling to 0 at the last step",
        number(float, 0),
    )

    def replace(self, **changes: Any) -> Self:
        """Copy with other values.

        Raises:
            TypeError: an option that does not exist.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise TypeError(
                    f"there is no sampling option {name!r}"
                    + (f" (did you mean {near[0]}?)" if near else f"; there are: {', '.join(names)}")
                )
        return dataclasses.replace(self, **changes)

    def guidance_at(self, steps: int) -> Schedule:
        """Return the guidance scale of each of so many steps.

        Raises:
            ValueError: see `taming.sampling.schedules.guidance_schedule`.
        """
        return guidance_schedule(
            self.guidance, self.guidance_schedule, steps, self.guidance_power, self.guidance_interval
        )

    def check(
        self, *, codebook_size: int | None = None, window_width: int | None = None, has_null: bool = True,
        in_steps: bool = True,
    ) -> None:
        """Raise ValueError for a number that is out of range, so that nothing is loaded or computed in vain.

        Tensors and schedules are checked by the samplers, where the batch size is known.

        Args:
            codebook_size: number of codes of the first stage.
            window_width: width of the training grid, in codes.
            has_null: whether the model has a null token.
            in_steps: whether its prior decides on many codes in a step.
        """
        ranges = {
            "temperature": (0.0, None, "a number above 0; 1 changes nothing", True),
            "top_k": (1, codebook_size, f"1 to {codebook_size}, or leave it out for all codes", False),
            "top_p": (0.0, 1.0, "above 0, up to 1, or leave it out for all codes", True),
            "min_p": (0.0, 1.0, "0 to 1", False),
            "guidance": (0.0, None, "0 or more; 1 is none", False),
            "stride": (1, window_width, f"1 to {window_width}, the width of the window in codes", False),
            "seed": (0, None, "a whole number, 0 or more", False),
            "steps": (1, None, "1 or more", False),
            "mask_temperature": (0.0, None, "0 or more; 0 adds no noise", False),
        }
        for name, (low, high, remedy, above) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float):
                continue
            if not low <= value or (above and value == low) or (high is not None and value > high):
                raise ValueError(f"{name} is {value:g}: give {remedy}")
        self.guidance_at(1 + max((n for n in self.guidance_interval or () if n is not None), default=0))
        if not has_null and (callable(self.guidance) or self.guidance != 1.0):
            raise ValueError(
                f"guidance is {self.guidance}, but the model has no null token to be guided away from: train "
                "it with cond_dropout and null_token, or leave guidance at 1"
            )
        if self.wavefront and self.stride != 1:
            raise ValueError(f"stride is {self.stride}: a wavefront is for stride 1; leave out one of them")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if not in_steps and field.name in OF_MASKED_PRIORS and value != field.default:
                raise ValueError(
                    f"{field.name} is {value}, but it is for masked priors, and this one samples code by "
                    "code: leave it out"
                )
            if choices and value not in choices:
                raise ValueError(f"{field.name} is {value!r}: give one of {', '.join(choices)}")


def resolve(options: SamplingOptions | None, changes: dict[str, Any]) -> SamplingOptions:
    """Apply keyword arguments on top of options, or of the defaults."""
    return (options or SamplingOptions()).replace(**changes)
