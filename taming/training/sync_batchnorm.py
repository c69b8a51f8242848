"""BatchNorm over the joined batch of all processes, for the CPU: what `sync_batchnorm: true` uses there.

torch's own synchronised layer needs GPUs, and is used on them. B batch, C channels, H W pixels.
"""

from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins import LayerSync
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics, and their gradients, are sums over all processes.

    In training all processes must call it equally often, in the same order. Alone, or in evaluation, it is
    BatchNorm2d. Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1, on the joined batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W); half precision has statistics in float32."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums: Tensor = _Sum.apply(torch.cat((x.sum((0, 2, 3)), count)))  # (C + 1,)
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        x = x - mean[:, None, None]
        # of deviations: the mean of squares minus the squared mean would lose the digits that matter
        variance = _Sum.apply(x.square().sum((0, 2, 3))) / count  # (C,)
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        x = x * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics (C,) towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


class _Sum(torch.autograd.Function):
    """Sum over all processes, of the values and of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorms(LayerSync):
    """A plugin of the Trainer that synchronises every BatchNorm2d while training; keys and values stay."""

    def apply(self, model: nn.Module) -> nn.Module:
        return _exchange(model, nn.BatchNorm2d, SyncBatchNorm2d)

    def revert(self, model: nn.Module) -> nn.Module:
        return _exchange(model, SyncBatchNorm2d, nn.BatchNorm2d)


def _exchange(model: nn.Module, before: type[nn.Module], after: type[nn.Module]) -> nn.Module:
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after  # the same attributes, another forward
    return model
