"""Published convolutional tokenizers load from their file alone: the same codes and images as there."""

import math
import re

import pytest
import torch
from torch import Tensor

from taming.checkpoint import load_model
from taming.checkpoint.families import identify
from taming.config import instantiate_from_config, models_only
from taming.models.autoencoder_kl import AutoencoderKL
from taming.models.dvae import DVAE
from taming.models.movq import MOVQ
from taming.models.tokenizer import Tokenizer
from taming.models.vqgan import GumbelVQ, VQModel
from taming.models.vqvae2 import VQVAE2
from tests.checkpoint.published import LAYOUTS, golden, meta, pack, to_flax, with_averages

TOLERANCE = 2e-4  # of the golden data, relative to the largest value or 1


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)


def check_codes_and_images(model, inputs, outputs, unit=False, key="") -> None:
    """Compare codes and images with a golden case, whose pixels are in [0, 1] if `unit`."""
    to_ours, to_theirs = (lambda x: 2 * x - 1, lambda x: (x + 1) / 2) if unit else (lambda x: x, lambda x: x)
    x = to_ours(inputs["x"])
    codes = model.encode_codes(x)
    assert codes.dtype == torch.int64 and codes.shape == (len(x), *model.code_shape(*x.shape[2:]))
    assert torch.equal(codes.flatten(), outputs[f"{key}indices"].flatten())
    assert_close(model.encode_to_prequant(x), outputs["prequant"])
    assert_close(to_theirs(model.decode_codes(codes)), outputs[f"{key}decoded"])
    for name in (f"{key}decode_code", "decode_codes"):
        if name in outputs:
            assert_close(to_theirs(model.decode_codes(inputs["codes"])), outputs[name])


CASES = {  # case: name of the file, its content, class, whether pixels are in [0, 1]
    "ldm_vq": ("model.ckpt", lambda state: {"state_dict": state, "global_step": 3}, VQModel, False),
    "movq": ("movq_final.ckpt", dict, MOVQ, False),
    "diffusers_vqmodel_amused": ("diffusion_pytorch_model.bin", dict, VQModel, True),
    "diffusers_vqmodel_movq": ("diffusion_pytorch_model.bin", dict, MOVQ, False),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden_cases_from_the_file_alone(tmp_path, case):
    name, container, cls, unit = CASES[case]
    state, inputs, outputs = golden(case)
    torch.save(container(state), tmp_path / name)
    model, config, _ = load_model(tmp_path / name)
    assert type(model).__name__ == config.model.target.rsplit(".", 1)[1] and isinstance(model, cls)
    check_codes_and_images(model, inputs, outputs, unit)
    exported = type(model).from_pretrained(model.save_pretrained(tmp_path / "export"))
    assert torch.equal(exported.encode_codes(inputs["x"]), model.encode_codes(inputs["x"]))
    assert load_model(tmp_path / "export")[0].pixel_range == model.pixel_range


def llamagen():
    """The state dict as published, with the codes that its last batches used."""
    state, inputs, outputs = golden("llamagen_vq")
    return state | {"quantize.codebook_used": torch.zeros(65536)}, inputs, outputs


@torch.no_grad()
@pytest.mark.parametrize("key, prefix, resolution", [
    ("model", "", 256), ("ema", "", 256), (None, "gen_vision_model.", 384),
])
def test_llamagen_and_janus(tmp_path, key, prefix, resolution):
    state, inputs, outputs = llamagen()
    state = {prefix + name: value for name, value in state.items()}
    others = {"language_model.norm.weight": torch.ones(3)} if prefix else {}
    content = {key: state, "steps": 7, "optimizer": {"state": {}}} if key else state | others
    if key == "ema":
        content["model"] = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save(content, tmp_path / "vq_ds16_c2i.pt")
    model, config, _ = load_model(tmp_path / "vq_ds16_c2i.pt")
    assert config.model.params.ddconfig.resolution == resolution
    check_codes_and_images(model, inputs, outputs, key="l2_true.")
    exported = VQModel.from_pretrained(model.save_pretrained(tmp_path / "export"))
    assert torch.equal(exported.encode_codes(inputs["x"]), model.encode_codes(inputs["x"]))
    config.model.params.quantizer_config.params.l2_normalize = False  # the user's config wins
    model, _, _ = load_model(tmp_path / "vq_ds16_c2i.pt", config=config)
    check_codes_and_images(model, inputs, outputs, key="l2_false.")


@torch.no_grad()
def test_janus_of_transformers(tmp_path):
    """The names are ours there, but levels of the decoder begin at the lowest resolution."""
    state, inputs, outputs = llamagen()
    ours = identify(state).state
    turned = {
        "model.vqmodel." + re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up.{4 - int(m[1])}", key): value
        for key, value in ours.items()
    }
    torch.save(turned, tmp_path / "pytorch_model.bin")
    model, _, _ = load_model(tmp_path)
    check_codes_and_images(model, inputs, outputs, key="l2_true.")


@torch.no_grad()
def test_ibq(tmp_path):
    """As published, with running averages, which are what is used."""
    state, inputs, outputs = golden("ibq_tokenizer")
    content = with_averages(state) | {"loss.discriminator.main.0.weight": torch.ones(8, 3, 4, 4)}
    torch.save({"state_dict": content}, tmp_path / "imagenet256_64.ckpt")
    model, _, _ = load_model(tmp_path / "imagenet256_64.ckpt")
    check_codes_and_images(model, inputs, outputs)
    assert_close(model.codes_to_latents(inputs["codes"]), outputs["codebook_entry"])
    exported = VQModel.from_pretrained(model.save_pretrained(tmp_path / "export"))
    assert torch.equal(exported.encode_codes(inputs["x"]), outputs["indices"])


@torch.no_grad()
def test_a_code_of_latent_diffusion_stands_for_its_entry():
    state, inputs, outputs = golden("ldm_vq")
    with models_only():
        model = instantiate_from_config(identify(state).model).eval()
    model.load_state_dict(identify(state).state)
    assert_close(model.codes_to_latents(inputs["codes"]), outputs["codebook_entry"])
    assert_close(model.decode(outputs["prequant"]), outputs["decoded_not_quantised"])


# ---- layouts of published files, at full size


def built(state):
    """Build the model of a state dict on the meta device, check its names and shapes, and return it."""
    published = identify(state)
    with models_only(), torch.device("meta"):
        model = instantiate_from_config(published.model)
    ours = {name: value.shape for name, value in published.state.items()}
    assert ours == {name: value.shape for name, value in model.state_dict().items()}
    return model, published


@pytest.mark.parametrize("layout, family, cls, sizes", [
    ("vqgan_imagenet_f16_1024", "taming VQGAN", VQModel, (1024, 256, 16)),
    ("vqgan_gumbel_f8", "taming GumbelVQ", GumbelVQ, (8192, 256, 8)),
    ("llamagen_vq_ds16_c2i", "LlamaGen VQ", VQModel, (16384, 8, 16)),
    ("ibq_tokenizer_1024", "IBQ", VQModel, (1024, 256, 16)),
    ("ibq_tokenizer_16384", "IBQ", VQModel, (16384, 256, 16)),
    ("vq_vae_2_default", "VQ-VAE-2 (rosinality)", VQVAE2, (512, 64, 8)),
])
def test_layouts(layout, family, cls, sizes):
    model, published = built(meta(LAYOUTS[layout]))
    assert published.family.name == family and type(model) is cls
    params = published.model["params"]
    assert (params["n_embed"], params["embed_dim"], model.factor) == sizes


@pytest.mark.parametrize("n_embed, ch, values", [
    (8192, 128, None), (262144, 128, None), (131072, 256, 455.3),
])
def test_ibq_of_other_sizes_and_of_emu3_5(n_embed, ch, values):
    changes = {"ch": ch, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4, "z_channels": 256,
               "attn_resolutions": [16]}
    state = on_meta(
        "taming.models.vqgan.VQModel", ddconfig=DDCONFIG | changes, lossconfig=NO_LOSS, n_embed=n_embed,
        embed_dim=256,
    )
    model, published = built(state)
    assert published.family.name == "IBQ" and model.codebook_size == n_embed
    if values:
        assert len(state) == 543 and round(sum(v.numel() for v in state.values()) / 1e6, 1) == values


def test_the_layout_of_transgan():
    model, published = built(meta(LAYOUTS["transgan_cifar_generator"]))
    assert published.family.name == "TransGAN generator"
    assert (model.image_size, model.latent_dim, model.dims) == ((32, 32), 1024, [1024, 256, 64])


DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0,
    "ch": 128, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [], "attn_type": "vanilla",
    "resamp_with_conv": True, "num_res_blocks": 2,
}
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}


def on_meta(target, **params):
    with torch.device("meta"):
        return instantiate_from_config({"target": target, "params": params}).state_dict()


def vqgan_state():
    return on_meta(
        "taming.models.vqgan.VQModel", ddconfig=DDCONFIG, lossconfig=NO_LOSS, n_embed=8, embed_dim=4
    )


@pytest.mark.parametrize("n_embed, z, changes, target", [
    # the tokenizers of latent diffusion: vq-f4, vq-f4-noattn, vq-f8, vq-f16, and Chameleon's
    (8192, 3, {"ch_mult": [1, 2, 4]}, "taming.models.latent_diffusion.VQModel"),
    (8192, 3, {"ch_mult": [1, 2, 4], "attn_type": "none"}, "taming.models.latent_diffusion.VQModel"),
    (16384, 4, {"attn_resolutions": [32]}, "taming.models.latent_diffusion.VQModel"),
    (16384, 8, {"ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]},
     "taming.models.latent_diffusion.VQModel"),
    (8192, 256, {"ch_mult": [1, 1, 2, 2, 4], "resolution": 512}, "taming.models.vqgan.VQModel"),
])
def test_sizes_follow_from_shapes(n_embed, z, changes, target):
    ddconfig = DDCONFIG | {"z_channels": z} | changes
    params = {"ddconfig": ddconfig, "lossconfig": NO_LOSS, "n_embed": n_embed, "embed_dim": z}
    state = on_meta("taming.models.vqgan.VQModel", **params)
    model, published = built(state)
    assert published.model == {"target": target, "params": params}
    if z == 256:
        assert published.family.name == "Chameleon VQGAN"
        assert len(state) == 293 and sum(v.numel() for v in state.values()) // 100_000 == 687


@pytest.mark.parametrize("of_decoder", [
    {"ch_mult": [1, 1, 2, 3]}, {"num_res_blocks": 1}, {"attn_resolutions": [32]},
    {"ch": 96, "ch_mult": [1, 2, 2, 3]},
])
def test_a_decoder_of_other_sizes_than_the_encoder(of_decoder):
    decoder = {"target": "taming.modules.diffusionmodules.model.Decoder", "params": of_decoder}
    params = {"ddconfig": DDCONFIG, "lossconfig": NO_LOSS, "n_embed": 9, "embed_dim": 4}
    params["decoder_config"] = decoder
    _, published = built(on_meta("taming.models.vqgan.VQModel", **params))
    assert published.model["params"] == params


@pytest.mark.parametrize("target, n_embed, embed_dim, z, changes, tensors, values", [
    ("taming.models.vqgan.VQModel", 8192, 64, 64, {  # aMUSEd
        "ch_mult": [1, 2, 2, 4, 6], "attn_type": "none"}, 277, 146.2),
    ("taming.models.movq.MOVQ", 16384, 4, 4, {"attn_resolutions": [32]}, 431, 67.8),
])
def test_our_networks_have_the_published_sizes(target, n_embed, embed_dim, z, changes, tensors, values):
    ddconfig = DDCONFIG | {"z_channels": z} | changes
    state = on_meta(
        target, ddconfig=ddconfig, lossconfig=NO_LOSS, n_embed=n_embed, embed_dim=embed_dim
    )
    assert len(state) == tensors
    assert round(sum(value.numel() for value in state.values()) / 1e6, 1) == values


def kl_state(**changes):
    ddconfig = DDCONFIG | {"double_z": True} | changes
    return on_meta(
        "taming.models.autoencoder_kl.AutoencoderKL", ddconfig=ddconfig, lossconfig=NO_LOSS,
        embed_dim=ddconfig["z_channels"],
    ), ddconfig


@pytest.mark.parametrize("changes", [
    {"ch_mult": [1, 2, 4], "z_channels": 3}, {}, {"ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16],
                                                 "z_channels": 16},
])
def test_kl_autoencoders_alone_and_inside_stable_diffusion(changes):
    state, ddconfig = kl_state(**changes)
    model, published = built(state)
    assert type(model) is AutoencoderKL and published.model["params"]["ddconfig"] == ddconfig
    whole = {f"first_stage_model.{key}": value for key, value in state.items()}
    others = {"model.diffusion_model.time_embed.0.weight": torch.empty(4, 4, device="meta"),
              "betas": torch.empty(9, device="meta"), "model_ema.decay": torch.empty((), device="meta")}
    _, inside = built(others | whole)
    assert inside.part == "first_stage_model." and inside.model == published.model


def to_diffusers(state, old_attention=False):
    """Give an autoencoder the names that diffusers has for its parts."""
    words = {"norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut"}
    names = ("query", "key", "value", "proj_attn") if old_attention else ("to_q", "to_k", "to_v", "to_out.0")
    attention = dict(zip(("q", "k", "v", "proj_out"), names, strict=True)) | {"norm": "group_norm"}
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up."))
    found = {}
    for key, value in state.items():
        parts = key.split(".")
        new = [words.get(part, part) for part in parts]
        if parts[1:2] == ["mid"]:
            new[1:3] = ["mid_block", {"block_1": "resnets.0", "block_2": "resnets.1"}.get(
                parts[2], "attentions.0")]
        elif parts[1:2] in (["down"], ["up"]):
            level = parts[2] if parts[1] == "down" else str(levels - 1 - int(parts[2]))
            new[1:4] = [f"{parts[1]}_blocks", level, {"block": "resnets", "attn": "attentions"}.get(
                parts[3], f"{parts[3]}rs.0")]
        if "attn" in key:
            new[-2] = attention[parts[-2]]
            value = value[:, :, 0, 0] if value.ndim == 4 else value
        found[".".join(new)] = value
    return found


@pytest.mark.parametrize("old", [False, True])
def test_kl_autoencoders_of_diffusers(old):
    state, ddconfig = kl_state()
    renamed = to_diffusers(state, old)
    assert "decoder.up_blocks.0.upsamplers.0.conv.weight" in renamed and renamed.keys() != state.keys()
    model, published = built(renamed)
    assert type(model) is AutoencoderKL and published.model["params"]["ddconfig"] == ddconfig


@torch.no_grad()
def test_an_autoencoder_of_diffusers_without_convolutions_around_its_latents():
    """As of Stable Diffusion 3: the identity stands in their place."""
    torch.manual_seed(0)
    ddconfig = DDCONFIG | {"double_z": True, "ch": 32, "ch_mult": [1, 1]}
    whole = AutoencoderKL(ddconfig, NO_LOSS, 4).eval()
    state = {key: value for key, value in whole.state_dict().items() if "quant_conv" not in key}
    published = identify(to_diffusers(state))
    whole.load_state_dict(published.state)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(whole.quant_conv(whole.encoder(x)), whole.encoder(x))
    assert torch.equal(whole.post_quant_conv(x[:, :1].expand(1, 4, 8, 8)), x[:, :1].expand(1, 4, 8, 8))


# ---- other forms of files


@torch.no_grad()
def test_flax_files_of_dalle_mini(tmp_path):
    """A VQGAN with the weights of a golden case, as vqgan-jax writes it: other layout, pixels in [0, 1]."""
    state, inputs, outputs = golden("ldm_vq")
    (tmp_path / "flax_model.msgpack").write_bytes(pack(to_flax(state)))
    (tmp_path / "config.json").write_text('{"model_type": "vqgan"}')
    for place in (tmp_path, tmp_path / "flax_model.msgpack"):
        model, config, _ = load_model(place)
        assert config.model.params.ddconfig.pixel_range == [0.0, 1.0]
        x = inputs["x"] * 2 - 1
        assert torch.equal(model.encode_codes(x), outputs["indices"].view(2, 4, 4))
        assert_close((model.decode_codes(outputs["indices"].view(2, 4, 4)) + 1) / 2, outputs["decoded"])


@torch.no_grad()
def test_dall_e_in_one_file_and_its_halves(tmp_path):
    state, inputs, outputs = golden("dalle_dvae")
    torch.save(state, tmp_path / "both.pt")
    model, _, _ = load_model(tmp_path / "both.pt")
    assert type(model) is DVAE
    assert torch.equal(model.encode_codes(inputs["x"] * 2 - 1), outputs["indices"])
    for half in ("encoder", "decoder"):
        part = {key.removeprefix(f"{half}."): v for key, v in state.items() if key.startswith(half)}
        torch.save(part, tmp_path / f"{half}.pkl")
        with pytest.raises(ValueError, match=rf"{half}\.pkl: it is the {half} .* give both, .*from_dall_e"):
            load_model(tmp_path / f"{half}.pkl")
    assert identify(meta(LAYOUTS["dall_e_encoder"])).family.name == "half of DALL-E's dVAE"


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_vq_vae_2(tmp_path, wrapper):
    state, inputs, outputs = golden("vqvae2")
    torch.save({wrapper + key: value for key, value in state.items()}, tmp_path / "vqvae_560.pt")
    model, _, _ = load_model(tmp_path / "vqvae_560.pt")
    top, bottom = model.encode_codes(inputs["x"])
    assert torch.equal(top, outputs["id_t"]) and torch.equal(bottom, outputs["id_b"])
    decoded = model.decode_codes([inputs["code_t"], inputs["code_b"]])
    assert_close(decoded, outputs["decode_code"])


@torch.no_grad()
def test_the_generator_of_transgan(tmp_path):
    state, inputs, outputs = golden("transgan_generator")
    content = {"gen_state_dict": state, "dis_state_dict": state, "avg_gen_state_dict": state, "epoch": 3}
    torch.save(content, tmp_path / "cifar_checkpoint.pth")
    model, _, _ = load_model(tmp_path / "cifar_checkpoint.pth")
    assert_close(model(inputs["z"]), outputs["image_epoch_60"])


def test_averages_replace_weights_of_latent_diffusion(tmp_path):
    state, inputs, outputs = golden("ldm_vq")
    torch.save({"state_dict": with_averages(state)}, tmp_path / "model.ckpt")
    model, _, _ = load_model(tmp_path / "model.ckpt")
    assert torch.equal(model.encode_codes(inputs["x"]).flatten(), outputs["indices"].flatten())


# ---- what cannot be loaded


def test_tokenizers_of_video_and_halves_say_why():
    video = meta({"quant_conv.conv.weight": [4, 4, 3, 1, 1], "encoder.conv_in.weight": [256, 3, 3, 3]})
    with pytest.raises(ValueError, match="tokenizer of video.*Emu3.5's"):
        identify(video).model  # noqa: B018
    state = vqgan_state()
    half = {f"model.vqmodel.{key}": v for key, v in state.items() if not key.startswith("decoder.")}
    with pytest.raises(ValueError, match="the encoder half of a VQGAN.*vqgan.ckpt"):
        identify(half).model  # noqa: B018


@pytest.mark.parametrize("change, message", [
    ({"encoder.conv_out.weight": [5, 512, 3, 3]}, "gives 5 channels, but the decoder takes 4"),
    ({"encoder.down.1.block.0.conv1.weight": [100, 128, 3, 3]},
     r"\[128, 128, 100, 256, 512\].*multiples of 32"),
    ({"encoder.down.1.block.7.conv1.weight": [1, 1, 1, 1]}, r"numbers in names .* are \[0, 1, 7\]"),
    ({"encoder.down.2.block.0.conv1.weight": []}, "its names are those of .* do not fit together"),
])
def test_names_of_a_family_with_shapes_of_none(change, message):
    state = dict(vqgan_state()) | meta(change)
    with pytest.raises(ValueError, match=message):
        identify(state).model  # noqa: B018


def test_a_tokenizer_has_the_contract():
    model, _ = built(meta(LAYOUTS["vqgan_imagenet_f16_1024"]))
    assert isinstance(model, Tokenizer)
    assert model.code_shape(256, 384) == (16, 24) and model.num_codes(256, 256) == math.prod((16, 16))
