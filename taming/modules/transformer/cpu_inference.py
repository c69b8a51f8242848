"""Faster inference of the priors on a CPU: linear layers with reordered weights.

They give the results of torch's own, up to rounding. R rows, I and O channels in and out of a linear layer.
"""

import torch
from torch import Tensor, nn

PACK_FROM = 64  # positions; reordering the weights takes as long as some 40 steps save
DTYPES = torch.float32, torch.bfloat16


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether reordered weights can be used: on a CPU, without gradients, in float32 or bfloat16."""
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return available and device.type == "cpu" and dtype in DTYPES and not torch.is_grad_enabled()


def pack_linears(module: nn.Module, rows: int, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module with every plain linear layer packed; it shares all else with the original.

    On a CPU, `F.linear` with few rows reads its weights at a fraction of the memory's bandwidth. oneDNN comes
    close to it once they are in its order. The reordered copy takes as much memory as the weights, so it is
    made for one call of a sampler and given back after it; it holds the weights of this moment. Subclasses of
    nn.Linear, and layers with hooks or parametrizations, stay as they are.

    Args:
        module: what to pack; it is not changed.
        rows: R of the calls that matter, batch x tokens of one step; others work as well.
        dtype: in which to compute: the weights' own, or that of autocast.
    """
    if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
        return PackedLinear(module, rows, dtype)
    children = {name: child and pack_linears(child, rows, dtype) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = object.__new__(type(module))  # copy.copy would call the constructor of a sharded module
    twin.__dict__.update(module.__dict__)
    twin._modules = children
    return twin


class PackedLinear(nn.Module):
    """A linear layer, x (..., I) to (..., O), over a reordered copy of another's weights, for inference."""

    def __init__(self, linear: nn.Linear, rows: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")
