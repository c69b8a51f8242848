"""Reshape a distribution over codes, and draw from it.

B batch, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Scale logits (..., V) by 1/temperature, then set those outside top-k and top-p to -inf, in float32.

    Top-k keeps the k most likely codes and all that tie with the last of them; top-p (nucleus, Holtzman et
    al. 2020) keeps the smallest set of the most likely codes whose probability reaches p, at least one. Top-p
    looks at what top-k has left.

    Raises:
        ValueError: temperature <= 0, top_k outside 1..V, top_p outside (0, 1].
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: greedy=True takes the best code")
    logits = logits.float() / temperature
    vocabulary = logits.shape[-1]
    if top_k is not None:
        if not 1 <= top_k <= vocabulary:
            raise ValueError(f"top_k = {top_k} is outside 1..{vocabulary}, the vocabulary: None keeps all")
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} is outside (0, 1]: None keeps all")
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        # in float64: summed in float32, a long tail reaches p too early or too late
        reached = ordered.double().softmax(-1).cumsum(-1)[..., :-1] >= top_p
        # a code stays while the more likely ones before it have not yet reached p
        drop = F.pad(reached, (1, 0))
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a code (B,) per row of logits (B, V) where the cumulative probability passes `uniform` (B,).

    `uniform` lies in [0, 1). Codes at -inf are never drawn. Logits that are not numbers give any code.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    # scaled to the sum that rounding left, so that the last code that is possible is also the last drawn
    threshold = uniform.double() * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)
