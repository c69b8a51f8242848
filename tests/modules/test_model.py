"""Encoder and decoder: shapes, padding, attention and channels-last memory; the other networks of 2021."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from taming.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Model,
    Normalize,
    ResnetBlock,
    SimpleDecoder,
    Upsample,
    UpsampleDecoder,
    VUNet,
    get_timestep_embedding,
)

ARGUMENTS = dict(
    ch=32, out_ch=3, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), in_channels=3, resolution=32,
    z_channels=16, double_z=False,
)


@torch.no_grad()
def test_any_size_and_any_number_of_channels():
    encoder = Encoder(**{**ARGUMENTS, "in_channels": 1}).eval()
    assert encoder.factor == 4
    z = encoder(torch.randn(2, 1, 24, 40))
    assert z.shape == (2, 16, 6, 10)
    assert Decoder(**{**ARGUMENTS, "out_ch": 5}).eval()(z).shape == (2, 5, 24, 40)
    assert Encoder(**{**ARGUMENTS, "double_z": True})(torch.randn(1, 3, 8, 8)).shape == (1, 32, 2, 2)


def test_attention_stands_where_the_resolution_says():
    counts = [len(level.attn) for level in Encoder(**ARGUMENTS).down]
    assert counts == [0, 0, 1]
    assert [len(level.attn) for level in Decoder(**ARGUMENTS).up] == [0, 0, 2]
    assert [len(level.attn) for level in Encoder(**{**ARGUMENTS, "resolution": 16}).down] == [0, 1, 0]


@torch.no_grad()
def test_attention_is_the_formula():
    block, x = AttnBlock(32).eval(), torch.randn(2, 32, 3, 5)
    h = block.norm(x)
    q, k, v = (part(h).flatten(2) for part in (block.q, block.k, block.v))  # (B, C, h*w)
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(-1)  # (B, query, key)
    want = x + block.proj_out((v @ weights.transpose(1, 2)).view_as(x))
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_downsampling_pads_right_and_below():
    layer = Downsample(2)
    layer.conv.weight.zero_()
    layer.conv.bias.zero_()
    layer.conv.weight[:, :, 0, 0] = torch.eye(2)  # picks the upper left pixel of each window
    x = torch.randn(1, 2, 6, 4)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])
    assert torch.equal(Downsample(2, with_conv=False)(x), F.avg_pool2d(x, 2))


def test_upsampling_repeats_pixels():
    x = torch.randn(1, 2, 3, 2)
    assert torch.equal(Upsample(2, with_conv=False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_channels_must_divide_into_groups():
    assert Normalize(64).eps == 1e-6
    with pytest.raises(ValueError, match="48 channels.*32 groups.*multiple of 32"):
        Encoder(**{**ARGUMENTS, "ch": 48})


@torch.no_grad()
def test_resnet_block_shifts_channels_by_an_embedding():
    block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True, temb_channels=6).eval()
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 6)
    assert block(x, temb).shape == (2, 64, 4, 4)
    assert not torch.allclose(block(x, temb), block(x, -temb))
    assert "temb_proj.weight" not in ResnetBlock(in_channels=32, temb_channels=0).state_dict()
    assert ResnetBlock(in_channels=32).temb_proj.in_features == 512


@torch.no_grad()
def test_features_before_the_end():
    decoder, z = Decoder(**ARGUMENTS).eval(), torch.randn(1, 16, 4, 4)
    image = decoder(z)
    decoder.give_pre_end = True
    features = decoder(z)
    assert features.shape == (1, 32, 16, 16)
    torch.testing.assert_close(decoder.conv_out(F.silu(decoder.norm_out(features))), image)


@torch.no_grad()
def test_channels_last_memory_stays_and_changes_no_value():
    encoder = Encoder(**ARGUMENTS).eval()
    x = torch.randn(2, 3, 16, 24)
    want = encoder(x)
    got = encoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_builds_without_memory():
    with torch.device("meta"):
        assert all(p.is_meta for p in Encoder(**ARGUMENTS).parameters())
        assert Decoder(**ARGUMENTS)(torch.empty(1, 16, 4, 6)).shape == (1, 3, 16, 24)


@torch.no_grad()
@pytest.mark.parametrize("with_conv", [True, False])
def test_sides_that_f_does_not_divide_are_rounded_down(with_conv):
    encoder = Encoder(**ARGUMENTS, resamp_with_conv=with_conv).eval()
    assert encoder(torch.randn(1, 3, 27, 45)).shape == (1, 16, 6, 11)


def test_unknown_arguments_are_ignored_with_one_warning(caplog):
    torch.manual_seed(0)
    want = Encoder(**ARGUMENTS).state_dict()
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        encoder = Encoder(**ARGUMENTS, tanh_out=False, use_linear_attn=False)
        Decoder(**ARGUMENTS, tanh_out=False, use_linear_attn=False)
    assert [record.message for record in caplog.records] == [
        "ignored in ddconfig: tanh_out, use_linear_attn; Encoder and Decoder have no such arguments"
    ]
    assert all(torch.equal(value, want[key]) for key, value in encoder.state_dict().items())


# ---- the other networks of 2021

UNET = {k: v for k, v in ARGUMENTS.items() if k not in ("z_channels", "double_z", "in_channels")}


def test_embedding_of_time_steps():
    t = torch.tensor([0, 1, 999])
    embedding = get_timestep_embedding(t, 7)  # 3 waves, and a zero
    waves = [10000 ** (-i / 2) for i in range(3)]
    for row, step in zip(embedding, t.tolist(), strict=True):
        want = [math.sin(step * w) for w in waves] + [math.cos(step * w) for w in waves] + [0.0]
        torch.testing.assert_close(row, torch.tensor(want), rtol=1e-4, atol=1e-4)


def test_unet_joins_each_block_with_its_counterpart():
    model = Model(**UNET, in_channels=3)
    widths = [[(b.in_channels, b.out_channels) for b in level.block] for level in model.up]
    assert widths == [[(96, 32), (64, 32)], [(128, 64), (96, 64)], [(128, 64), (128, 64)]]
    x, t = torch.randn(2, 3, 16, 24), torch.tensor([3, 500])
    y = model(x, t)
    assert y.shape == x.shape
    assert not torch.allclose(y, model(x, t + 1))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match="give t"):
        model(x)
    assert Model(**UNET, in_channels=3, use_timestep=False)(x).shape == x.shape


def test_unet_over_a_condition_with_a_latent():
    model = VUNet(**UNET, in_channels=3, c_channels=5, z_channels=4, double_z=False)
    c, z = torch.randn(1, 5, 16, 24), torch.randn(1, 4, 4, 6)
    y = model(c, z)
    assert y.shape == (1, 3, 16, 24)
    assert not torch.allclose(y, model(c, -z)) and not torch.allclose(y, model(-c, z))
    assert model.mid.block_1.in_channels == 2 * model.mid.block_1.out_channels == 128


@torch.no_grad()
def test_small_decoders():
    x = torch.randn(2, 32, 4, 6)
    decoder = SimpleDecoder(32, 5, "more", resolution=8)
    assert decoder(x).shape == (2, 5, 8, 12)
    assert [layer.out_channels for layer in decoder.model[:-1]] == [32, 64, 128, 64, 32]
    decoder = UpsampleDecoder(32, 3, ch=32, num_res_blocks=1, resolution=8, ch_mult=(4, 2, 1))
    assert decoder(x).shape == (2, 3, 16, 24)
    keys = {key.rsplit(".", 1)[0] for key in decoder.state_dict() if "conv1" in key or "upsample" in key}
    assert keys == {
        *(f"res_blocks.{i}.{j}.conv1" for i in range(3) for j in range(2)),
        "upsample_blocks.0.conv", "upsample_blocks.1.conv",
    }
