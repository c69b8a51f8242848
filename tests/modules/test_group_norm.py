"""Group normalization in bfloat16 on a CPU: close to the exact one, and torch's own where that is as fast."""

import pytest
import torch
from torch import nn

from taming.modules.group_norm import ChannelsLastGroupNorm, GroupNorm

SHAPE = 2, 24, 40, 32  # of x; with a mean that is far from zero


def gradients(norm, x, probe):
    """Return y and the gradients of x, weight and bias, in float64."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    found = torch.autograd.grad(y, (x, *norm.parameters()), probe.to(y.dtype))
    return [each.double() for each in (y.detach(), *found)]


@pytest.mark.parametrize("groups", [1, 4, 24])
def test_gradients_in_bfloat16_are_the_exact_ones_up_to_rounding(groups):
    norm = GroupNorm(groups, SHAPE[1], eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3)
        norm.bias.normal_()
    x, probe = (torch.randn(SHAPE).to(memory_format=torch.channels_last) for _ in range(2))
    x, probe = (2 * x + 3).bfloat16(), (probe + 0.2 * x).bfloat16()
    exact = nn.GroupNorm(groups, SHAPE[1], eps=1e-6).double()
    exact.load_state_dict(norm.state_dict())
    want = gradients(exact, x.double(), probe)
    for got, right in zip(gradients(norm, x, probe), want, strict=True):
        assert (got - right).norm() < 0.01 * right.norm()  # bfloat16 rounds to 0.002


def test_the_formula_is_exact_in_float32():
    weight, bias = torch.randn(2, SHAPE[1]).requires_grad_()
    x, probe = (torch.randn(SHAPE).to(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()
    plain = nn.functional.group_norm(x, 4, weight, bias, 1e-6)
    ours = ChannelsLastGroupNorm.apply(x, weight, bias, 4, 1e-6)
    torch.testing.assert_close(ours, plain)
    both = (torch.autograd.grad(y, (x, weight, bias), probe) for y in (ours, plain))
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_which_inputs_take_it(monkeypatch):
    taken = []
    monkeypatch.setattr(ChannelsLastGroupNorm, "apply", lambda x, *_: taken.append(x) or x)
    norm, x = GroupNorm(4, SHAPE[1]), torch.randn(SHAPE).bfloat16().to(memory_format=torch.channels_last)
    norm(x.requires_grad_())
    assert len(taken) == 1
    others = x.detach(), x.float(), x.contiguous(), x[:, :, :31, :32], x[..., 0]
    for other in others:
        norm(other)
    assert len(taken) == 1


def test_a_second_derivative_is_an_error():
    norm, x = GroupNorm(4, SHAPE[1]), torch.randn(SHAPE).bfloat16().to(memory_format=torch.channels_last)
    (first,) = torch.autograd.grad(norm(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
