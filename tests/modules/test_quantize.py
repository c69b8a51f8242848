"""The codebook: nearest codes whatever the precision, gradients, remapping, revival of dead codes."""

import numpy as np
import pytest
import torch

from taming.modules.quantizers.base import kmeans
from taming.modules.vqvae.quantize import (
    EMAVectorQuantizer,
    EmbeddingEMA,
    GumbelQuantize,
    VectorQuantizer,
    VectorQuantizer2,
    nearest_code,
)
from tests.test_golden import read


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


def test_remap_reads_no_file_that_is_larger_than_its_codes(tmp_path):
    path = tmp_path / "used.npy"
    with path.open("wb") as file:
        np.save(file, np.arange(16))
        file.truncate(1 << 40)  # a terabyte, of which nothing is on the disk
    with pytest.raises(ValueError, match="remap: codes file .*used.npy has 1099511627776 bytes, more than"):
        VectorQuantizer2(16, 4, 0.25, remap=str(path))
    np.save(path, np.arange(16))
    path.write_bytes(path.read_bytes().replace(b"(16,)", b"(9e9)").replace(b"9e9", b"9" * 3))
    with pytest.raises(ValueError, match="is damaged or not a .npy file"):
        VectorQuantizer2(16, 4, 0.25, remap=str(path))


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


# ---- latents that are not finite


BAD = [[float("nan"), 0.0], [0.0, float("inf")], [-float("inf"), float("nan")], [3e38, 3e38]]


def test_latents_that_are_not_finite_count_for_no_code():
    good = [[1.0, 0.0], [2.0, 0.0], [7.0, 8.0]]
    states = []
    for rows in (good, [*BAD[:2], *good, *BAD[2:]]):
        torch.manual_seed(0)
        quantizer = EMAVectorQuantizer(4, 2, beta=0.25, decay=0.5, revive_after=1000)
        quantizer(latents(*rows))
        states.append(quantizer.state_dict())
    for name, wanted in states[0].items():
        assert wanted.isfinite().all()
        torch.testing.assert_close(states[1][name], wanted, rtol=0, atol=0)


def test_clusters_are_looked_for_among_finite_latents():
    quantizer = VectorQuantizer2(2, 2, beta=0.25, kmeans_steps=3)
    start = quantizer.embedding.weight.clone()
    quantizer(latents(*BAD))  # there are none: the next batch may do
    assert torch.equal(quantizer.embedding.weight, start) and not quantizer.has_begun
    quantizer(latents(*BAD, [1.0, 0.0], [9.0, 9.0], *BAD))
    found = sorted(quantizer.embedding.weight.tolist())
    assert quantizer.has_begun and found == [[1.0, 0.0], [9.0, 9.0]]


@pytest.mark.parametrize("kind", [EMAVectorQuantizer, VectorQuantizer2])
def test_codes_never_move_to_latents_that_are_not_finite(kind):
    quantizer = kind(8, 2, beta=0.25, revive_after=1)
    start = quantizer.embedding.weight.clone()
    quantizer(latents(*BAD))
    torch.testing.assert_close(quantizer.embedding.weight, start)
    quantizer(latents(*BAD, [5.0, 5.0]))  # those that are sampled from the last latent move now
    moved = (quantizer.embedding.weight != start).any(1)
    for _ in range(50):
        quantizer(latents(*BAD, [5.0, 5.0]))
        moved |= (quantizer.embedding.weight != start).any(1)
    assert moved.any() and quantizer.embedding.weight.isfinite().all()


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


# ---- a start from clusters, restarts, smoothed sizes; golden values


def blobs(count=4, dim=3, each=200):
    """Vectors (N, C) around `count` centres, shuffled, and the centres."""
    centres = 10.0 * torch.eye(count)[:, :dim] - 3.0
    z = (centres[:, None] + 0.1 * torch.randn(count, each, dim)).flatten(0, 1)
    return z[torch.randperm(len(z))], centres


def as_map(z):
    """Vectors (N, C) as a map (1, C, 1, N)."""
    return z.T[None, :, None]


def test_kmeans_finds_clusters_and_copes_with_few_vectors():
    z, centres = blobs()
    found = kmeans(z, 16, 20)  # enough that each cluster has one
    assert found.shape == (16, 3) and torch.cdist(centres, found).amin(1).max() < 0.2
    start = kmeans(z, 16, 0)
    assert len(start.unique(dim=0)) == 16 and {*map(tuple, start.tolist())} <= {*map(tuple, z.tolist())}
    few = kmeans(z[:3], 8, 2)
    assert few.shape == (8, 3) and len(few.unique(dim=0)) == 3
    assert torch.equal(kmeans(z, 1, 5)[0], kmeans(z, 1, 1)[0])  # the mean, after one step
    torch.testing.assert_close(kmeans(z, 1, 1)[0], z.mean(0))


@pytest.mark.parametrize("kind", [VectorQuantizer2, EMAVectorQuantizer])
def test_a_codebook_begins_on_clusters_of_the_first_training_batch(kind):
    z, centres = blobs()
    quantizer = kind(16, 3, beta=0.25, kmeans_steps=20)
    start = quantizer.embedding.weight.clone()
    quantizer.eval()(as_map(z))
    assert torch.equal(quantizer.embedding.weight, start) and not quantizer.has_begun
    quantizer.train()
    z_q, loss, _ = quantizer(as_map(z))
    assert torch.cdist(centres, quantizer.embedding.weight).amin(1).max() < 0.2 and quantizer.has_begun
    assert loss < 0.1 and (z_q - as_map(z)).abs().max() < 1.0
    now = quantizer.embedding.weight.clone()
    loaded = kind(16, 3, beta=0.25, kmeans_steps=20)
    loaded.load_state_dict(quantizer.state_dict())
    for each in (quantizer, loaded):  # later batches move codes only as they always do
        each(as_map(z + 100.0))
        if kind is VectorQuantizer2:
            assert torch.equal(each.embedding.weight, now)
    torch.testing.assert_close(loaded.embedding.weight, quantizer.embedding.weight)
    assert "has_begun" not in kind(16, 3, beta=0.25).state_dict()


def test_the_means_converge_geometrically_and_sizes_add_up():
    quantizer = EMAVectorQuantizer(3, 2, beta=0.25, decay=0.9)
    book = quantizer.embedding
    book.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    book.embed_avg.copy_(book.weight)
    z = latents([1.0, 0.0], [3.0, 0.0], [9.0, 0.0])  # 2 to the first code, 1 to the second, 0 to the third
    for step in range(1, 6):
        quantizer(z)
        left = 0.9**step
        sizes = left + (1 - left) * torch.tensor([2.0, 1.0, 0.0])
        torch.testing.assert_close(book.cluster_size, sizes)
        now = 1 - left
        sums = torch.tensor([[now * 4.0, 0.0], [left * 10.0 + now * 9.0, 0.0], [0.0, left * 10.0]])
        torch.testing.assert_close(book.weight, sums / sizes[:, None])
    smooth = EmbeddingEMA(3, 2, smoothing=True, eps=0.5)
    smooth.update(torch.tensor([5.0, 1.0, 0.0]), torch.ones(3, 2))
    implied = smooth.embed_avg / smooth.weight
    assert implied.sum(0).tolist() == pytest.approx([smooth.cluster_size.sum().item()] * 2, rel=1e-5)


def test_a_codebook_that_began_with_clusters_of_size_zero_would_die_and_ours_does_not():
    """What cluster sizes of 0 do, which other code begins with: unused codes are scaled by 1e5 at once."""
    z = torch.randn(1, 4, 8, 8) * 0.1
    norms = []
    for size in (0.0, 1.0):
        quantizer = EMAVectorQuantizer(256, 4, beta=0.25, smoothing=True)
        quantizer.embedding.cluster_size.fill_(size)
        start = quantizer.embedding.weight.norm(dim=1).median()
        quantizer(z)
        norms.append(quantizer.embedding.weight.norm(dim=1).median() / start)
    assert norms[0] > 1000 and norms[1] == pytest.approx(1.0, abs=0.01)


def test_one_code_is_enough():
    quantizer = EMAVectorQuantizer(1, 4, beta=0.25, kmeans_steps=3, revive_after=1)
    z_q, loss, (_, _, indices) = quantizer(torch.randn(2, 4, 3, 5))
    assert indices.unique().tolist() == [0] and loss.isfinite() and z_q.shape == (2, 4, 3, 5)


@pytest.mark.parametrize("name", ["vq_euclidean", "vq_learnable"])
def test_golden_values_of_a_peer(name):
    """lucidrains/vector-quantize-pytorch, commit 0d7d1aa; its commitment has the weight 1."""
    state, given, want = read(name)
    learns = name == "vq_learnable"
    weights = {key.removeprefix("_codebook."): value[0] for key, value in state.items() if value.ndim}
    if learns:
        quantizer = VectorQuantizer2(20, 8, beta=1.0, legacy=False)
        quantizer.load_state_dict({"embedding.weight": weights["embed"]})
    else:
        quantizer = EMAVectorQuantizer(20, 8, beta=1.0, decay=0.8, smoothing=True)
        quantizer.embedding.load_state_dict({
            "weight": weights["embed"], "cluster_size": weights["cluster_size"],
            "embed_avg": weights["embed_avg"],
        })
    x = given["x"].movedim(-1, 1)[:, :, None].requires_grad_()  # (B, C, 1, N)
    as_rows = lambda z: z[:, :, 0].movedim(1, -1)  # noqa: E731
    z_q, _, (_, _, indices) = quantizer.eval()(x)
    assert torch.equal(indices.view(2, 9), want["eval.indices"])
    close(as_rows(z_q), want["eval.quantized"])
    close(as_rows(quantizer.indices_to_codes(indices.view(2, 1, 9))), want["eval.codes"])
    z_q, loss, (_, _, indices) = quantizer.train()(x)
    assert torch.equal(indices.view(2, 9), want["train.indices"])
    close(as_rows(z_q), want["train.quantized"])
    close(loss / 2 if learns else loss, want["train.loss"])  # there both terms are one, with two gradients
    (loss + (as_rows(z_q) * given["probe"]).sum()).backward()
    close(as_rows(x.grad), want["grad_x"])
    if learns:
        close(quantizer.embedding.weight.grad, want["grad_embed"][0])
        return
    for ours, theirs in (("weight", "embed"), ("cluster_size", "cluster_size"), ("embed_avg", "embed_avg")):
        close(getattr(quantizer.embedding, ours), want[f"after.{theirs}"][0])


def close(got, want):
    torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-6)
