"""IBQ: golden values of the authors, blocks, memory."""

import pytest
import torch

from taming.modules.quantizers.index_propagation import IBQ
from tests.modules.quantizers.golden import close, read


@pytest.mark.parametrize("memory", [1 << 28, 6 * 4 * 32 * 7])
def test_golden_values_of_the_authors(memory):
    """TencentARC/SEED-Voken, commit b9a17ea; whole, and in blocks of seven vectors."""
    state, given, want = read("ibq_quantizer")
    quantizer = IBQ(32, 12, entropy_weight=0.05, entropy_temperature=0.05, diversity=0.7, memory=memory)
    quantizer.load_state_dict(state)
    z = given["z"].requires_grad_()
    z_q, loss, info = quantizer(z)
    assert torch.equal(info.indices, want["indices"])
    close(z_q, want["z_q"])
    close(quantizer.indices_to_codes(info.indices), want["z_q"])
    close(loss, want["quant_loss"] + 0.05 * want["entropy_loss"])
    (loss + z_q.square().mean() + (z_q * given["probe"]).sum()).backward()
    close(z.grad, want["grad_z"])
    close(quantizer.embedding.weight.grad, want["grad_embedding"])
    with torch.no_grad():
        _, loss, _ = quantizer.eval()(z)
        close(loss, want["quant_loss"])
        assert torch.equal(quantizer(z)[0], quantizer.indices_to_codes(info.indices))
