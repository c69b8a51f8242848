"""VQ: golden values of two peers, options, bad input."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.quantizers.vector import VQ
from tests.modules.quantizers.golden import as_map, as_rows, close, read

PEER = {  # lucidrains/vector-quantize-pytorch, commit 0d7d1aa
    "vq_euclidean": dict(decay=0.8, smoothing=True),
    "vq_euclidean_rotation": dict(decay=0.8, smoothing=True, estimator="rotation"),
    "vq_cosine": dict(decay=0.8, smoothing=True, l2_normalize=True),
    "vq_cosine_rotation": dict(decay=0.8, smoothing=True, l2_normalize=True, estimator="rotation"),
    "vq_euclidean_projected": dict(codebook_dim=4, decay=0.8, smoothing=True),
    "vq_learnable": {},
}


@pytest.mark.parametrize("name", PEER)
def test_golden_values_of_a_peer(name):
    state, given, want = read(name)
    quantizer, learned = VQ(20, 8, beta=1.0, **PEER[name]), name == "vq_learnable"
    weights = {key: value for key, value in state.items() if key.startswith("project")}
    book = {key.removeprefix("_codebook."): value[0] for key, value in state.items() if value.ndim == 3}
    book["cluster_size"] = state["_codebook.cluster_size"][0]
    names = {"weight": "embed"}
    if not learned:
        names |= {key: key for key in ("cluster_size", "embed_avg")}
    quantizer.load_state_dict(weights | {f"embedding.{ours}": book[name] for ours, name in names.items()})
    x = as_map(given["x"]).requires_grad_()
    z_q, _, info = quantizer.eval()(x)
    assert torch.equal(info.indices.view(2, 9), want["eval.indices"])
    close(as_rows(z_q), want["eval.quantized"])
    close(as_rows(quantizer.indices_to_codes(info.indices)), want["eval.codes"])
    z_q, loss, info = quantizer.train()(x)
    assert torch.equal(info.indices.view(2, 9), want["train.indices"])
    close(as_rows(z_q), want["train.quantized"])
    close(loss / 2 if learned else loss, want["train.loss"])  # there both terms are one, with two gradients
    (loss + (as_rows(z_q) * given["probe"]).sum()).backward()
    close(as_rows(x.grad), want["grad_x"])
    if learned:
        close(quantizer.embedding.weight.grad, want["grad_embed"][0])
        return
    for ours, theirs in names.items():
        close(getattr(quantizer.embedding, ours), want[f"after.{theirs}"][0])


@pytest.mark.parametrize("l2", [True, False])
def test_golden_values_of_llamagen(l2):
    state, _, out = read("llamagen_vq_quantizer")
    prefix = f"l2_{str(l2).lower()}."
    want = {key.removeprefix(prefix): value for key, value in out.items() if key.startswith(prefix)}
    quantizer = VQ(64, 8, l2_normalize=l2, entropy_weight=0.1)
    quantizer.load_state_dict({"embedding.weight": state["quantize.embedding.weight"]})
    z = out["prequant"]
    with torch.no_grad():
        z_q, _, info = quantizer.eval()(z)
        assert torch.equal(info.indices, want["indices"])
        close(z_q, want["quant"])
        quantizer.train()
        _, loss, _ = quantizer(z)
    rows = z.movedim(1, -1)
    rows = F.normalize(rows, dim=-1) if l2 else rows
    terms = quantizer.loss_terms(rows, F.embedding(info.indices, quantizer.codes()), quantizer.codes())
    for ours, theirs in dict(codebook="vq", commitment="commit", entropy="entropy").items():
        close(terms[ours], want[f"{theirs}_loss"])
    close(loss, want["vq_loss"] + want["commit_loss"] + want["entropy_loss"])
