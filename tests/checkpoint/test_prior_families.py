"""Published priors: known by names and shapes alone, loaded alone, and as the prior of a model."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from taming.checkpoint import load_model
from taming.checkpoint.families import identify
from taming.checkpoint.save import save_exported
from taming.cli import command
from taming.config import instantiate_from_config
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.priors.llama import Llama
from taming.modules.priors.rar import RAR
from taming.sampling import SamplingOptions

convert = command("convert")
GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = json.loads(gzip.decompress((GOLDEN / "published_priors.json.gz").read_bytes()))
SIZES = {  # blocks, heads, channels, side of the grid, values: from the publications
    "llamagen_c2i_B_256": (12, 12, 768, 16, 110_888_448),
    "llamagen_c2i_XL_384": (36, 20, 1280, 24, 774_699_520),
    "llamagen_c2i_3B_384": (24, 32, 3200, 24, 3_096_659_200),
    "rar_b": (24, 16, 768, 16, 260_923_648),
    "rar_xl": (32, 16, 1280, 16, 955_425_024),
}


@pytest.mark.parametrize("name", SIZES)
def test_layouts_of_published_files(name):
    state = {key: torch.empty(shape, device="meta") for key, shape in LAYOUTS[name].items()}
    assert sum(value.numel() for value in state.values()) == SIZES[name][-1]
    published = identify(state)
    params = published.model["params"]
    side = SIZES[name][3]
    assert (params["n_layer"], params["n_head"], params["n_embd"]) == SIZES[name][:3]
    assert params["layout"] == [1, [side, side]] and params["condition_vocab_size"] == 1001
    assert params["vocab_size"] == (1024 if "rar" in name else 16384)
    with torch.device("meta"):
        model = instantiate_from_config(published.model)
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert ours == {key: value.shape for key, value in published.state.items()}
    assert isinstance(model, RAR if "rar" in name else Llama)


def llamagen(channels=64, n_kv_head=None):
    """Weights by LlamaGen's names, of a width from which the heads follow."""
    torch.manual_seed(0)
    model = Llama(
        12, [1, [16, 16]], 8, n_layer=2, n_embd=channels, n_kv_head=n_kv_head, rotate_condition=False
    )
    return model.eval(), {key: value.detach().clone() for key, value in model.state_dict().items()}


def rar(codes=64, spare=True):
    """Weights by RAR's names, with the position embeddings that it does not use."""
    torch.manual_seed(0)
    side = int(codes**0.5)
    model = RAR(12, [1, [side, side]], 8, n_layer=2, n_head=2, n_embd=16, ffn_dim=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    more = {"pos_embed": 1024, "target_aware_pos_embed": 1024, "timesteps_embeddings": 100} if spare else {}
    for name, count in more.items():
        state[name] = torch.cat((state[name][:, :codes], torch.randn(1, count, 16)), 1)
        state[name][:, : codes + 2] = model.get_parameter(name)
    return model.eval(), state


@pytest.mark.parametrize("make", [
    llamagen, lambda: llamagen(128, n_kv_head=1), rar, lambda: rar(36), lambda: rar(spare=False),
])
@torch.no_grad()
def test_a_file_alone_is_the_network(make, tmp_path):
    model, state = make()
    torch.save(state, tmp_path / "prior.bin")
    loaded, config, _ = load_model(tmp_path / "prior.bin")
    assert type(loaded) is type(model) and not loaded.training
    codes = torch.randint(12, (2, model.height * model.width))
    condition = torch.tensor([[3], [7]])
    torch.testing.assert_close(loaded.log_prob(codes, condition), model.log_prob(codes, condition))
    assert config.model.params.n_layer == 2


def golden(case):
    """Return the weights of a golden case."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}


def test_heads_that_are_not_in_the_file_are_given(tmp_path):
    save_file(golden("llamagen_gpt"), tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match="n_head is missing; n_embd: 48 is not a multiple of 64: give n_"):
        load_model(tmp_path / "prior.safetensors")
    config = identify(golden("llamagen_gpt")).model
    config["params"] |= {"n_head": 4, "layout": [1, [4, 4]]}
    model, _, _ = load_model(tmp_path / "prior.safetensors", Llama, config={"model": config})
    assert model.head_dim == 12 and model.block_size == 16


def test_a_prior_over_text_is_named(tmp_path):
    _, state = llamagen()
    del state["cls_embedding.embedding_table.weight"]
    state["cls_embedding.cap_proj.fc1.weight"] = torch.zeros(64, 2048)
    torch.save(state, tmp_path / "t2i.pt")
    with pytest.raises(ValueError, match="conditioned on text, by features of T5.*take one .* classes"):
        load_model(tmp_path / "t2i.pt")


DDCONFIG = dict(
    double_z=False, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4,
)
FIRST = {"target": "taming.models.vqgan.VQModel", "params": dict(
    ddconfig=DDCONFIG, n_embed=12, embed_dim=4, lossconfig={"target": "taming.modules.losses.DummyLoss"})}

CLASSES = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}}


def whole(path, state, **more):
    """A model over codes whose prior begins with the weights of a file."""
    config = identify(state).model
    del config["params"]["layout"]  # that of the first stage
    config["params"] |= {"ckpt_path": str(path)} | more
    return Net2NetTransformer(config, FIRST, CLASSES, cond_stage_key="class_label", null_token=7)


@pytest.mark.parametrize("make", [llamagen, rar])
@torch.no_grad()
def test_a_file_is_the_prior_of_a_model(make, tmp_path):
    alone, state = make()
    torch.save(state, tmp_path / "prior.bin")
    model = whole(tmp_path / "prior.bin", state).eval()
    prior = model.transformer
    assert (prior.height, prior.width) == (8, 8)
    c = model.encode_conditions(torch.tensor([1, 5]))
    options = SamplingOptions(greedy=True, guidance=2.0)
    codes = model.sample_codes(c, options)
    assert codes.shape == (2, 8, 8)
    if make is rar:
        null = torch.full((2, 1), 7)
        same = alone.sample(torch.tensor([[1], [5]]), (8, 8), options, null_condition=null)
        assert torch.equal(codes.flatten(1), same)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")  # so is a model's own checkpoint
    again = whole(tmp_path / "last.ckpt", state)
    for key, value in prior.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[key])


def test_weights_that_do_not_fit_are_named(tmp_path):
    _, state = rar()
    torch.save(state, tmp_path / "prior.bin")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.bin"):
        whole(tmp_path / "gone.bin", state)
    with pytest.raises(ValueError, match=r"prior\.bin(.|\n)*blocks\.2\.|blocks\.2\.(.|\n)*prior\.bin"):
        whole(tmp_path / "prior.bin", state, n_layer=3)
    for codes in (16, 8):
        first = {**FIRST, "params": FIRST["params"] | {"n_embed": codes}}
        message = f"vocab_size: 12 of .*, but the first stage has {codes} codes, .* to {codes}, or"
        with pytest.raises(ValueError, match=message):
            Net2NetTransformer(identify(state).model, first, CLASSES, cond_stage_key="class_label")


def tokenizer(folder, codes=12):
    """One of 16 pixels, with attention where it has 8x8 of them."""
    params = FIRST["params"] | {"n_embed": codes, "ddconfig": DDCONFIG | {"attn_resolutions": [8]}}
    section = {**FIRST, "params": params}
    return save_exported(instantiate_from_config(section), {"model": section}, folder)


@pytest.mark.parametrize("make", [llamagen, rar])
def test_prior_and_tokenizer_become_a_model(make, tmp_path, capsys):
    """Of any size where positions are not learned: LlamaGen's file does not say how large its grid was."""
    alone, state = make()
    torch.save(state, tmp_path / "prior.bin")
    first = tokenizer(tmp_path / "vq")
    words, height, width = ([], 8, 8) if make is rar else (["--size", "24x20"], 12, 10)
    out = tmp_path / "whole"
    assert convert([str(tmp_path / "prior.bin"), str(out), "--first-stage", str(first), *words]) == 0
    assert "written" in capsys.readouterr().out
    model, config, _ = load_model(out, Net2NetTransformer)
    assert model.null_token == 7 and model.cond_stages[0].vocab_size == 7
    assert model.latent_shape() == (height, width)
    loaded = model.transformer.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in alone.state_dict().items())
    c = model.encode_conditions(torch.tensor([2]))
    image = model.generate(c, SamplingOptions(guidance=3.0, guidance_schedule="cosine", seed=1))
    assert image.shape == (1, 3, 2 * height, 2 * width) and "ckpt_path" not in str(config)
    trained, _, _ = load_model(first)
    assert sum("attn" in name for name, _ in trained.named_parameters()) > 20
    assert model.first_stage_model.state_dict().keys() == trained.state_dict().keys()


def test_the_config_that_is_given_is_the_priors_own(tmp_path):
    """It says what shapes do not; of a file without it, and over what it would say with it."""
    first = tokenizer(tmp_path / "vq")
    for channels, heads in ((24, 3), (64, 4)):
        torch.manual_seed(0)
        model = Llama(12, [1, [8, 8]], 8, n_layer=1, n_head=heads, n_embd=channels, rotate_condition=False)
        torch.save(model.state_dict(), tmp_path / "prior.pt")
        (tmp_path / "heads.yaml").write_text(f"model: {{params: {{n_head: {heads}, layout: [1, [8, 8]]}}}}")
        words = ["--first-stage", str(first), "--config", str(tmp_path / "heads.yaml")]
        out = tmp_path / str(channels)
        assert convert([str(tmp_path / "prior.pt"), str(out), *words]) == 0
        prior = load_model(out, Net2NetTransformer)[0].transformer
        assert prior.head_dim == channels // heads
        codes, condition = torch.randint(12, (2, 64)), torch.tensor([[3], [7]])
        with torch.no_grad():
            same = model.eval().log_prob(codes, condition)
            torch.testing.assert_close(prior.log_prob(codes, condition), same)


@pytest.mark.parametrize("name", ["sample", "evaluate"])
@pytest.mark.parametrize(("make", "message"), [
    (lambda: rar()[1], "RAR: a prior alone, .*--first-stage TOKENIZER"),
    (lambda: llamagen()[1], "Llama: a prior alone, .*--first-stage TOKENIZER"),
    (lambda: golden("transgan_generator"), "TransGANGenerator: give a run"),
])
def test_commands_say_what_a_network_alone_needs(name, make, message, tmp_path, capsys):
    torch.save(make(), tmp_path / "network.pt")
    subject = ["-r", str(tmp_path / "network.pt")] if name == "sample" else [str(tmp_path / "network.pt")]
    assert command(name)(subject) == 1
    assert re.search(message, capsys.readouterr().err)


def test_what_does_not_combine_is_said(tmp_path, capsys):
    _, state = rar()
    torch.save(state, tmp_path / "prior.bin")
    prior, first, other = tmp_path / "prior.bin", tokenizer(tmp_path / "vq"), tokenizer(tmp_path / "vq9", 9)
    for words, message in (
        ([prior, "--first-stage", other], "vocab_size: 12 of the transformer, but the first stage has 9"),
        ([prior, "--first-stage", prior], "is a RAR, not a tokenizer"),
        ([first, "--first-stage", first], "is a VQModel, not a prior"),
        ([prior, "--first-stage", first, "--size", "32x32"], "pos_embed"),
        ([prior, "--first-stage", first, "--part", "transformer"], "writes a whole model to a folder"),
        ([prior, "--size", "32x32"], "give --first-stage, or leave it out"),
        ([prior, "--first-stage", first, "--no-ema"], "leave it out"),
    ):
        assert convert([str(words[0]), str(tmp_path / "out"), *map(str, words[1:])]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
