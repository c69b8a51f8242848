"""Encoder and decoder: shapes, padding, attention and channels-last memory."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Normalize,
    ResnetBlock,
    Upsample,
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
    assert "temb_proj.weight" not in ResnetBlock(in_channels=32).state_dict()


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
