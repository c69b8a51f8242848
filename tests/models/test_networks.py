"""VQModel with the networks of MaskGIT, VQGAN+, Open-MAGVIT2, TiTok and VAR: training, sizes, bad input."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from taming.config import ConfigError, instantiate_from_config
from taming.eval.reconstruction import reconstruct
from taming.images import from_uint8, to_pil, to_uint8
from taming.inference.completion import kept_codes
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.titok import TiTok
from taming.models.tokenizer import SizeMismatch, Tokenizer
from taming.models.vqgan import VQModel
from taming.web.progress import preview

HEIGHT, WIDTH, CODES = 16, 24, 16
CONV = dict(
    double_z=False, z_channels=4, resolution=[HEIGHT, WIDTH], in_channels=3, out_ch=3, ch=8,
    ch_mult=[1, 2, 2], num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4,
)
VIT = dict(
    resolution=[HEIGHT, WIDTH], num_tokens=6, z_channels=4, patch_size=4, width=16, heads=2, num_layers=1,
)
PIXEL_DECODER = dict(ch=8, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=5, num_groups=4)
LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": dict(perceptual_weight=0.0, disc_start=1000, disc_num_layers=1, disc_ndf=4),
}
LFQ = {"target": "taming.modules.quantizers.lookup_free.LFQ", "params": {"codebook_size": CODES}}
UNIT_LENGTH = {
    "target": "taming.modules.quantizers.vector.VQ",
    "params": {"codebook_size": CODES, "dim": 4, "l2_normalize": True},
}
SCALES = {
    "target": "taming.modules.quantizers.multi_scale.MultiScaleResidualVQ",
    "params": {"codebook_size": CODES, "dim": 4, "scales": [1, 2, 4], "num_convolutions": 3},
}
DOWN = {"target": "taming.modules.maskgit.networks.Encoder"}
UP = {"target": "taming.modules.maskgit.networks.Decoder"}
STRIDED = dict(resolution=[HEIGHT, WIDTH], in_channels=3, out_ch=3, ch=8, num_res_blocks=1, res_ch=4)
MODELS = {
    "VQ-VAE": ("vqgan.VQModel", STRIDED, dict(
        encoder_config={"target": "taming.modules.vqvae.networks.Encoder"},
        decoder_config={"target": "taming.modules.vqvae.networks.Decoder"},
    )),
    "MaskGIT": ("vqgan.VQModel", CONV, dict(encoder_config=DOWN, decoder_config=UP)),
    "VQGAN+": ("vqgan.VQModel", CONV, dict(
        encoder_config={**DOWN, "params": {"resamp_with_conv": True}}, decoder_config=UP,
        quantizer_config=LFQ, quant_conv_kernel=0,
    )),
    "Open-MAGVIT2": ("vqgan.VQModel", CONV, dict(
        encoder_config={"target": "taming.modules.magvit2.networks.Encoder"},
        decoder_config={"target": "taming.modules.magvit2.networks.Decoder"}, quantizer_config=LFQ,
        quant_conv_kernel=0,
    )),
    "TiTok": ("titok.TiTok", VIT, dict(quantizer_config=UNIT_LENGTH)),
    "TiTok by codes": ("titok.TiTok", VIT, dict(
        encoder_config={"params": {"legacy_order": True}},
        decoder_config={
            "target": "taming.modules.titok.networks.ProxyCodeDecoder",
            "params": {"pixel_decoder": PIXEL_DECODER, "pixel_codes": 9},
        },
    )),
    "VAR": ("vqgan.VQModel", CONV, dict(quantizer_config=SCALES, quant_conv_kernel=3)),
}


def make(name, **changes):
    target, ddconfig, params = MODELS[name]
    params = {"ddconfig": ddconfig, "lossconfig": LOSS, "n_embed": CODES, "embed_dim": 4} | params | changes
    torch.manual_seed(0)
    return instantiate_from_config({"target": f"taming.models.{target}", "params": params})


def images(count=2):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 4, 6, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear").clamp(-1, 1)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_lowers_the_loss(name, tmp_path):
    """On the batch that it was taken on; every part of the generator has changed."""
    model = make(name)
    model.learning_rate = 1e-3
    x = images()

    def loss():
        rec, codebook_loss = model.train()(x)
        return float(model.loss(codebook_loss, x, rec, 0, 0, last_layer=model.get_last_layer())[0])

    before, weights = loss(), {key: value.detach().clone() for key, value in model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader([{"image": image.permute(1, 2, 0)} for image in x], batch_size=len(x)))
    assert model.batches_seen == 1 and loss() < before
    trained = {key: value for key, value in model.named_parameters() if not key.startswith("loss.")}
    assert not [key for key, value in trained.items() if torch.equal(value, weights[key])]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_codes_and_images(name):
    """Codes are those of the latents, decode to images of the same size, and do not depend on the batch."""
    model = make(name).eval()
    assert isinstance(model, Tokenizer)
    x = images(3)
    codes = model.encode_codes(x)
    each = codes if isinstance(codes, list) else [codes]
    grids = model.code_shape(HEIGHT, WIDTH)
    assert [tuple(grid.shape[1:]) for grid in each] == (grids if isinstance(grids, list) else [grids])
    assert sum(grid[0].numel() for grid in each) == model.num_codes(HEIGHT, WIDTH)
    alone = model.encode_codes(x[1:2])
    assert all(map(torch.equal, alone if isinstance(alone, list) else [alone], [grid[1:2] for grid in each]))
    z = model.encode_to_prequant(x)
    torch.testing.assert_close(model.codes_to_latents(codes), model.quantize(z)[0])
    rec = model.decode_codes(codes)
    assert rec.shape == x.shape
    torch.testing.assert_close(rec, model(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name != "VQ-VAE"])  # which is always in ours
def test_images_are_in_our_range_whatever_the_networks_see(name):
    """The same weights with pixels in [0, 1] inside give the same for images that look the same to them."""
    target, ddconfig, params = MODELS[name]
    ours, theirs = make(name).eval(), make(name, ddconfig={**ddconfig, "pixel_range": [0.0, 1.0]}).eval()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.pixel_range == (0.0, 1.0)
    x = images()
    torch.testing.assert_close(theirs.encode_to_prequant(x), ours.encode_to_prequant((x + 1) / 2))
    codes = theirs.encode_codes(x)
    torch.testing.assert_close(theirs.decode_codes(codes), ours.decode_codes(codes) * 2 - 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["VQ-VAE", "MaskGIT", "VQGAN+", "Open-MAGVIT2", "VAR"])
def test_convolutions_take_other_sizes(name):
    model = make(name).eval()
    x = torch.rand(1, 3, 32, 16) * 2 - 1
    codes = model.encode_codes(x)
    assert (codes[-1] if isinstance(codes, list) else codes).shape[1:] == (8, 4)
    assert model.decode_codes(codes).shape == x.shape


def test_titok_takes_one_size_and_no_window():
    model = make("TiTok").eval()
    assert not model.spatial and model.code_shape(HEIGHT, WIDTH) == (1, 6)
    for size in ((16, 16), (32, 48)):
        with pytest.raises(SizeMismatch, match=f"{size[0]}x{size[1]} pixels .* made for 16x24"):
            model.encode_codes(torch.zeros(1, 3, *size))
        with pytest.raises(ValueError, match="made for 16x24"):
            model.code_shape(*size)
    target, ddconfig, params = MODELS["TiTok"]
    params = {"ddconfig": ddconfig, "lossconfig": LOSS, "n_embed": CODES, "embed_dim": 4} | params
    prior = Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT",
         "params": dict(vocab_size=CODES, n_layer=1, n_head=2, n_embd=8)},
        {"target": f"taming.models.{target}", "params": params}, "__is_unconditional__",
    ).eval()
    c = prior.encode_conditions(images(1))
    assert prior.generate(c).shape == (1, 3, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="TiTok have no place in the image.* whole images of 16x24 pixels"):
        prior.generate(c, wavefront=True)
    with pytest.raises(ValueError, match="no part be kept"):
        prior.generate(c, known=torch.zeros(1, 1, 6).long(), mask=torch.ones(1, 1, 6).bool())
    with pytest.raises(ValueError, match="made for 16x24"):
        prior.generate(c, size=(32, 48))
    with pytest.raises(ValueError, match="no part be kept"):
        kept_codes(prior, (HEIGHT, WIDTH), 0.5, None)
    assert kept_codes(prior, (HEIGHT, WIDTH), 0.0, None) is None
    # a preview of two of six codes shows all of the image, not its first third
    shown = preview(prior, (1, 6), torch.zeros(1, 6, dtype=torch.bool), 1, torch.tensor([[3, 5]]))
    want = prior.decode_codes(torch.tensor([[[3, 5, 3, 5, 3, 5]]]))
    assert shown.tobytes() == to_pil(want[0].clamp(-1, 1)).tobytes()


@torch.no_grad()
def test_the_legacy_order_mixes_tokens():
    """A latent is made of `width` neighbours in the memory of (N, D), which begins with the first token."""
    encoder = make("TiTok by codes").encoder.eval()
    x, kept = images(1), []
    encoder.ln_post.register_forward_hook(lambda module, given, result: kept.append(result))
    z = encoder(x)
    memory = kept[0].reshape(1, 16, 6, 1)  # (N, D) = (6, 16) read as (D, N)
    torch.testing.assert_close(z, encoder.conv_out(memory).reshape(1, 4, 1, 6))
    encoder.legacy_order = False
    each = kept[0].transpose(1, 2)[..., None]  # (1, D, N, 1)
    torch.testing.assert_close(encoder(x), encoder.conv_out(each).reshape(1, 4, 1, 6))


@torch.no_grad()
def test_a_decoder_by_codes_gives_what_its_decoder_makes_of_certain_ones():
    model = make("TiTok by codes").eval()
    decoder = model.decoder
    decoder.ffn[2].weight.zero_()
    decoder.ffn[2].bias.copy_(torch.where(torch.arange(9) == 7, 100.0, 0.0))  # code 7 everywhere
    codes = torch.full((2, 4, 6), 7)
    want = decoder.pixel_decoder(decoder.pixel_quantize["embedding"](codes).movedim(-1, 1))
    torch.testing.assert_close(model.decode_codes(torch.zeros(2, 1, 6).long()), want)


@torch.no_grad()
def test_grids_of_scales_belong_together():
    model = make("VAR").eval()
    assert model.levels == 3
    assert model.code_shape(HEIGHT, WIDTH) == [(1, 2), (2, 3), (4, 6)]
    codes = model.encode_codes(images())
    with pytest.raises(ValueError, match="takes 3 grids of codes"):
        model.decode_codes(codes[:2])
    with pytest.raises(ValueError, match="prior that does not know 3 levels"):
        Net2NetTransformer(
            {"target": "taming.modules.transformer.mingpt.GPT", "params": {"vocab_size": CODES}},
            {"target": "taming.models.vqgan.VQModel", "params": {
                "ddconfig": CONV, "lossconfig": LOSS, "n_embed": CODES, "embed_dim": 4,
                "quantizer_config": SCALES,
            }}, "__is_unconditional__",
        )


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_reconstructions_are_images(name):
    model = make(name).eval()
    pixels = to_uint8(images())
    again, grids = reconstruct(model, pixels)
    codes = model.encode_codes(from_uint8(pixels))
    assert torch.equal(again, to_uint8(model.decode_codes(codes)))
    assert all(map(torch.equal, grids, codes if isinstance(codes, list) else [codes]))


# ---- bad input


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("MaskGIT", {"ddconfig": {**CONV, "attn_resolutions": [4]}}, "attn_resolutions: \\[4\\], but this"),
    ("Open-MAGVIT2", {"ddconfig": {**CONV, "resolution": 4}}, "4 is one code of 4x4 pixels"),
    ("MaskGIT", {"ddconfig": {**CONV, "num_groups": 3}}, "8 channels cannot be normalized in 3 groups"),
    ("TiTok", {"ddconfig": {**VIT, "patch_size": 5}}, "is not a multiple of patch_size: 5"),
    ("TiTok", {"ddconfig": {**VIT, "heads": 3}}, "heads: 3 do not divide width: 16"),
    ("TiTok", {"ddconfig": {**VIT, "heads": None}}, "heads is missing, the attention heads of the width: 16"),
    ("TiTok", {"decoder_config": {"params": {"num_tokens": 7}}}, "6 in the encoder, but 7 in the decoder"),
    ("TiTok", {"embed_dim": 3, "quantizer_config": None}, "z_channels and embed_dim differ \\(4 and 3\\)"),
])
def test_what_cannot_be(name, changes, message):
    with pytest.raises(ValueError, match=message):
        make(name, **changes)


def test_a_decoder_by_codes_of_another_factor():
    target = "taming.modules.titok.networks.ProxyCodeDecoder"
    params = {"pixel_decoder": {**PIXEL_DECODER, "ch_mult": [1, 2]}, "pixel_codes": 9}
    with pytest.raises(ValueError, match="its codes are of 2x2 pixels, but patch_size is 4"):
        make("TiTok by codes", decoder_config={"target": target, "params": params})
    with pytest.raises(ConfigError, match="does not accept 'pixel_decoder.chs' \\(did you mean ch"):
        params = {"pixel_decoder": {**PIXEL_DECODER, "chs": 1}}
        make("TiTok by codes", decoder_config={"target": target, "params": params})


def test_classes_are_named():
    assert isinstance(make("TiTok"), TiTok) and isinstance(make("MaskGIT"), VQModel)
