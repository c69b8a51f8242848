"""What holds for every quantizer: precision, gradients, saved states, processes; and the snippets of docs."""

from pathlib import Path

import pytest
import torch
import yaml

from taming.config import instantiate_from_config
from taming.modules.quantizers import Quantizer
from tests.modules.quantizers.memory import PeakBytes
from tests.ranks import on_two_ranks
from tests.test_contracts import DDCONFIG, LOSS, QUANTIZERS, SEVERAL_GRIDS
from tests.test_docs import blocks

PAGE = Path(__file__).parents[3] / "docs" / "quantizers.md"
ALL = QUANTIZERS | {f"{name}, several grids": config for name, config in SEVERAL_GRIDS.items()}
all_quantizers = pytest.mark.parametrize("name", ALL)


def build(name):
    torch.manual_seed(0)
    quantizer = instantiate_from_config(ALL[name]["params"]["quantizer_config"])
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter)
    return quantizer


def latents(**options):
    return torch.randn(2, 4, 4, 6, **options)


def codes_of(quantizer, indices):
    return quantizer.indices_to_codes(quantizer.to_grids(indices, 4, 6))


@all_quantizers
def test_without_gradients_the_result_is_the_codes(name):
    quantizer = build(name).eval()
    with torch.no_grad():
        z_q, loss, info = quantizer(latents())
        assert torch.equal(z_q, codes_of(quantizer, info.indices)) or quantizer.num_levels > 1
        torch.testing.assert_close(z_q, codes_of(quantizer, info.indices))
    assert z_q.shape == (2, quantizer.code_dim, 4, 6) and loss.shape == () and loss.isfinite()


@all_quantizers
def test_codes_and_losses_do_not_depend_on_autocast(name):
    quantizer, z = build(name).eval(), latents()
    want_q, want_loss, want = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, loss, info = quantizer(z)
    assert torch.equal(info.indices, want.indices)
    assert torch.equal(loss, want_loss) and torch.equal(z_q, want_q)


@all_quantizers
def test_a_model_of_another_precision_keeps_it(name):
    quantizer = build(name).bfloat16().eval()
    z_q, loss, info = quantizer(latents(dtype=torch.bfloat16))
    assert z_q.dtype == codes_of(quantizer, info.indices).dtype == torch.bfloat16
    assert loss.dtype == torch.float32


@all_quantizers
def test_a_training_step_has_gradients_for_all_that_is_learned(name):
    quantizer, z = build(name).train(), latents(requires_grad=True)
    z_q, loss, _ = quantizer(z)
    (z_q.square().mean() + loss).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@all_quantizers
def test_a_saved_state_gives_the_same_codes(name):
    quantizer, z = build(name), latents()
    quantizer(z)  # a batch of training: running means, ages of codes
    again = instantiate_from_config(ALL[name]["params"]["quantizer_config"])
    again.load_state_dict(quantizer.state_dict())
    ours, theirs = (each.eval()(z) for each in (quantizer, again))
    assert torch.equal(ours[2].indices, theirs[2].indices) and torch.equal(ours[0], theirs[0])


def one_batch(rank):
    """The state after a batch, all of it in one process or half of it in each of two."""
    states = {}
    for name in ("VQ, running means", "ResidualVQ, several grids"):
        quantizer = build(name).train()
        z = latents()
        quantizer(z if rank is None else z[rank:rank + 1])
        states |= {f"{name} {key}": value for key, value in quantizer.state_dict().items()}
    return states


def test_running_means_are_those_of_all_processes(tmp_path):
    want, parts = one_batch(None), on_two_ranks(one_batch, tmp_path / "ranks")
    for part in parts:
        torch.testing.assert_close(part, want)


# ---- docs/quantizers.md

SNIPPETS = [yaml.safe_load(block) for block in blocks(PAGE, "yaml")]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet["quantizer_config"]["target"][26:])
def test_snippets_of_the_page_train(snippet):
    params = {"ddconfig": DDCONFIG, "lossconfig": LOSS} | snippet
    model = instantiate_from_config({"target": "taming.models.vqgan.VQModel", "params": params})
    assert isinstance(model.quantize, Quantizer)
    rec, loss = model(torch.rand(1, 3, 16, 24) * 2 - 1)
    (rec.square().mean() + loss).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())
    model.eval()
    codes = model.encode_codes(torch.rand(1, 3, 16, 24) * 2 - 1)
    assert model.decode_codes(codes).shape == (1, 3, 16, 24)


def test_every_quantizer_has_a_snippet():
    def subclasses(kind):
        return {kind, *(found for each in kind.__subclasses__() for found in subclasses(each))}

    shipped = {
        f"{kind.__module__}.{kind.__name__}" for kind in subclasses(Quantizer)
        if kind.__module__.startswith("taming.modules.quantizers.")
    }
    bases = {f"taming.modules.quantizers.{name}" for name in ("base.Quantizer", "stacked.StackedQuantizer")}
    assert {snippet["quantizer_config"]["target"] for snippet in SNIPPETS} == shipped - bases


def residual(**more):
    """A VQGAN with 2^20 codes, which are pairs of 2^10."""
    return {"target": "taming.models.vqgan.VQModel", "params": {
        "ddconfig": DDCONFIG, "lossconfig": LOSS, "n_embed": 2**20, "embed_dim": 8,
        "quantizer_config": {"target": "taming.modules.quantizers.residual.ResidualVQ", "params": {
            "codebook_size": 2**10, "dim": 8, "num_quantizers": 2, "combined": True}},
    } | more}


def test_no_other_codebook_is_built_beside_a_named_quantizer():
    with PeakBytes() as memory:
        model = instantiate_from_config(residual())
    assert model.codebook_size == 2**20
    assert memory.peak < 2**20 * 8 * 4  # bytes of a table of all codes


@pytest.mark.parametrize("more", [{"revive_after": 10}, {"remap": "used.npy"}])
def test_options_of_the_own_quantizer_are_not_ignored(more):
    with pytest.raises(ValueError, match=f"{next(iter(more))}: .* quantizer_config: leave it out, or set"):
        instantiate_from_config(residual(**more))
