"""What is said of a kind of published checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A kind of published checkpoint.

    Attributes:
        name: of the project and the model, "LlamaGen VQ" for instance.
        source: where code and weights are published.
        licence: of the code; weights may have another, which `docs/checkpoints.md` says.
        matches: tells from names and shapes whether a state dict is of this kind.
        config: makes the section `model`, `{target, params}`, of a state dict that matches.
        translate: gives such a state dict with the names, shapes and tensors of that model; it leaves out
            what the model has no use for.
    """

    name: str
    source: str
    licence: str
    matches: Callable[[State], bool]
    config: Callable[[State], Config]
    translate: Callable[[State], dict[str, Tensor]]


@dataclass(frozen=True)
class Published:
    """A checkpoint of a known family: the section `model` of a config, and the tensors by our names."""

    family: Family
    model: Config
    state: dict[str, Tensor]
