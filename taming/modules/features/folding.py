"""Batch normalization made a part of the convolution before it, which is faster in evaluation."""

from typing import Any, ClassVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class NormalizedConvolutions(nn.Module):
    """A module with convolutions that are each followed by batch normalization.

    Attributes:
        norms: name of a convolution -> name of its normalization.
    """

    norms: ClassVar[dict[str, str]]

    def fold_norms(self) -> None:
        """Multiply each normalization into its convolution, and leave an identity in its place.

        For evaluation only: results are equal but for rounding, and names of weights change.
        """
        for conv, norm in self.norms.items():
            if conv in self._modules:
                layers: list[Any] = [self.get_submodule(name) for name in (conv, norm)]
                setattr(self, conv, fuse_conv_bn_eval(*layers))
                setattr(self, norm, nn.Identity())


def fold_norms(network: nn.Module) -> None:
    """Fold the batch normalizations of all parts of a network in evaluation mode that can do so."""
    for part in list(network.modules()):
        if isinstance(part, NormalizedConvolutions):
            part.fold_norms()
