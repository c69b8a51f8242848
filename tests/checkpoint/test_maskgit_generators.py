"""Published masked generators: known by names and shapes, and loaded from the file alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from taming.checkpoint import load_model
from taming.checkpoint.families import identify
from taming.config import instantiate_from_config
from taming.modules.priors.maskbit import MaskBit
from taming.modules.priors.maskgit import MaskGIT, UViTMaskGIT

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = {
    "l32": (MaskGIT, 32, dict(n_layer=24, n_embd=768, n_inner=3072)),
    "s128": (UViTMaskGIT, 128, dict(n_layer=21, n_embd=1024, n_inner=4096)),
}


def built(state):
    """The model of a state dict, on the meta device."""
    published = identify(state)
    with torch.device("meta"):
        return published, instantiate_from_config(published.model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_titok(name):
    shapes = json.loads((GOLDEN / f"generator_titok_{name}_layout.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    cls, count, sizes = LAYOUTS[name]
    published, model = built(state)
    assert type(model) is cls
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert published.state.keys() == state.keys()
    params = published.model["params"]
    assert sizes.items() <= params.items() and params["block_size"] == count
    assert (params["vocab_size"], params["condition_vocab_size"], params["n_head"]) == (4096, 1001, 16)
    assert model.certainty == "logit"


@pytest.mark.parametrize(
    ("bits", "groups", "pre_norm"), [(14, 2, False), (10, 2, True), (18, 2, False), (12, 1, False)]
)
def test_generators_of_maskbit(bits, groups, pre_norm):
    """Names as in the public code: what this class builds, and a buffer that it does not need."""
    with torch.device("meta"):
        first = MaskBit(2**bits, 1001, 256, groups, n_layer=2, n_embd=64, pre_norm=pre_norm)
    state = {**first.state_dict(), "bits_to_indices": torch.empty(bits // groups, device="meta")}
    names = {
        "class_emb.weight", "input_proj.weight", "input_proj.bias", "pos_emb", "first_layer.0.weight",
        "transformer.layers.1.0.mha.in_proj_weight", "transformer.layers.1.0.mha.out_proj.bias",
        "transformer.layers.1.0.norm.weight", "transformer.layers.1.1.net.0.weight",
        "transformer.layers.1.1.net.2.bias", "transformer.layers.1.1.norm.bias", "last_layer.0.weight",
        "last_layer.2.weight", "prediction_layer.weight", "prediction_layer.bias",
    }
    assert names < state.keys()
    published, model = built(state)
    assert type(model) is MaskBit and published.family.name == "MaskBit generator"
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in published.state.items()
    }
    assert (model.vocab_size, model.groups, model.pre_norm) == (2**bits, groups, pre_norm)


def test_what_is_no_maskbit_says_so():
    with torch.device("meta"):
        state = MaskBit(2**6, 5, 16, 2, n_layer=1, n_embd=16).state_dict()
    state["prediction_layer.weight"] = torch.empty(17, 16)
    with pytest.raises(ValueError, match="MaskBit generator of 6 bits does not predict 17 values"):
        _ = identify(state).model


@pytest.mark.parametrize("name", ["imagebert", "uvitbert"])
@torch.no_grad()
def test_a_file_is_all_that_is_needed(name, tmp_path):
    tensors = load_file(GOLDEN / f"maskgit_{name}.safetensors")
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    extra = {"model.embeddings.position_ids": torch.arange(17)[None]} if name == "imagebert" else {}
    save_file({**state, **extra}, tmp_path / "generator.safetensors")
    model, config, step = load_model(tmp_path / "generator.safetensors")
    assert step == 0 and not model.training and config.model.params.n_head == 16
    config.model.params.n_head = 4  # so small a model has fewer
    model = load_model(tmp_path / "generator.safetensors", config=config)[0]
    masked = (tensors["in/masked"] == model.vocab_size)[..., None]
    logits = model.part_logits(tensors["in/idx"][..., None], masked, tensors["in/cond"][:, None])[:, :, 0]
    torch.testing.assert_close(logits, tensors["out/logits"], rtol=1e-5, atol=1e-5)
