"""Published tokenizers of MaskGIT, MaskBit, Open-MAGVIT2, TiTok and VAR: golden values, and names and shapes.

Golden values and layouts are those of bytedance/1d-tokenizer, commit 942a96f, and of TencentARC/SEED-Voken,
commit b9a17ea.
"""

import gzip
import json

import pytest
import torch
from safetensors.torch import save_file

from taming.checkpoint import load_model
from taming.checkpoint.families import identify
from taming.config import instantiate_from_config
from taming.models.titok import TiTok
from taming.models.vqgan import VQModel
from taming.modules.discriminator.model import NLayerDiscriminator
from tests.test_golden import GOLDEN, read

LAYOUTS = json.loads(gzip.decompress((GOLDEN / "layouts_mask.json.gz").read_bytes()))
NAMES = {
    "maskgit_vqgan_imagenet_f16_256": "MaskGIT VQGAN",
    "open_magvit2_imagenet_256_L": "Open-MAGVIT2 tokenizer",
    "tokenizer_titok_l32": "TiTok tokenizer", "tokenizer_titok_s128": "TiTok tokenizer",
    "tokenizer_titok_bl128_vq8k": "TiTok tokenizer",
}


def close(got, want):
    """Compare to 2e-4, relative to the largest value: float32 in other orders."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4 * max(1.0, want.abs().max().item()))


def unit(images):
    """Images in [-1, 1] in the range that the networks see, [0, 1]."""
    return (images + 1) / 2


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


# ---- golden values


@torch.no_grad()
def test_golden_maskgit_vqgan(tmp_path):
    state, given, want = read("maskgit_vqgan")
    torch.save(state, tmp_path / "maskgit.bin")
    model, _, _ = load_model(tmp_path / "maskgit.bin", VQModel)
    assert model.pixel_range == (0.0, 1.0) and model.code_shape(32, 32) == (8, 8)
    x = given["x"] * 2 - 1
    z = model.encode_to_prequant(x)
    close(z, want["prequant"])
    close(model.quantize(z)[1], want["loss"])
    codes = model.encode_codes(x)
    assert torch.equal(codes.flatten(1), want["indices"])
    close(unit(model.decode_codes(codes)), want["decoded"])
    close(unit(model.decode_code(given["codes"])), want["decode_codes"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["titok_legacy", "titok_rgb"])
def test_golden_titok(name, tmp_path):
    """Tiny twins have heads of 12 channels, and unit length in both kinds: a config says so."""
    state, given, want = read(name)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="heads is missing, the attention heads of the width: 48"):
        load_model(tmp_path / "model.safetensors")
    arguments = {"ddconfig": {"heads": 4}, "quantizer_config": {"params": {"l2_normalize": True}}}
    config = {"model": {"params": arguments}}  # on top of what the shapes tell
    model, found, _ = load_model(tmp_path / "model.safetensors", TiTok, config=config)
    assert found.model.params.ddconfig.num_tokens == 8
    assert model.image_size == (32, 32) and model.code_shape(32, 32) == (1, 8)
    x = given["x"] * 2 - 1
    z = model.encode_to_prequant(x)
    close(z, want["encoder_out"])
    quant, loss, info = model.quantize(z)
    close(quant, want["quant"])
    close(loss, want["quantizer_loss"])
    assert torch.equal(info.indices, want["indices"])
    assert torch.equal(model.encode_codes(x), want["indices"])
    close(unit(model.decode_codes(want["indices"])), want["decoded"])
    close(unit(model.decode_codes(given["tokens"])), want["decode_tokens"])


def test_golden_open_magvit2(tmp_path):
    state, given, want = read("open_magvit2_tokenizer")
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, tmp_path / "imagenet.ckpt")
    model, _, step = load_model(tmp_path / "imagenet.ckpt", VQModel)
    assert step == 7 and model.codebook_size == 1024
    with torch.no_grad():
        z = model.encode_to_prequant(given["x"])
        close(z, want["prequant"])
        codes = model.encode_codes(given["x"])
        assert torch.equal(codes, want["indices"])
        close(model.codes_to_latents(codes), want["quant"])
        close(model.codes_to_latents(given["codes"]), want["codebook_entry"])
        close(model.decode_codes(codes), want["decoded"])
        close(model.decode_codes(given["codes"]), want["decode_codes"])


def test_golden_training_of_open_magvit2(tmp_path):
    """Losses and gradients of one batch, with the weights of the published configuration."""
    state, given, want = read("open_magvit2_tokenizer")
    torch.save({"state_dict": state}, tmp_path / "imagenet.ckpt")
    model, _, _ = load_model(tmp_path / "imagenet.ckpt", VQModel)
    discriminator = NLayerDiscriminator(ndf=8, n_layers=2)
    prefix = "loss.discriminator."
    discriminator.load_state_dict({
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    })
    rec, codebook_loss = model.train()(given["x"])
    close(codebook_loss.detach(), 0.1 * want["train.entropy_aux_loss"] + 0.25 * want["train.commitment"])
    logits = discriminator.train()(rec).flatten(1).mean(1)  # one of each image
    rec_loss, g_loss = (rec - given["x"]).abs().mean(), torch.nn.functional.softplus(-logits).mean()
    close(rec_loss.detach(), want["log_g.reconstruct_loss"])
    loss = rec_loss + codebook_loss + 0.1 * g_loss
    close(loss.detach(), want["train.gen_loss"])
    loss.backward()
    for name in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"):
        got, grad = model.get_parameter(f"{name}.weight").grad, want[f"grad.{name}.weight"]
        torch.testing.assert_close(got, grad, rtol=0, atol=2e-4 * grad.abs().max().item())


@torch.no_grad()
def test_averages_of_open_magvit2_take_the_place_of_weights(tmp_path):
    state, given, want = read("open_magvit2_tokenizer")
    networks = {key: value for key, value in state.items() if not key.startswith("loss.")}
    averages = {f"model_ema.{key.replace('.', '')}": value for key, value in networks.items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    spoiled = {key: value + 1 for key, value in networks.items()}
    torch.save({"state_dict": spoiled | averages | counters}, tmp_path / "imagenet.ckpt")
    model, _, _ = load_model(tmp_path / "imagenet.ckpt", VQModel)
    assert torch.equal(model.encode_codes(given["x"]), want["indices"])
    close(model.decode_codes(given["codes"]), want["decode_codes"])


def test_titok_of_its_first_stage_is_named():
    state, _, _ = read("titok_legacy")
    published = identify({key: value for key, value in state.items() if not key.startswith("pixel_")})
    with pytest.raises(ValueError, match="first stage of its training: .* has pixel_decoder"):
        published.model  # noqa: B018  # a property


# ---- names and shapes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_published_files(layout):
    """The shapes alone give a model with exactly the tensors of the file, but for its loss and averages."""
    state = meta(LAYOUTS[layout]["shapes"])
    published = identify(state)
    assert published.family.name == NAMES[layout]
    with torch.device("meta"):
        model = instantiate_from_config(published.model)
    ours = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in published.state.items()} == ours
    used = [name for name in state if not name.startswith(("loss.", "model_ema."))]
    assert len(ours) == len(used)


def blocks(prefix, count, before, width):
    """Residual blocks without biases in the convolutions, as MaskBit names them."""
    for i in range(count):
        ins = before if i == 0 else width
        yield from [(f"{prefix}.{i}.norm1", [ins], True), (f"{prefix}.{i}.norm2", [width], True)]
        yield f"{prefix}.{i}.conv1", [width, ins, 3, 3], False
        yield f"{prefix}.{i}.conv2", [width, width, 3, 3], False
        if ins != width:
            yield f"{prefix}.{i}.nin_shortcut", [width, width, 1, 1], False


def maskbit(token_size, codebook, lowest_first=True, strided=True, ch=128, mult=(1, 1, 2, 2, 4)):
    """Names and shapes of a MaskBit tokenizer, by its code: markweberdev/maskbit, commit 42f8bb0.

    A `codebook` of None is lookup-free.
    """
    widths, last = [ch * m for m in mult], len(mult) - 1
    parts = [("encoder.conv_in", [ch, 3, 3, 3], False)]
    for i, (before, width) in enumerate(zip([ch, *widths], widths, strict=False)):
        parts += blocks(f"encoder.down.{i}.res_blocks", 2, before, width)
        if strided and i < last:
            parts += [(f"encoder.down.{i}.down_conv", [width, width, 3, 3], True)]
    for part in ("encoder", "decoder"):
        parts += blocks(f"{part}.mid.res_blocks", 2, widths[-1], widths[-1])
    parts += [("encoder.norm_out", [widths[-1]], True),
              ("encoder.conv_out", [token_size, widths[-1], 1, 1], True),
              ("decoder.conv_in", [widths[-1], token_size, 3, 3], True)]
    for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
        prefix = f"decoder.up.{last - i if lowest_first else i}"
        parts += blocks(f"{prefix}.res_blocks", 2, before, width)
        if i > 0:
            parts += [(f"{prefix}.upsample_conv", [width, width, 3, 3], True)]
    parts += [("decoder.norm_out", [ch], True), ("decoder.conv_out", [3, ch, 3, 3], True)]
    shapes = {}
    for name, shape, bias in parts:
        shapes |= {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})
    if codebook:
        return shapes | {"quantize.embedding.weight": [codebook, token_size]}
    bits = {"quantize.bits_to_indices": [token_size], "quantize.codebook": [2**token_size, token_size]}
    return shapes | bits


@pytest.mark.parametrize("lowest_first", [True, False])
@pytest.mark.parametrize(("token_size", "codebook", "tensors", "millions"), [
    (64, 1024, 176, 54.8), (64, 4096, 176, 55.0), (10, None, 177, 54.5), (14, None, 177, 54.8),
    (18, None, 177, 59.3),
])
def test_layouts_of_maskbit(token_size, codebook, tensors, millions, lowest_first):
    shapes = maskbit(token_size, codebook, lowest_first)
    assert len(shapes) == tensors  # as published
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert values / 1e6 == pytest.approx(millions, abs=0.1)
    published = identify(meta(shapes))
    assert published.family.name == "MaskBit tokenizer (VQGAN+, LFQ)"
    with torch.device("meta"):
        model = instantiate_from_config(published.model)
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert {name: list(value.shape) for name, value in published.state.items()} == ours
    assert len(ours) == tensors - (0 if codebook else 2)
    assert model.codebook_size == (codebook or 2**token_size) and model.encoder.factor == 16


@torch.no_grad()
def test_maskbit_and_maskgit_share_networks(tmp_path):
    """MaskGIT's golden values come out of its weights in MaskBit's names, in both orders of the decoder."""
    state, given, want = read("maskgit_vqgan")
    for lowest_first in (True, False):
        renamed = {}
        for name, value in state.items():
            name = name.replace(".mid.", ".mid.res_blocks.").replace(".block.", ".res_blocks.")
            if name.startswith("decoder.up.") and lowest_first:
                head, rest = name.removeprefix("decoder.up.").split(".", 1)
                name = f"decoder.up.{2 - int(head)}.{rest}"
            renamed[name] = value
        torch.save(renamed, tmp_path / "tokenizer.bin")
        model, _, _ = load_model(tmp_path / "tokenizer.bin", VQModel)
        assert torch.equal(model.encode_codes(given["x"] * 2 - 1).flatten(1), want["indices"])
        close(unit(model.decode_code(given["codes"])), want["decode_codes"])


def var(ch=160, mult=(1, 1, 2, 2, 4), codes=4096, z=32, scales=10):
    """Names and shapes of VAR's tokenizer, by its code: FoundationVision/VAR, commit 78b9539."""
    widths, last = [ch * m for m in mult], len(mult) - 1
    parts = []

    def block(prefix, before, width):
        parts.extend([(f"{prefix}.norm1", [before]), (f"{prefix}.conv1", [width, before, 3, 3])])
        parts.extend([(f"{prefix}.norm2", [width]), (f"{prefix}.conv2", [width, width, 3, 3])])
        if before != width:
            parts.append((f"{prefix}.nin_shortcut", [width, before, 1, 1]))

    def attention(prefix, width):
        parts.extend([(f"{prefix}.norm", [width]), (f"{prefix}.qkv", [3 * width, width, 1, 1]),
                      (f"{prefix}.proj_out", [width, width, 1, 1])])

    for part, first, out in (("encoder", [ch, 3, 3, 3], z), ("decoder", [widths[-1], z, 3, 3], 3)):
        parts.append((f"{part}.conv_in", first))
        way, count = (("down", 2) if part == "encoder" else ("up", 3))
        for i, width in enumerate(widths):
            before = [ch, *widths][i] if part == "encoder" else [*widths[1:], widths[-1]][i]
            for j in range(count):
                block(f"{part}.{way}.{i}.block.{j}", width if j else before, width)
                if i == last:
                    attention(f"{part}.{way}.{i}.attn.{j}", width)
            if part == "encoder" and i < last:
                parts.append((f"encoder.down.{i}.downsample.conv", [width, width, 3, 3]))
            if part == "decoder" and i > 0:
                parts.append((f"decoder.up.{i}.upsample.conv", [width, width, 3, 3]))
        block(f"{part}.mid.block_1", widths[-1], widths[-1])
        attention(f"{part}.mid.attn_1", widths[-1])
        block(f"{part}.mid.block_2", widths[-1], widths[-1])
        width = widths[-1] if part == "encoder" else ch
        parts.extend([(f"{part}.norm_out", [width]), (f"{part}.conv_out", [out, width, 3, 3])])
    parts += [(f"{name}quant_conv", [z, z, 3, 3]) for name in ("", "post_")]
    parts += [(f"quantize.quant_resi.qresi_ls.{i}", [z, z, 3, 3]) for i in range(4)]
    shapes = {"quantize.embedding.weight": [codes, z], "quantize.ema_vocab_hit_SV": [scales, codes]}
    for name, shape in parts:
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("scales", [10, 3])  # the counter may be of other scales, and is not needed
def test_layout_of_var(scales):
    shapes = var(scales=scales)
    assert len(shapes) == 324  # as published
    published = identify(meta(shapes))
    assert published.family.name == "VAR VQ-VAE"
    with torch.device("meta"):
        model = instantiate_from_config(published.model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(109.0, abs=0.1)
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert {name: list(value.shape) for name, value in published.state.items()} == ours
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert model.code_shape(256, 256) == [(side, side) for side in sides]
    assert model.levels == 10 and model.num_codes(256, 256) == 680 and model.pixel_range == (-1.0, 1.0)


@torch.no_grad()
def test_var_from_a_file(tmp_path):
    """Fused queries, keys and values attend as theirs; grids of codes give back the latents."""
    generator = torch.Generator().manual_seed(0)
    shapes = var(ch=32, mult=(1, 2), codes=24, z=4)
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    torch.save(state, tmp_path / "vae_ch160v4096z32.pth")
    model, _, _ = load_model(tmp_path / "vae_ch160v4096z32.pth", VQModel)
    assert model.image_size == (32, 32)
    h = torch.randn(1, 64, 3, 2, generator=generator)
    prefix = "encoder.mid.attn_1"
    attend = model.encoder.mid.attn_1
    weight, bias = (state[f"{prefix}.qkv.{name}"] for name in ("weight", "bias"))
    fused = torch.nn.functional.conv2d(attend.norm(h), weight, bias)
    q, k, v = fused.reshape(1, 3, 64, 6).unbind(1)  # channels of all queries first, as theirs
    mixed = v @ (q.transpose(1, 2) @ k / 8).softmax(2).transpose(1, 2)
    close(attend(h), h + attend.proj_out(mixed.reshape(1, 64, 3, 2)))
    x = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    codes = model.encode_codes(x)
    assert [grid.shape[1] for grid in codes] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    close(model.codes_to_latents(codes), model.encode(x)[0])
    close(model.decode_codes(codes), model(x)[0])
