"""MultiScaleResidualVQ: the algorithm of the paper, its grids, keys of VAR's checkpoints, a VQGAN of it."""

import pytest
import torch
import torch.nn.functional as F

from taming.config import instantiate_from_config
from taming.modules.quantizers.multi_scale import SCALES, MultiScaleResidualVQ
from tests.test_contracts import stage


def naive(z, codebook, convolutions, sides, of_scale, ratio):
    """Algorithm 1 of the paper for square latents: grids of codes, and their sum."""
    rest, total, grids = z.clone(), torch.zeros_like(z), []
    for side, which in zip(sides, of_scale, strict=True):
        small = F.adaptive_avg_pool2d(rest, side)
        distances = torch.cdist(small.movedim(1, -1).double(), codebook.double()[None])  # (B, h, w, K)
        grids.append(distances.argmin(-1))
        large = F.interpolate(codebook[grids[-1]].movedim(-1, 1), z.shape[2:], mode="bicubic")
        part = (1 - ratio) * large + ratio * convolutions[which](large)
        rest, total = rest - part, total + part
    return grids, total


def quantizer_of(scales=SCALES, **arguments):
    torch.manual_seed(0)
    count = min(4, len(scales) - 1)
    quantizer = MultiScaleResidualVQ(40, 6, scales=scales, num_convolutions=count, **arguments)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def test_the_algorithm_of_the_paper():
    """With VAR's ten scales, at k/9; its four convolutions are at numpy.linspace(1/12, 11/12, 4)."""
    quantizer, z = quantizer_of(), torch.randn(2, 6, 16, 16)
    which = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    with torch.no_grad():
        want, total = naive(
            z, quantizer.embedding.weight, quantizer.quant_resi["qresi_ls"], quantizer.scales, which, 0.5
        )
        z_q, _, info = quantizer.eval()(z)
        grids = quantizer.to_grids(info.indices, 16, 16)
        assert [tuple(grid.shape) for grid in grids] == [(2, side, side) for side in quantizer.scales]
        assert all(map(torch.equal, grids, want))
        torch.testing.assert_close(z_q, total)
        torch.testing.assert_close(quantizer.indices_to_codes(grids), z_q)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "diveq"])
def test_gradients_and_the_loss(estimator):
    quantizer = quantizer_of((1, 2, 4), estimator=estimator).train()
    z = torch.randn(2, 6, 4, 4, requires_grad=True)
    z_q, loss, _ = quantizer(z)
    loss.backward(retain_graph=True)
    assert all(p.grad.abs().sum() > 0 for p in quantizer.embedding.parameters())
    last = quantizer.quant_resi["qresi_ls"][-1]
    assert last.weight.grad.abs().sum() > 0 and z.grad.abs().sum() > 0
    z.grad = None
    probe = torch.randn_like(z_q)
    (z_q * probe).sum().backward()
    assert torch.equal(z.grad, probe) == (estimator == "straight_through") and z.grad.abs().sum() > 0


def test_grids_follow_the_latents():
    quantizer = quantizer_of((1, 2, 4))
    assert quantizer.grids(4, 4) == [(1, 1), (2, 2), (4, 4)]
    assert quantizer.grids(8, 4) == [(2, 1), (4, 2), (8, 4)]
    assert quantizer.grids(1, 6) == [(1, 2), (1, 3), (1, 6)]
    z_q, _, info = quantizer(torch.randn(3, 6, 1, 6))
    assert z_q.shape == (3, 6, 1, 6) and info.indices.shape == (3, 2 + 3 + 6)


def test_names_of_a_published_checkpoint_load():
    quantizer = quantizer_of()
    state = {key: torch.randn_like(value) for key, value in quantizer.state_dict().items()}
    assert sorted(state) == sorted(["embedding.weight"] + [
        f"quant_resi.qresi_ls.{i}.{part}" for i in range(4) for part in ("weight", "bias")
    ])
    quantizer.load_state_dict(state | {"ema_vocab_hit_SV": torch.zeros(10, 40)})
    assert torch.equal(quantizer.embedding.weight, state["embedding.weight"])


def test_revival_and_a_start_on_clusters():
    quantizer = quantizer_of((1, 2, 4), revive_after=1, kmeans_steps=2).train()
    before = quantizer.embedding.weight.detach().clone()
    quantizer(torch.randn(2, 6, 4, 4))
    assert quantizer.has_begun and not torch.equal(quantizer.embedding.weight, before)


def test_bad_input():
    for scales in ([2, 1], [1, 1, 2], []):
        with pytest.raises(ValueError, match="give growing sides, the coarsest first"):
            MultiScaleResidualVQ(8, 4, scales=scales)
    with pytest.raises(ValueError, match="num_convolutions: 4, but 3 scales use 3 of them: set .*=2, or as"):
        MultiScaleResidualVQ(8, 4, scales=[1, 2, 4])
    quantizer = quantizer_of((1, 2, 4))
    grids = [torch.zeros(1, *grid, dtype=torch.int64) for grid in quantizer.grids(4, 4)]
    with pytest.raises(ValueError, match="takes 3 grids of codes, .* not "):
        quantizer.indices_to_codes(grids[:2])
    with pytest.raises(ValueError, match="takes 3 grids of codes, .* not "):
        quantizer.indices_to_codes([grids[1], *grids[1:]])


def test_a_vqgan_of_several_grids_encodes_and_decodes():
    model = instantiate_from_config(stage("vqgan.VQModel", quantizer_config={
        "target": "taming.modules.quantizers.multi_scale.MultiScaleResidualVQ",
        "params": dict(codebook_size=12, dim=4, scales=[1, 2, 4], num_convolutions=2),
    })).eval()
    assert model.levels == 3 and model.code_shape(16, 24) == [(1, 2), (2, 3), (4, 6)]
    assert model.num_codes(16, 24) == 2 + 6 + 24
    codes = model.encode_codes(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert [tuple(grid.shape) for grid in codes] == [(2, 1, 2), (2, 2, 3), (2, 4, 6)]
    assert model.decode_codes(codes).shape == (2, 3, 16, 24)
