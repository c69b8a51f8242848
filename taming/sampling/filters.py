"""Filters of a distribution over codes, and sampling from it.

B batch, V vocabulary; ... stands for any axes before it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | Tensor  # one for all, or one per image (B,)


def filter_logits(
    logits: Tensor, *, temperature: Number = 1.0, top_k: Number | None = None, top_p: Number | None = None,
    min_p: Number | None = None,
) -> Tensor:
    """Scale logits (..., V) by 1/temperature, then set those outside top-k, top-p or min-p to -inf.

    Top-k keeps the k most likely codes and all that tie with the last of them. Top-p (nucleus, Holtzman et
    al. 2020) keeps the smallest set of the most likely codes whose probability reaches p, at least one, of
    codes that tie the first ones; it looks at what top-k has left. Min-p (Nguyen et al. 2024) keeps the codes
    with at least that share of the probability of the most likely one, which the other two do not change.

    Each argument is a number, or a tensor of one for each row of the logits' first axes: (B,) for one per
    image. In a tensor V, 1 and 0 are the top_k, top_p and min_p that keep all. Tensors on the CPU avoid a
    wait for an accelerator. The result is in float32.

    Raises:
        ValueError: temperature <= 0, top_k outside 1..V, top_p outside (0, 1], min_p outside [0, 1], or a
            tensor of another shape.
    """
    vocabulary = logits.shape[-1]
    _check("temperature", temperature, logits, lambda t: t > 0,
           "must be above 0, not {}: greedy=True takes the best code")
    _check("top_k", top_k, logits, lambda k: (1 <= k) & (k <= vocabulary),
           f"= {{}} is outside 1..{vocabulary}, the vocabulary: None keeps all")
    _check("top_p", top_p, logits, lambda p: (0 < p) & (p <= 1), "= {} is outside (0, 1]: None keeps all")
    _check("min_p", min_p, logits, lambda p: (0 <= p) & (p <= 1), "= {} is outside [0, 1]: None keeps all")
    logits = logits.float() / _rows(temperature, logits)
    if top_k is not None:
        logits = logits.masked_fill(logits < _kth_best(logits, top_k), -torch.inf)
    if top_p is not None and (top_p.min() if torch.is_tensor(top_p) else top_p) < 1:
        logits = _nucleus(logits, _rows(top_p, logits))
    if min_p is not None:
        share = _rows(min_p, logits)
        share = share.log() if torch.is_tensor(share) else math.log(share) if share else -torch.inf
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + share, -torch.inf)
    return logits


def _kth_best(logits: Tensor, k: Number) -> Tensor:
    """The k-th largest logit of each row, (..., 1)."""
    if not torch.is_tensor(k):
        return logits.topk(int(k), dim=-1).values[..., -1:]
    best = logits.topk(int(k.max()), dim=-1).values
    rows = k.reshape(*k.shape, *[1] * (logits.ndim - k.ndim)).to(logits.device)
    return best.gather(-1, rows.long().expand(*logits.shape[:-1], 1) - 1)


def _nucleus(logits: Tensor, p: Number) -> Tensor:
    """Top-p, of p or of a tensor (..., 1) of them, where 1 keeps all codes."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    # in float64: summed in float32, a long tail reaches p too early or too late
    reached = ordered.double().softmax(-1).cumsum(-1)[..., :-1] >= p
    if torch.is_tensor(p):
        reached &= p < 1
    # a code stays while the more likely ones before it have not yet reached p
    drop = F.pad(reached, (1, 0))
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def _check(name: str, value: Number | None, logits: Tensor, valid: Callable, message: str) -> None:
    """Raise ValueError naming the first value that is not valid, or a shape that does not fit."""
    if value is None:
        return
    good = valid(value)
    if torch.is_tensor(value):
        if value.shape != logits.shape[:-1][: value.ndim]:
            raise ValueError(
                f"{name} {tuple(value.shape)} does not fit logits {tuple(logits.shape)}: give a number, or "
                f"{len(logits)}, one for each image"
            )
        value = None if good.all() else value[~good][0].item()
        good = value is None
    if not good:
        raise ValueError(f"{name} {message.format(value)}")


def _rows(value: Number, logits: Tensor) -> Number:
    """A number as it is; a tensor in float32, with as many axes as the logits, on their device."""
    if not torch.is_tensor(value):
        return value
    return value.reshape(*value.shape, *[1] * (logits.ndim - value.ndim)).to(logits.device, torch.float32)


def sample_from(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample a code (B,) per row of logits (B, V): the first whose cumulative probability passes `uniform`.

    `uniform` (B,) lies in [0, 1). Codes at -inf are never taken. Logits that are NaN give any code.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    # scaled to the sum that rounding left, so that no code at -inf can follow the last possible one
    threshold = uniform.double() * cumulative[:, -1]
    codes = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
    return codes.clamp(max=logits.shape[-1] - 1)
