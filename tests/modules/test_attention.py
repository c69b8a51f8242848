"""Ways to compute causal attention: equal to torch's fused kernel."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.transformer import attention
from taming.modules.transformer.mingpt import GPT


@pytest.mark.parametrize("n_unmasked", [0, 5, 200])
def test_attention_in_blocks_is_the_fused_one(n_unmasked, monkeypatch):
    """Few sequences on a CPU go block by block, many through the fused kernel: the same result."""
    gpt = GPT(10, 300, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked).eval()
    idx = torch.randint(10, (2, 290))
    with torch.no_grad():
        blocks = gpt(idx)[0]
        cache = gpt.new_cache(2, 300)
        gpt.extend(idx[:, :250], cache)
        later = gpt.extend(idx[:, 250:], cache)
        monkeypatch.setattr(attention, "FEW", 0)
        fused = gpt(idx)[0]
    torch.testing.assert_close(blocks, fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(later, fused[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries, n_unmasked", [(20, 0), (20, 7), (5, 0), (5, 18), (1, 0)])
def test_attention_by_scores_is_the_fused_one(queries, n_unmasked):
    """Results and gradients are equal in float32."""
    q, k, v = (torch.randn(2, 3, length, 4, requires_grad=True) for length in (queries, 20, 20))
    mask = attention.causal_mask(20 - queries, 20, 20, n_unmasked, q.device)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got = attention.attend_by_scores(q, k, v, n_unmasked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(want)
    for mine, other in zip(*(torch.autograd.grad(y, (q, k, v), probe) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_scores_are_kept_in_bfloat16_and_up_to_a_limit(monkeypatch):
    """In training in bfloat16 on a CPU, close to the fused kernel; otherwise the fused kernel runs."""
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    errors = {}
    for limit, name in ((attention.KEPT, "by scores"), (2 * 3 * 40 * 40 - 1, "fused")):
        monkeypatch.setattr(attention, "KEPT", limit)
        assert attention.suits_scores(q, k, 0.0) == (name == "by scores")
        errors[name] = (attention.attend(q, k, v).double() - exact).norm() / exact.norm()
    assert errors["by scores"] < 2 * errors["fused"] < 0.02
    assert not attention.suits_scores(q.float(), k.float(), 0.0)
    assert not attention.suits_scores(q, k, 0.1)
    assert not attention.suits_scores(q.detach(), k, 0.0)
