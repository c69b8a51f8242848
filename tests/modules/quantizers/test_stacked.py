"""ResidualVQ and GroupedVQ: golden values of a peer, levels and combined indices, bad input."""

import pytest
import torch

from taming.modules.quantizers.grouped import GroupedVQ
from taming.modules.quantizers.residual import ResidualVQ
from tests.modules.quantizers.golden import NAMES, as_map, as_rows, close, load_codebooks, read

EMA = dict(beta=1.0, decay=0.8, smoothing=True)


@pytest.mark.parametrize("shared", [False, True])
def test_golden_values_of_residual_codes(shared):
    """lucidrains/vector-quantize-pytorch, commit 0d7d1aa."""
    state, given, want = read("residual_vq_shared" if shared else "residual_vq")
    estimator = "rotation" if shared else "straight_through"
    quantizer = ResidualVQ(16, 8, num_quantizers=3, shared=shared, estimator=estimator, **EMA)
    load_codebooks(state, quantizer.codebooks)
    x = as_map(given["x"]).requires_grad_()
    z_q, _, info = quantizer.eval()(x)
    grids = quantizer.to_grids(info.indices, 1, 7)
    assert torch.equal(torch.stack(grids, dim=-1)[:, 0], want["eval.indices"])
    close(as_rows(z_q), want["eval.quantized"])
    close(as_rows(quantizer.indices_to_codes(grids)), want["eval.output_from_indices"])
    z_q, loss, info = quantizer.train()(x)
    assert torch.equal(info.indices.view(2, 3, 7).movedim(1, -1), want["train.indices"])
    close(as_rows(z_q), want["train.quantized"])
    close(loss, want["train.losses"].sum())
    (loss + (as_rows(z_q) * given["probe"]).sum()).backward()
    close(as_rows(x.grad), want["grad_x"])
    for number, book in enumerate(quantizer.codebooks):
        for ours, theirs in NAMES.items():
            close(getattr(book.embedding, ours), want[f"after.{number}.{theirs}"][0])


def test_golden_values_of_grouped_codes():
    """Heads with separate codebooks of lucidrains/vector-quantize-pytorch, commit 0d7d1aa."""
    state, given, want = read("vq_heads")
    quantizer = GroupedVQ(20, 8, groups=2, estimator="rotation", **EMA)
    load_codebooks(state, quantizer.groups)
    x = as_map(given["x"]).requires_grad_()
    z_q, _, info = quantizer.eval()(x)
    grids = quantizer.to_grids(info.indices, 1, 9)
    assert torch.equal(torch.stack(grids, dim=-1)[:, 0], want["eval.indices"])
    close(as_rows(z_q), want["eval.quantized"])
    close(as_rows(quantizer.indices_to_codes(grids)), want["eval.codes"])
    z_q, loss, _ = quantizer.train()(x)
    close(as_rows(z_q), want["train.quantized"])
    close(loss, want["train.loss"])
    (loss + (as_rows(z_q) * given["probe"]).sum()).backward()
    close(as_rows(x.grad), want["grad_x"])
    for head, group in enumerate(quantizer.groups):
        for ours, theirs in NAMES.items():
            close(getattr(group.embedding, ours), want[f"after.{theirs}"][head])


@pytest.mark.parametrize("kind", ["residual", "shared", "grouped"])
def test_combined_indices_are_digits_of_the_levels(kind):
    torch.manual_seed(0)

    def make(combined):
        if kind == "grouped":
            return GroupedVQ(5, 6, groups=3, combined=combined).eval()
        return ResidualVQ(5, 6, num_quantizers=3, shared=kind == "shared", combined=combined).eval()

    levels, one = make(False), make(True)
    one.load_state_dict(levels.state_dict())
    z = torch.randn(2, 6, 3, 4)
    z_q, _, info = levels(z)
    combined = one(z)[2].indices
    assert (levels.codebook_size, levels.num_levels) == (5, 3)
    assert (one.codebook_size, one.num_levels) == (125, 1)
    grids = levels.to_grids(info.indices, 3, 4)
    assert torch.equal(combined, grids[0] + 5 * grids[1] + 25 * grids[2])
    torch.testing.assert_close(one.indices_to_codes(combined), z_q)
    torch.testing.assert_close(levels.indices_to_codes(grids), z_q)
    assert torch.equal(one.to_grids(combined, 3, 4), combined)


def test_a_shared_codebook_counts_a_code_as_used_whichever_level_uses_it():
    quantizer = ResidualVQ(2, 1, num_quantizers=2, shared=True, revive_after=1).train()
    with torch.no_grad():
        quantizer.codebooks[0].embedding.weight.copy_(torch.tensor([[1.0], [0.1]]))
    codes = quantizer.codebooks[0].embedding.weight.detach().clone()
    grids = quantizer.to_grids(quantizer(torch.full((1, 1, 2, 2), 1.1))[2].indices, 2, 2)
    assert grids[0].eq(0).all() and grids[1].eq(1).all()
    assert torch.equal(quantizer.codebooks[0].embedding.weight, codes)  # neither was revived


def test_bad_input():
    with pytest.raises(ValueError, match="groups: 3 do not divide dim: 8 channels"):
        GroupedVQ(4, 8, groups=3)
    with pytest.raises(ValueError, match=r"1024 codes, 3 at each .* 1024\^3 indices, .*combined=False"):
        ResidualVQ(1024, 8, num_quantizers=3, combined=True)
    grid = torch.zeros(1, 2, 2, dtype=torch.int64)
    for indices, found in ((grid, "one grid"), ([grid], "1 grids")):
        with pytest.raises(ValueError, match=f"takes a list of 2 grids of codes, not {found}"):
            GroupedVQ(4, 8, groups=2).indices_to_codes(indices)
