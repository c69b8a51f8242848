"""VQ-VAE: its loss, its two codebooks, bad input; and that it learns."""

import pytest
import torch

from taming.config import ConfigError, instantiate_from_config
from taming.models.vqvae import VQVAE
from taming.modules.vqvae.networks import Decoder, Encoder
from taming.modules.vqvae.quantize import EMAVectorQuantizer, VectorQuantizer2

DDCONFIG = dict(in_channels=3, out_ch=3, resolution=16, ch=8, num_res_blocks=1, res_ch=4)


def vqvae(channels=3, **params):
    ddconfig = {**DDCONFIG, "in_channels": channels, "out_ch": channels}
    return VQVAE(ddconfig=ddconfig, **{"n_embed": 12, "embed_dim": 4} | params)


def images(n=2, size=(16, 16), channels=3):
    return torch.rand(n, channels, *size) * 2 - 1


@pytest.mark.parametrize("num_down", [1, 2, 3])
def test_networks_map_between_images_and_grids_of_any_shape(num_down):
    arguments = dict(DDCONFIG, num_down=num_down)
    encoder, decoder = Encoder(**arguments), Decoder(**arguments, z_channels=5)
    assert encoder.factor == 2**num_down
    assert encoder(images(size=(16, 24))).shape == (2, 8, 16 >> num_down, 24 >> num_down)
    assert decoder(torch.randn(2, 5, 3, 4)).shape == (2, 3, 3 << num_down, 4 << num_down)
    assert decoder.out_ch == 3
    with pytest.raises(ValueError, match="ch: 9 is odd"):
        Encoder(**{**arguments, "ch": 9})


@pytest.mark.parametrize("decay", [None, 0.99])
def test_the_loss_is_that_of_the_paper(decay):
    model = vqvae(decay=decay, beta=0.5)
    assert type(model.quantize) is (VectorQuantizer2 if decay is None else EMAVectorQuantizer)
    x = images()
    z = model.encode_to_prequant(x)
    quant, codebook_loss, _ = model.eval().encode(x)
    distance = (z - quant).square().mean()
    torch.testing.assert_close(codebook_loss, (1.5 if decay is None else 0.5) * distance)
    loss, log = model.loss(codebook_loss, x, model.decode(quant))
    torch.testing.assert_close(loss, (x - model.decode(quant)).square().mean() + codebook_loss)
    assert log["train/rec_loss"] + log["train/quant_loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("decay", [None, 0.99])
def test_gradients_stop_where_the_paper_stops_them(decay):
    model = vqvae(decay=decay, beta=0.5)
    z = model.encode_to_prequant(images()).detach().requires_grad_()
    quant, codebook_loss, _ = model.quantize(z)
    book = model.quantize.embedding.weight
    through = torch.autograd.grad(model.decode(quant).square().sum(), [z, quant], retain_graph=True)
    torch.testing.assert_close(*through)  # straight through
    (commitment,) = torch.autograd.grad(codebook_loss, z, retain_graph=True)
    torch.testing.assert_close(commitment, 0.5 * 2 * (z - quant).detach() / z.numel())
    assert book.requires_grad == (decay is None)
    if decay is None:  # the codebook learns from its own term alone
        of_image = torch.autograd.grad(model.decode(quant).sum(), book, allow_unused=True, retain_graph=True)
        of_term = torch.autograd.grad(codebook_loss, book)
        assert of_image == (None,) and of_term[0].abs().sum() > 0


@pytest.mark.parametrize("decay", [None, 0.99])
def test_a_few_images_are_learned_by_heart(decay):
    model = vqvae(decay=decay, kmeans_steps=5, revive_after=5, n_embed=64)
    x = torch.nn.functional.interpolate(images(2, (4, 4)), scale_factor=4.0)  # 32 colours
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(200):
        quant, codebook_loss, info = model.encode(x)
        rec = model.decode(quant)
        optimizer.zero_grad()
        model.loss(codebook_loss, x, rec)[0].backward()
        optimizer.step()
        errors.append((x - rec).square().mean().item())
    assert errors[-1] < 0.3 * errors[0] and len(info.indices.unique()) > 16


def test_an_image_keeps_its_codes_under_autocast_and_in_any_batch():
    model = vqvae().eval()
    x = images(3, (16, 24))
    codes = model.encode_codes(x)
    assert codes.shape == (3, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode_codes(x), codes)
    assert torch.equal(model.encode_codes(x[1:2]), codes[1:2])
    quant, _, _ = model.encode(x)
    torch.testing.assert_close(model.decode_codes(codes), model.decode(quant))


def test_bad_input_is_named():
    model = vqvae()
    with pytest.raises(ValueError, match="18x16 pixels are not a multiple of f = 4: crop to 16x16"):
        model.encode_codes(images(size=(18, 16)))
    with pytest.raises(ValueError, match="1 channels a pixel .* takes 3"):
        model.encode_codes(images(channels=1))
    gray = {"image": torch.zeros(2, 16, 16, 1)}
    with pytest.raises(ValueError, match="the images have 1 channels, but ddconfig.in_channels is 3: set"):
        model.check_batch(gray)
    vqvae(channels=1).check_batch(gray)
    with pytest.raises(ValueError, match="24x16 pixels .* made for 16x16"):
        model.check_batch({"image": torch.zeros(2, 24, 16, 3)})
    for name, value, says in (("n_embed", 0, "at least 1"), ("decay", 1.5, "from 0 to 1")):
        params = {"ddconfig": DDCONFIG, "n_embed": 12, "embed_dim": 4, name: value}
        with pytest.raises(ConfigError, match=f"{name}: .*{says}"):
            instantiate_from_config({"target": "taming.models.vqvae.VQVAE", "params": params})
    with pytest.raises(ConfigError, match="ddconfig.ch_mult"):
        instantiate_from_config({"target": "taming.models.vqvae.VQVAE", "params": {
            "ddconfig": {**DDCONFIG, "ch_mult": [1, 2]}, "n_embed": 12, "embed_dim": 4}})
    one = vqvae(n_embed=1)
    assert one.encode_codes(images()).unique().tolist() == [0]
