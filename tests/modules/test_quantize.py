"""The codebook: nearest codes whatever the precision, gradients, remapping, revival of dead codes."""

import numpy as np
import pytest
import torch

from taming.modules.vqvae.quantize import (
    EMAVectorQuantizer,
    GumbelQuantize,
    VectorQuantizer,
    VectorQuantizer2,
    nearest_code,
)


def naive_nearest(z, codebook):
    return torch.cdist(z.double(), codebook.double()).argmin(1)


def test_nearest_code_is_the_nearest():
    z, codebook = torch.randn(500, 6), torch.randn(40, 6)
    assert torch.equal(nearest_code(z, codebook), naive_nearest(z, codebook))


def test_autocast_does_not_change_the_codes():
    quantizer = VectorQuantizer2(512, 8, beta=0.25)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 8, 24, 40)
    want_q, want_loss, (_, _, want) = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z.flatten(1) @ z.flatten(1).t()).dtype == torch.bfloat16  # it is on
        z_q, loss, (_, _, indices) = quantizer(z)
    assert torch.equal(indices, want) and torch.equal(z_q, want_q) and torch.equal(loss, want_loss)
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    rounded = nearest_code(rows.bfloat16(), quantizer.embedding.weight.bfloat16())
    assert not torch.equal(rounded, want)  # what bfloat16 would have made of it


def test_a_half_precision_model_gets_its_own_dtype():
    quantizer = VectorQuantizer2(16, 4, beta=0.25).half()
    z_q, loss, (_, _, indices) = quantizer(torch.randn(1, 4, 2, 3).half())
    assert (z_q.dtype, loss.dtype) == (torch.float16, torch.float32)
    assert quantizer.get_codebook_entry(indices).dtype == torch.float16


def test_gradient_passes_straight_through():
    quantizer = VectorQuantizer2(16, 4, beta=0.25)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    z_q, _, (_, _, indices) = quantizer(z)
    codes = quantizer.embedding(indices).view(2, 3, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(z_q, codes)
    weights = torch.randn_like(z_q)
    (z_q * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert quantizer.embedding.weight.grad is None


@pytest.mark.parametrize(("legacy", "of_z", "of_codes"), [(False, 0.25, 1.0), (True, 1.0, 0.25)])
def test_beta_weighs_the_commitment_or_by_legacy_the_codebook(legacy, of_z, of_codes):
    quantizer = VectorQuantizer2(16, 4, beta=0.25, legacy=legacy)
    z = torch.randn(1, 4, 2, 3, requires_grad=True)
    _, loss, (_, _, indices) = quantizer(z)
    loss.backward()
    codes = quantizer.embedding.weight.detach()[indices].view(1, 2, 3, 4).permute(0, 3, 1, 2)
    slope = 2 * (z.detach() - codes) / z.numel()
    torch.testing.assert_close(loss.detach(), 1.25 * (z.detach() - codes).square().mean())
    torch.testing.assert_close(z.grad, of_z * slope)
    want = torch.zeros(16, 4).index_add_(0, indices, -of_codes * slope.permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(quantizer.embedding.weight.grad, want)


def test_shapes_of_indices_and_entries():
    z = torch.randn(2, 4, 3, 5)
    flat = VectorQuantizer2(16, 4, beta=0.25)
    sane = VectorQuantizer2(16, 4, beta=0.25, sane_index_shape=True)
    sane.load_state_dict(flat.state_dict())
    indices, grid = flat(z)[2][2], sane(z)[2][2]
    assert (indices.shape, grid.shape) == ((30,), (2, 3, 5)) and torch.equal(indices.view(2, 3, 5), grid)
    assert sane.get_codebook_entry(grid).shape == (2, 3, 5, 4)
    torch.testing.assert_close(sane.get_codebook_entry(grid, (2, 3, 5, 4)), flat(z)[0])


def remapped(folder, unknown_index):
    np.save(folder / "used.npy", np.array([7, 2, 11]))
    return VectorQuantizer2(16, 4, 0.25, remap=str(folder / "used.npy"), unknown_index=unknown_index)


def test_remap_round_trip(tmp_path):
    quantizer = remapped(tmp_path, "extra")
    assert quantizer.re_embed == 4
    new = quantizer.remap_to_used(torch.tensor([[2, 7], [11, 3]]))
    assert new.tolist() == [[1, 0], [2, 3]]
    assert quantizer.unmap_to_all(new).tolist() == [[2, 7], [11, 7]]  # the extra one stands for the first
    known = torch.tensor([11, 7, 2, 7])
    assert torch.equal(quantizer.unmap_to_all(quantizer.remap_to_used(known)), known)
    assert list(quantizer.state_dict()) == ["used", "embedding.weight"]


def test_unknown_codes_may_become_random_or_a_number(tmp_path):
    drawn = remapped(tmp_path, "random").remap_to_used(torch.full((500,), 3))
    assert set(drawn.tolist()) == {0, 1, 2}
    assert remapped(tmp_path, 1).remap_to_used(torch.tensor([3, 11])).tolist() == [1, 2]


def test_remapped_indices_decode_to_the_same_codes(tmp_path):
    quantizer = remapped(tmp_path, "extra")
    with torch.no_grad():
        quantizer.embedding.weight[[7, 2, 11]] = torch.randn(3, 4)
        quantizer.embedding.weight[[i for i in range(16) if i not in (7, 2, 11)]] = 100.0
        z_q, _, (_, _, indices) = quantizer(torch.randn(1, 4, 3, 5))
        assert indices.max() < 3
        torch.testing.assert_close(quantizer.get_codebook_entry(indices, (1, 3, 5, 4)), z_q)


def test_there_are_no_logits():
    with pytest.raises(ValueError, match="no logits"):
        VectorQuantizer2(16, 4, 0.25)(torch.randn(1, 4, 2, 2), return_logits=True)


def test_dead_codes_move_to_latents_in_training_only():
    quantizer = VectorQuantizer2(8, 4, 0.25, revive_after=2)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(50.0)
        quantizer.embedding.weight[0] = 0.0  # the only one in reach
    z = torch.randn(1, 4, 3, 3)
    quantizer.eval()
    for _ in range(3):
        quantizer(z)
    assert quantizer.idle_batches.tolist() == [0] * 8
    quantizer.train()
    quantizer(z)
    assert quantizer.idle_batches.tolist() == [0] + [1] * 7 and (quantizer.embedding.weight[1:] == 50.0).all()
    quantizer(z)
    latents = {tuple(latent) for latent in z.permute(0, 2, 3, 1).flatten(0, 2).tolist()}
    assert all(tuple(code) in latents for code in quantizer.embedding.weight[1:].tolist())
    assert (quantizer.embedding.weight[0] == 0.0).all() and quantizer.idle_batches.tolist() == [0] * 8


# ---- the first quantizer of 2021


def test_the_first_quantizer_gives_statistics_too():
    old, new = VectorQuantizer(16, 4, beta=0.25), VectorQuantizer2(16, 4, beta=0.25)
    torch.nn.init.normal_(old.embedding.weight)
    new.load_state_dict(old.state_dict())
    z = torch.randn(2, 4, 3, 5)
    z_q, loss, (perplexity, one_hot, indices) = old(z)
    want_q, want_loss, (_, _, want) = new(z)
    assert torch.equal(z_q, want_q) and torch.equal(loss, want_loss)
    assert torch.equal(indices, want[:, None]) and torch.equal(one_hot.argmax(1), want)
    usage = torch.bincount(want, minlength=16) / 30
    assert perplexity.item() == pytest.approx((-torch.xlogy(usage, usage).sum()).exp().item(), rel=1e-5)
    torch.testing.assert_close(old.get_codebook_entry(indices, (2, 3, 5, 4)), want_q.detach())


# ---- running means


def latents(*rows):
    """Vectors as a map (1, C, 1, N)."""
    return torch.tensor(rows).T[None, :, None]


def test_running_means_follow_the_latents():
    quantizer = EMAVectorQuantizer(2, 2, beta=0.25, decay=0.5)
    quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    quantizer.embedding.embed_avg.copy_(quantizer.embedding.weight)
    z = latents([1.0, 0.0], [2.0, 0.0], [3.0, 3.0]).requires_grad_()
    _, loss, (_, _, indices) = quantizer(z)
    assert indices.tolist() == [0, 0, 0]
    assert loss.item() == pytest.approx(0.25 * (1 + 4 + 18) / 6)
    # cluster sizes (1 + 3) / 2 and 1 / 2, sums (0 + [6, 3]) / 2 and [9, 9] / 2
    torch.testing.assert_close(quantizer.embedding.cluster_size, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(quantizer.embedding.weight, torch.tensor([[1.5, 0.75], [9.0, 9.0]]))
    assert not list(quantizer.parameters())
    loss.backward()
    assert z.grad.abs().sum() > 0
    weight = quantizer.embedding.weight.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.embedding.weight, weight)


def test_unused_codes_stay_where_they_are():
    quantizer = EMAVectorQuantizer(64, 2, beta=0.25)
    start = quantizer.embedding.weight.clone()
    z = torch.randn(1, 2, 4, 4) * 0.01 + start[0].view(1, 2, 1, 1)
    for _ in range(3000):  # 0.99^3000 is 1e-13: far below eps
        _, _, (_, _, indices) = quantizer(z)
    unused = [k for k in range(64) if k not in indices]
    assert len(unused) > 50
    assert quantizer.embedding.weight.abs().max() <= start.abs().max() + 0.1  # nothing explodes
    early = EMAVectorQuantizer(64, 2, beta=0.25)
    early.embedding.load_state_dict({"weight": start, "embed_avg": start, "cluster_size": torch.ones(64)})
    for _ in range(500):
        early(z)
    torch.testing.assert_close(early.embedding.weight[unused], start[unused])


def test_a_revived_code_begins_with_a_fresh_mean():
    quantizer = EMAVectorQuantizer(2, 2, beta=0.25, revive_after=2)
    quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    quantizer.embedding.embed_avg.copy_(quantizer.embedding.weight)
    z = latents([1.0, 0.0], [1.0, 0.0])
    quantizer(z), quantizer(z)
    book = quantizer.embedding
    assert book.weight[1].tolist() == book.embed_avg[1].tolist() == [1.0, 0.0] and book.cluster_size[1] == 1.0


# ---- Gumbel


def test_gumbel_draws_in_training_and_takes_the_likeliest_in_evaluation():
    quantizer = GumbelQuantize(6, 4, 16)
    z = torch.randn(2, 6, 5, 3)
    z_q, loss, (_, _, indices), logits = quantizer.eval()(z, return_logits=True)
    assert torch.equal(indices, quantizer.proj(z).argmax(1)) and logits.shape == (2, 16, 5, 3)
    torch.testing.assert_close(quantizer.get_codebook_entry(indices.view(-1), (2, 5, 3, 4)), z_q)
    p = logits.softmax(1)
    assert loss.item() == pytest.approx((5e-4 * (p * (p * 16).log()).sum(1).mean()).item(), rel=1e-4)

    quantizer.train()
    draws = [quantizer(z)[2][2] for _ in range(2)]
    assert not torch.equal(*draws)
    drawn = quantizer(z.expand(400, 2, 6, 5, 3).flatten(0, 1))[2][2].view(400, 2, 5, 3)
    counts = torch.stack([(drawn == k).float().mean(0) for k in range(16)], dim=1)
    assert (counts - p).abs().max() < 0.12  # codes come as often as their probabilities say


def test_gumbel_gradients_reach_logits_and_codes():
    quantizer = GumbelQuantize(6, 4, 16)
    z_q, loss, _ = quantizer(torch.randn(1, 6, 3, 3), temp=0.7)
    (z_q.square().sum() + loss).backward()
    assert quantizer.proj.weight.grad.abs().sum() > 0 and quantizer.embed.weight.grad.abs().sum() > 0


def test_gumbel_may_mix_codes_and_return_bare_indices():
    quantizer = GumbelQuantize(6, 4, 16, straight_through=False, use_vqinterface=False)
    z_q, _, indices = quantizer(torch.randn(1, 6, 3, 3))
    assert indices.shape == (1, 3, 3)
    rows = z_q.detach().permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.cdist(rows, quantizer.embed.weight.detach()).min() > 1e-3  # no code itself


def test_gumbel_chooses_only_codes_that_stay(tmp_path):
    np.save(tmp_path / "used.npy", np.array([7, 2, 11]))
    quantizer = GumbelQuantize(6, 4, 16, remap=str(tmp_path / "used.npy")).eval()
    assert quantizer.re_embed == 3
    z = torch.randn(2, 6, 4, 4)
    z_q, _, (_, _, indices) = quantizer(z)
    assert torch.equal(indices, quantizer.proj(z)[:, [7, 2, 11]].argmax(1))
    torch.testing.assert_close(quantizer.get_codebook_entry(indices, (2, 4, 4, 4)), z_q)
