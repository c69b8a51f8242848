"""BatchNorm over the joined batch of all processes, on any device: what `sync_batchnorm: true` uses.

B batch, C channels, W processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's synchronised BatchNorm, which on the CPU (over gloo) sums the statistics with all_reduce.

    torch's own layer needs a GPU. Input (B, C, ...), statistics in float32. In training all processes must
    call it equally often, in the same order.
    """

    def forward(self, input: Tensor) -> Tensor:
        together = self.training and dist.is_initialized() and dist.get_world_size() > 1
        if input.device.type != "cpu" or not together:
            return super().forward(input)
        self._check_input_dim(input)
        shape = (1, -1, *[1] * (input.ndim - 2))
        others = [0, *range(2, input.ndim)]  # all dimensions but the channels
        x = input.float()
        count = _Sum.apply(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _Sum.apply(x.sum(others)) / count  # (C,)
        centered = x - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(others)) / count
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)
                unbiased = variance * count / (count - 1)
                self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        out = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


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


class SyncBatchNorms(TorchSyncBatchNorm):
    """Lightning's conversion for `sync_batchnorm: true`, with a layer for the CPU too; keys stay."""

    def apply(self, model: nn.Module) -> nn.Module:
        model = super().apply(model)
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = SyncBatchNorm  # the same attributes, another forward
        return model
