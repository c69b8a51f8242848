"""Frozen networks that losses and discriminators look through: loaded at first use, in no state dict."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """A network that is used but not trained, and not part of its owner's state.

    It is read by the first forward, and held outside of PyTorch's registry, so that no optimizer, no state
    dict and no distributed wrapper sees it, and no cast reaches it: it always computes in float32, in
    evaluation mode, on the device of its owner or of its last input. Gradients pass through to the images.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: list[Any] = []  # a list, since an attribute would be registered
        self._device = torch.device("cpu")
        self.eval()

    def load(self) -> nn.Module:
        """Return the network with its weights, on the CPU."""
        raise NotImplementedError

    def ensure_weights(self, download: bool = True) -> None:
        """Make sure that the files of the weights are on disk, or can be downloaded; nothing is read.

        Raises:
            FileNotFoundError: a file is missing, and cannot be downloaded.
        """
        raise NotImplementedError

    def use_random_weights(self) -> None:
        """Read no file: have random weights, with which the network takes as long as with its own."""
        self.random_weights = True

    def network(self) -> Any:
        """Return the network on the device of this module or of the last input, loaded if it was not yet."""
        # Validation may come first, in inference mode; tensors made there could not be used in training.
        with torch.inference_mode(False):
            if not self._loaded:
                self._loaded.append(self.load().float().eval().requires_grad_(False))
            return self._loaded[0].to(self._device)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves to another device; casts do not reach the network."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._device)).device
        if device.type != "meta":
            self._device = device
        return self
