"""LFQ and BSQ: golden values of two peers, exact entropies, orders of bits."""

import pytest
import torch

from taming.modules.quantizers.bits import indices_to_digits
from taming.modules.quantizers.lookup_free import BSQ, LFQ
from tests.modules.quantizers.golden import close, read

CASES = {  # lucidrains/vector-quantize-pytorch, commit 0d7d1aa
    "lfq": (LFQ, dict(codebook_size=64, beta=0.25)),
    "lfq_projected": (LFQ, dict(codebook_size=32, dim=8, beta=1.0)),
    "bsq": (BSQ, dict(codebook_size=64, beta=0.25)),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_values_of_a_peer(name):
    state, given, want = read(name)
    kind, arguments = CASES[name]
    quantizer = kind(
        bit_order="highest_first", entropy_weight=0.1, entropy_temperature=0.5, entropy_eps=0.0, **arguments
    )
    quantizer.load_state_dict(state)  # with their buffer `mask`
    x = given["x"].requires_grad_()
    z_q, _, info = quantizer.eval()(x)
    assert torch.equal(info.indices, want["eval.indices"])
    close(z_q, want["eval.quantized"])
    close(quantizer.indices_to_codes(given["codes"]), want["codes"])
    z_q, loss, _ = quantizer.train()(x)
    close(z_q, want["train.quantized"])
    # they take log max(p, 1e-5), which changes the entropy in the fifth digit
    close(loss, want["aux_loss"], rtol=1e-4)
    (loss + (z_q * given["probe"]).sum()).backward()
    close(x.grad, want["grad_x"], atol=1e-5)


@pytest.mark.parametrize("name", ["open_magvit2_lfq", "open_magvit2_lfq_factorized"])
def test_golden_values_of_open_magvit2(name):
    """TencentARC/SEED-Voken, commit b9a17ea; with factorised tokens, an index has two digits."""
    _, given, want = read(name)
    quantizer = LFQ(256, entropy_weight=1.0, diversity=0.8)
    z = given["z"].requires_grad_()
    z_q, loss, info = quantizer(z)
    close(z_q, want["z_q"])
    if "indices" in want:
        assert torch.equal(info.indices, want["indices"])
    else:
        digits = indices_to_digits(info.indices, [2**3, 2**5])
        assert torch.equal(digits[..., 0], want["indices_pre"])
        assert torch.equal(digits[..., 1], want["indices_post"])
    sample, batch = quantizer.entropies(z.movedim(1, -1))
    close(sample, want["per_sample_entropy"])
    close(batch, want["codebook_entropy"])
    close(loss, want["entropy_aux_loss"] + 0.25 * want["commitment"])
    (loss + (z_q * given["probe"]).sum()).backward()
    close(z.grad, want["grad_z"], rtol=1e-4, atol=1e-5)
