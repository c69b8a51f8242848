"""ActNorm against golden values and as an invertible layer; the condition stages without a network."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from taming.modules.util import ActNorm, Labelator, SOSProvider, count_params
from tests.ranks import on_two_ranks

GOLDEN = Path(__file__).parents[1] / "golden"


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def test_actnorm_starts_as_the_golden_case():
    case = load_file(GOLDEN / "actnorm_data_init.safetensors")
    norm = ActNorm(6).train()
    torch.testing.assert_close(norm(case["in/x"]), case["out/y"], rtol=1e-5, atol=1e-6)
    state = norm.state_dict()
    assert sorted(state) == ["initialized", "loc", "scale"]
    assert state["initialized"].dtype == torch.uint8
    for key, value in state.items():
        torch.testing.assert_close(value, case[f"state/{key}"], rtol=1e-5, atol=1e-6)


def test_actnorm_normalizes_the_first_batch_only():
    norm = ActNorm(4).train()
    first = norm(batch(8, 4, 5, 3))
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.transpose(0, 1).flatten(1).std(1), torch.ones(4), rtol=1e-4, atol=0)
    loc = norm.loc.clone()
    assert norm(batch(8, 4, 5, 3, seed=1) + 10).mean() > 2
    assert torch.equal(norm.loc, loc)


def test_actnorm_takes_two_dimensions():
    norm, x = ActNorm(4).train(), batch(16, 4)
    y = norm(x)
    assert y.shape == (16, 4)
    torch.testing.assert_close(y, (x - x.mean(0)) / (x.std(0) + 1e-6), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(y, reverse=True), x)


def test_actnorm_does_not_start_in_evaluation_mode():
    norm, x = ActNorm(4).eval(), batch(2, 4, 3, 3)
    assert torch.equal(norm(x), x)
    assert norm.initialized.item() == 0


def test_actnorm_reverse_inverts_and_rejects_to_start():
    norm, x = ActNorm(4).train(), batch(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="allow_reverse_init=True"):
        norm(x, reverse=True)
    torch.testing.assert_close(norm(norm(x), reverse=True), x)
    willing = ActNorm(4, allow_reverse_init=True).train()
    willing(x, reverse=True)
    assert willing.initialized.item() == 1
    torch.testing.assert_close(willing.loc.flatten(), -x.mean((0, 2, 3)))


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (3, 2)])
def test_actnorm_log_determinant_is_that_of_the_jacobian(shape):
    norm, x = ActNorm(2, logdet=True).train(), batch(*shape)
    _, logdet = norm(x)
    assert logdet.shape == (3,)
    jacobian = torch.autograd.functional.jacobian(lambda one: norm(one[None])[0][0], x[0])
    size = x[0].numel()
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian.reshape(size, size))[1])


def test_actnorm_rejects_what_it_cannot_do():
    with pytest.raises(ValueError, match="affine"):
        ActNorm(2, affine=False)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        ActNorm(2).train()(torch.zeros(1, 2))


def _actnorm(rank):
    norm = ActNorm(4).train()
    norm(batch(8, 4, 5, 3)[rank::2])
    return norm.state_dict()


@pytest.mark.slow
def test_actnorm_starts_from_the_batch_of_all_ranks(tmp_path):
    whole = ActNorm(4).train()
    whole(batch(8, 4, 5, 3))
    for state in on_two_ranks(_actnorm, tmp_path):
        torch.testing.assert_close(state["loc"], whole.loc.data)
        torch.testing.assert_close(state["scale"], whole.scale.data)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_labelator_wraps_ids_as_a_first_stage_would(shape):
    quant, loss, info = Labelator(10).encode(torch.tensor([0, 9, 4]).reshape(shape))
    assert quant.tolist() == info[2].tolist() == [[0], [9], [4]]
    assert info[2].dtype == torch.long
    assert (loss, info[:2]) == (None, [None, None])
    assert Labelator(10, quantize_interface=False).encode(torch.tensor([7])).tolist() == [[7]]


@pytest.mark.parametrize(("ids", "message"), [
    ([3, 10], r"10 is outside 0\.\.9"), ([-1, 3], r"-1 is outside"), ([[1, 2]], r"\(1, 2\)"),
])
def test_labelator_rejects_ids_and_shapes_by_value(ids, message):
    with pytest.raises(ValueError, match=message):
        Labelator(10).encode(torch.tensor(ids))


def test_sos_provider_repeats_its_token():
    quant, loss, info = SOSProvider(5).encode(torch.zeros(3, 8, 8, 3))
    assert quant.tolist() == info[2].tolist() == [[5]] * 3
    assert info[2].dtype == torch.long and loss is None
    assert SOSProvider(5, quantize_interface=False).encode(torch.zeros(2, 1)).tolist() == [[5], [5]]
    with pytest.raises(ValueError, match="-1"):
        SOSProvider(-1)


def test_sizes_for_checks_at_build_time():
    assert (Labelator(10).vocab_size, Labelator(10).num_tokens(256, 512)) == (10, 1)
    assert (SOSProvider(5).vocab_size, SOSProvider(5).num_tokens(256, 512)) == (6, 1)
    assert not Labelator(10).state_dict() and not SOSProvider(5).state_dict()


def test_count_params_counts_and_logs(caplog):
    model = nn.Linear(3, 4).requires_grad_(False)
    with caplog.at_level(logging.INFO, "taming.modules.util"):
        assert count_params(model) == 16
        assert not caplog.records
        assert count_params(model, verbose=True) == 16
    assert "Linear" in caplog.text
