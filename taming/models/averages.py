"""Exponential moving averages of a model's weights (EMA): what is validated and used, beside what is trained.

Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; in tokenizers since
Rombach et al. 2022, in GANs since Karras et al. 2018.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taming.parameters import Probability, mismatch


class WeightAverages:
    """Running averages of tensors by name, float32, on the device of the tensors.

        a <- d a + (1 - d) w,    d = decay, or min(decay, (1 + n) / (10 + n)) with warm-up, at update n

    Without the warm-up, the first 1 / (1 - decay) updates weigh the first weights too much.

    Args:
        decay: d, from 0 to below 1; 0.999 to 0.9999 is common.
        warmup: let d rise with the number of updates.

    Attributes:
        updates: number n of updates so far; the first one copies the weights.
        weights: the averages.

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, decay: float, warmup: bool = True):
        if mismatch(decay, Probability) or decay == 1:
            raise ValueError(
                f"ema_decay: {decay!r} must be a number from 0 to below 1, for instance 0.9999: the share of "
                "the averages that is kept in each step"
            )
        if not isinstance(warmup, bool):
            raise ValueError(f"ema_warmup: {warmup!r} must be True or False")
        self.decay, self.warmup = float(decay), warmup
        self.updates = 0
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the averages towards weights, all of the same names each time."""
        shared: dict[int, Tensor] = {}  # tied weights keep one average under all of their names
        if self.updates == 0:
            for name, weight in weights.items():
                self.weights[name] = shared.setdefault(id(weight), weight.detach().float().clone())
        else:
            self.match_devices(weights)
            n, decay = self.updates, self.decay
            rate = 1.0 - (min(decay, (1 + n) / (10 + n)) if self.warmup else decay)
            now = {id(self.weights[name]): (self.weights[name], weight) for name, weight in weights.items()}
            means, targets = zip(*now.values(), strict=True)
            torch._foreach_lerp_(list(means), [target.detach().float() for target in targets], rate)
        self.updates += 1

    def match_devices(self, weights: Mapping[str, Tensor]) -> None:
        """Move averages that were loaded from a file to the devices of the weights."""
        for name, weight in weights.items():
            if self.weights[name].device != weight.device:
                self.weights[name] = self.weights[name].to(weight.device)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint kept.

        Raises:
            ValueError: it is of other weights than these.
        """
        kept = state["weights"]
        wrong = [
            name for name in {**weights, **kept}
            if name not in kept or name not in weights or kept[name].shape != weights[name].shape
        ]
        if wrong:
            raise ValueError(
                f"the checkpoint's averages of weights (EMA) are of other parts or shapes: {wrong[0]}, ...; "
                "resume with the same `freeze`, or without averages: model.ema_decay=null"
            )
        self.weights, self.updates = {name: kept[name].float() for name in weights}, int(state["updates"])
