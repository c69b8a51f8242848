"""The samplers of 2021, over the modules of the GPT: what `sampling.py` compares with.

B batch, T tokens, D channels, P positions of the past, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.transformer.mingpt import GPT


def forward_2021(
    gpt: GPT, idx: Tensor, past: list[Tensor] | None, position: int
) -> tuple[Tensor, list[Tensor]]:
    """2021's `forward_with_past`: logits (B, T, V) of the given tokens, and each layer's keys and values.

    The past is concatenated anew in every call, stacked over the layers, and once more in each of these.
    """
    x = gpt.tok_emb(idx)  # (B, T, D)
    whole = torch.cat(past, dim=-2) if past else None  # (layers, 2, B, heads, P, D / heads)
    x = x + (gpt.pos_emb[:, : x.shape[1]] if whole is None else gpt.pos_emb[:, position])
    presents = []
    for i, block in enumerate(gpt.blocks):
        y, attention = block.ln1(x), block.attn
        batch, length, channels = y.shape
        shape = batch, length, attention.n_head, channels // attention.n_head
        k = attention.key(y).view(shape).transpose(1, 2)
        q = attention.query(y).view(shape).transpose(1, 2)
        v = attention.value(y).view(shape).transpose(1, 2)
        presents.append(torch.stack((k, v)))
        if whole is not None:
            k, v = torch.cat((whole[i, 0], k), dim=-2), torch.cat((whole[i, 1], v), dim=-2)
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        if whole is None:
            weights = weights.masked_fill(torch.ones(length, length, device=x.device).tril() == 0, -math.inf)
        y = (F.softmax(weights, dim=-1) @ v).transpose(1, 2).contiguous().view(batch, length, channels)
        x = x + attention.proj(y)
        x = x + block.mlp(block.ln2(x))
    return gpt.head(gpt.ln_f(x)), presents


@torch.no_grad()
def sample_2021(gpt: GPT, x: Tensor, steps: int, top_k: int, greedy: bool = False) -> Tensor:
    """Continue tokens x (B, T) as `sample_with_past` did in 2021: the new tokens (B, steps)."""
    given, sampled, past = x.shape[1], [], []
    for step in range(steps):
        logits, present = forward_2021(gpt, x, past, given + step - 1)
        past.append(torch.stack(present))
        logits = logits[:, -1, :]
        logits[logits < logits.topk(top_k)[0][..., -1, None]] = -math.inf
        probabilities = F.softmax(logits, dim=-1)
        x = probabilities.topk(1)[1] if greedy else torch.multinomial(probabilities, num_samples=1)
        sampled.append(x)
    return torch.cat(sampled, dim=1)


@torch.no_grad()
def window_2021(
    gpt: GPT, condition: Tensor, codes: Tensor, columns: range, top_k: int, greedy: bool = False
) -> Tensor:
    """Sample some columns of row 8 as in 2021: a forward over the whole window of 16 x 16 for each code."""
    codes = codes.clone()
    for j in columns:
        inside = slice(j - 8, j + 8)
        tokens = torch.cat((condition[:, :16, inside].flatten(1), codes[:, :16, inside].flatten(1)), dim=1)
        logits = forward_2021(gpt, tokens[:, :-1], None, 0)[0][:, -256:].view(len(codes), 16, 16, -1)[:, 8, 8]
        logits[logits < logits.topk(top_k)[0][..., -1, None]] = -math.inf
        probabilities = F.softmax(logits, dim=-1)
        sampled = probabilities.topk(1)[1] if greedy else torch.multinomial(probabilities, num_samples=1)
        codes[:, 8, j] = sampled[:, 0]
    return codes
