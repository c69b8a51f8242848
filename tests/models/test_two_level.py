"""First stages with two grids of codes: golden values and names of a peer, wiring, contract, bad input."""

import pytest
import torch
from safetensors.torch import save_file

from taming.checkpoint import load_model
from taming.models.two_level import TwoLevelVQModel
from taming.models.vqvae2 import VQVAE2
from taming.modules.vqvae.quantize import VectorQuantizer2
from tests.test_golden import read

NETWORKS = dict(in_channels=3, out_ch=3, resolution=32, ch=16, num_res_blocks=1, res_ch=8)
VQGAN = dict(
    double_z=False, z_channels=16, resolution=32, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1, 2, 2],
    num_res_blocks=1, attn_resolutions=[4], dropout=0.0, num_groups=4,
)
LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": dict(perceptual_weight=0.0, disc_start=0, disc_num_layers=1, disc_ndf=4),
}
GOLDEN = dict(
    ddconfig=dict(in_channels=3, out_ch=3, resolution=32, ch=32, num_res_blocks=2, res_ch=16), n_embed=40,
    embed_dim=16,
)


def vqvae2(channels=3, **params):
    ddconfig = {**NETWORKS, "in_channels": channels, "out_ch": channels}
    return VQVAE2(**{"ddconfig": ddconfig, "n_embed": 12, "embed_dim": 4} | params)


def two_level(channels=3, **params):
    ddconfig = {**VQGAN, "in_channels": channels, "out_ch": channels}
    return TwoLevelVQModel(
        **{"ddconfig": ddconfig, "lossconfig": LOSS, "n_embed": 12, "embed_dim": 4} | params
    )


both = pytest.mark.parametrize("make", [vqvae2, two_level])


def images(n=2, size=(32, 32), channels=3):
    return torch.rand(n, channels, *size) * 2 - 1


def close(got, want):
    """Agree to 1e-5 of the tensor's largest value."""
    torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


# ---- golden values: rosinality/vq-vae-2-pytorch, commit ef5f67c


def golden():
    state, given, want = read("vqvae2")
    model = VQVAE2(**GOLDEN)
    model.load_state_dict(dict(state))  # under the names there
    return model, given, want


@torch.no_grad()
def test_golden_codes_and_images():
    model, given, want = golden()
    quants, losses, infos = model.eval().encode(given["x"])
    for level, quant, info in zip("tb", quants, infos, strict=True):
        close(quant, want[f"quant_{level}"])
        assert torch.equal(info.indices.view_as(want[f"id_{level}"]), want[f"id_{level}"])
    close(sum(losses)[None] / 0.25, want["diff"])
    close(model(given["x"])[0], want["decoded"])
    close(model.reconstruct(given["x"]), want["decoded"])
    close(model.decode_codes([given["code_t"], given["code_b"]]), want["decode_code"])
    top, bottom = model.encode_codes(given["x"])
    assert torch.equal(top, want["id_t"]) and torch.equal(bottom, want["id_b"])


@pytest.mark.parametrize("call", ["first", "later"])
def test_golden_training(call):
    model, given, want = golden()
    books = {level: getattr(model, f"quantize_{level}").embedding for level in "tb"}
    for level, book in books.items():
        if call == "later":
            book.cluster_size.copy_(given[f"cluster_size_{level}"])
            book.embed_avg.copy_(book.weight * book.cluster_size[:, None] * 1.1)
        assert call == "later" or (book.cluster_size == 0).all()
    reconstruction, codebook_loss = model.train()(given["x"])
    loss, log = model.loss(codebook_loss, given["x"], reconstruction)
    close(log["train/rec_loss"], want[f"{call}.recon_loss"])
    close(codebook_loss / 0.25, want[f"{call}.latent_loss"])
    close(loss, want[f"{call}.loss"])
    for level, book in books.items():
        close(book.weight.t(), want[f"{call}.after_{level}.embed"])
        close(book.embed_avg.t(), want[f"{call}.after_{level}.embed_avg"])
        close(book.cluster_size, want[f"{call}.after_{level}.cluster_size"])
    if call == "first":
        loss.backward()
        for key, value in want.items():
            if key.startswith("grad."):
                close(model.get_parameter(key.removeprefix("grad.")).grad, value)


# what train_vqvae.py saves at its default size: names and shapes of vq_vae_2_default
LAYOUT = {
    "enc_b.blocks.0": (64, 3, 4, 4), "enc_b.blocks.2": (128, 64, 4, 4), "enc_b.blocks.4": (128, 128, 3, 3),
    **{f"enc_b.blocks.{i}.conv.1": (32, 128, 3, 3) for i in (5, 6)},
    **{f"enc_b.blocks.{i}.conv.3": (128, 32, 1, 1) for i in (5, 6)},
    "enc_t.blocks.0": (64, 128, 4, 4), "enc_t.blocks.2": (128, 64, 3, 3),
    **{f"enc_t.blocks.{i}.conv.1": (32, 128, 3, 3) for i in (3, 4)},
    **{f"enc_t.blocks.{i}.conv.3": (128, 32, 1, 1) for i in (3, 4)},
    "quantize_conv_t": (64, 128, 1, 1), "quantize_conv_b": (64, 192, 1, 1),
    "dec_t.blocks.0": (128, 64, 3, 3), "dec_t.blocks.4": (128, 64, 4, 4), "upsample_t": (64, 64, 4, 4),
    "dec.blocks.0": (128, 128, 3, 3), "dec.blocks.4": (128, 64, 4, 4), "dec.blocks.6": (64, 3, 4, 4),
    **{f"{part}.blocks.{i}.conv.1": (32, 128, 3, 3) for part in ("dec", "dec_t") for i in (1, 2)},
    **{f"{part}.blocks.{i}.conv.3": (128, 32, 1, 1) for part in ("dec", "dec_t") for i in (1, 2)},
}
TRANSPOSED = ("dec_t.blocks.4", "upsample_t", "dec.blocks.4", "dec.blocks.6")  # channels out are dimension 1
FULL_SIZE = {"model": {"target": "taming.models.vqvae2.VQVAE2", "params": dict(
    ddconfig=dict(in_channels=3, out_ch=3, resolution=256, ch=128, num_res_blocks=2, res_ch=32),
    n_embed=512, embed_dim=64)}}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_the_peer_loads_whole(tmp_path, prefix):
    state = {f"{name}.weight": torch.randn(shape) for name, shape in LAYOUT.items()}
    state |= {
        f"{name}.bias": torch.randn(shape[1 if name in TRANSPOSED else 0]) for name, shape in LAYOUT.items()
    }
    for level in "tb":
        state |= {f"quantize_{level}.{name}": torch.rand(64, 512) for name in ("embed", "embed_avg")}
        state[f"quantize_{level}.cluster_size"] = torch.rand(512)
    assert len(state) == 64 and sum(value.numel() for value in state.values()) == 1_520_963
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "vqvae.safetensors")
    model, _, _ = load_model(tmp_path / "vqvae.safetensors", VQVAE2, config=FULL_SIZE)
    assert sum(p.numel() for p in model.parameters()) == 1_388_867
    assert torch.equal(model.dec.last_layer, state["dec.blocks.6.weight"])
    assert torch.equal(model.quantize_b.embedding.weight, state["quantize_b.embed"].t())
    assert torch.equal(model.quantize_t.embedding.embed_avg, state["quantize_t.embed_avg"].t())
    other = VQVAE2(**FULL_SIZE["model"]["params"])
    other.load_state_dict(model.state_dict())  # and under our own names
    assert torch.equal(other.quantize_t.embedding.weight, model.quantize_t.embedding.weight)


# ---- both models


@both
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (64, 64)])
def test_two_grids_of_any_image(make, size):
    model, (height, width) = make().eval(), size
    x = images(2, size)
    grids = [(height // 8, width // 8), (height // 4, width // 4)]
    assert model.levels == 2 and model.factor == 8 and model.code_shape(*size) == grids
    assert model.num_codes(*size) == 5 * height * width // 64
    codes = model.encode_codes(x)
    assert [grid.shape for grid in codes] == [(2, *grid) for grid in grids]
    quants, losses, _ = model.encode(x)
    for latents, quant in zip(model.codes_to_latents(codes), quants, strict=True):
        torch.testing.assert_close(latents, quant)
    torch.testing.assert_close(model.decode_codes(codes), model.decode(quants))
    assert model.decode_codes(codes).shape == x.shape and all(loss > 0 for loss in losses)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = model.encode_codes(x)
    assert all(torch.equal(*pair) for pair in zip(codes, again, strict=True))


def test_the_grids_of_table_5():
    model = vqvae2(ddconfig={**NETWORKS, "resolution": 256})
    assert model.code_shape(256, 256) == [(32, 32), (64, 64)] and model.num_codes(256, 256) == 5120


@both
def test_both_levels_reach_the_image_and_the_top_learns_from_the_bottom(make):
    model = make()
    x = images()
    quants, losses, _ = model.encode(x)
    rec = model.decode(quants)
    for level in range(2):
        without = [torch.zeros_like(q) if i == level else q for i, q in enumerate(quants)]
        assert not torch.allclose(model.decode(without), rec)
    # the bottom's loss has a gradient at the top's encoder, by the straight-through codes; the top's too
    for loss in losses:
        weight = model.quantize_conv_t.weight
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0].abs().sum() > 0
    (of_bottom,) = torch.autograd.grad(
        losses[0], model.quantize_conv_b.weight, retain_graph=True, allow_unused=True
    )
    assert of_bottom is None


@both
@pytest.mark.parametrize("decay", [None, 0.9])
def test_codebooks_of_both_levels_learn_in_training_only(make, decay):
    model = make(decay=decay, kmeans_steps=2, revive_after=4)
    books = [model.quantize_t.embedding, model.quantize_b.embedding]
    before = [book.weight.clone() for book in books]
    model.eval().encode(images())
    assert all(torch.equal(b.weight, old) for b, old in zip(books, before, strict=True))
    model.train().encode(images())
    assert not any(torch.equal(b.weight, old) for b, old in zip(books, before, strict=True))
    assert (type(model.quantize_t) is VectorQuantizer2) == (decay is None)


@both
def test_bad_input_is_named(make):
    model = make()
    with pytest.raises(ValueError, match="36x32 pixels are not a multiple of f = 8: crop to 32x32"):
        model.encode_codes(images(size=(36, 32)))
    with pytest.raises(ValueError, match="1 channels a pixel .* takes 3"):
        model.encode_codes(images(channels=1))
    gray = {"image": torch.zeros(2, 32, 32, 1)}
    with pytest.raises(ValueError, match="the images have 1 channels, but ddconfig.in_channels is 3"):
        model.check_batch(gray)
    top, bottom = model.eval().encode_codes(images())
    for wrong in ([top], [bottom, top], [top, bottom[:1]], [top, bottom, bottom], [top, top]):
        with pytest.raises(ValueError, match=r"two grids of codes, \(B, h, w\) and \(B, 2h, 2w\), not "):
            model.decode_codes(wrong)
    one = make(n_embed=1, channels=1).eval()
    codes = one.encode_codes(images(channels=1))
    assert [grid.unique().tolist() for grid in codes] == [[0], [0]]
    assert one.decode_codes(codes).shape == (2, 1, 32, 32)


def test_networks_of_the_two_level_vqgan():
    model = two_level()
    assert model.enc_b.factor == 4 and model.enc_t.factor == 2
    assert len(model.enc_t.down[1].attn) == 1 and not model.enc_t.down[0].attn  # at 4 pixels of 32, as asked
    with pytest.raises(ValueError, match="double_z must be False"):
        two_level(ddconfig={**VQGAN, "double_z": True})
    with pytest.raises(ValueError, match="one resolution; two levels need at least 2"):
        two_level(ddconfig={**VQGAN, "ch_mult": [1]})
