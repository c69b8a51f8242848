"""SimVQ: golden values of a peer."""

import pytest
import torch

from taming.modules.quantizers.sim_vq import SimVQ
from tests.modules.quantizers.golden import as_map, as_rows, close, read


@pytest.mark.parametrize("name", ["simvq", "simvq_rotation"])
def test_golden_values_of_a_peer(name):
    """lucidrains/vector-quantize-pytorch, commit 0d7d1aa."""
    state, given, want = read(name)
    quantizer = SimVQ(24, 8, estimator="rotation" if name.endswith("rotation") else "straight_through")
    quantizer.load_state_dict(state)
    x = as_map(given["x"]).requires_grad_()
    z_q, loss, info = quantizer(x)
    assert torch.equal(info.indices[:, 0], want["indices"])
    close(as_rows(z_q), want["quantized"])
    close(loss, want["loss"])
    (loss + (as_rows(z_q) * given["probe"]).sum()).backward()
    close(as_rows(x.grad), want["grad_x"])
    close(quantizer.code_transform.weight.grad, want["grad_code_transform"])
    close(as_rows(quantizer.indices_to_codes(given["codes"][:, None])), want["codes"])
    assert [name for name, _ in quantizer.named_parameters()] == ["code_transform.weight"]
