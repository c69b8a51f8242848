"""What is said of a kind of published checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from taming.checkpoint.state_dict import AVERAGES
from taming.config import one_line

State = Mapping[str, Tensor]
Config = dict[str, Any]

NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}  # of a model that is only used


@dataclass(frozen=True)
class Family:
    """A kind of published checkpoint.

    Attributes:
        name: of the project and the model, "LlamaGen VQ" for instance.
        source: where code and weights are published.
        licence: of the code; weights may have another, which `docs/checkpoints.md` says.
        matches: tells from names and shapes whether a state dict is of this kind.
        config: makes the section `model`, `{target, params}`, of a state dict that matches. It raises
            ValueError, with the reason and the remedy, where no model of this package can be of its kind or
            sizes.
        translate: gives such a state dict with the names, shapes and tensors of that model; it leaves out
            what the model has no use for.
        part: beginning of its names in the file of a larger model, one of `PARTS` in `registry.py`, if it is
            only found there.
    """

    name: str
    source: str
    licence: str
    matches: Callable[[State], bool]
    config: Callable[[State], Config]
    translate: Callable[[State], dict[str, Tensor]]
    part: str | None = None


@dataclass(frozen=True)
class Published:
    """A checkpoint of a known family.

    Attributes:
        family: its kind.
        part: beginning of the names of the model's tensors, where the file holds others as well: the
            tokenizer of a diffusion model, "first_stage_model.". Empty otherwise.
        inside: its tensors by the names of its project, without `part`; they may be on the meta device.
    """

    family: Family
    part: str
    inside: State

    @cached_property
    def model(self) -> Config:
        """The section `model` of a config, `{target, params}`.

        Raises:
            ValueError: no model of this package can be of its kind or sizes; says why, and what to do.
        """
        return self._guarded(self.family.config)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The tensors by our names, without those that the model has no use for.

        Raises:
            ValueError: their shapes do not fit together.
        """
        return self._guarded(self.family.translate)

    def _guarded(self, function: Callable[[State], Any]) -> Any:
        try:
            return function(self.inside)
        except ValueError:
            raise
        except Exception as error:  # of names and shapes that only look like the family's
            raise ValueError(
                f"its names are those of {self.family.name}, but its tensors do not fit together "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error


def plain_weights(state: State) -> dict[str, Tensor]:
    """Return a state dict with running averages in place of weights, and without the loss.

    The averages are those of `model_ema.`, whose names are those of the weights without dots.
    """
    weights = {key: value for key, value in state.items() if not key.startswith(("loss.", AVERAGES))}
    for key in weights:
        average = state.get(AVERAGES + key.replace(".", ""))
        if average is not None and average.shape == weights[key].shape:
            weights[key] = average
    return weights
