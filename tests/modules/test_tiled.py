"""Decoding in tiles gives the image of the whole decoder, within the memory that was asked for."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from taming.models.vqgan import VQModel
from taming.modules.diffusionmodules import tiled
from taming.modules.diffusionmodules.model import Decoder
from taming.modules.diffusionmodules.tiled import decode, decode_tiled

ROOT = Path(__file__).parents[2]
SIZES = dict(
    ch=32, out_ch=3, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), in_channels=3, resolution=32,
    z_channels=8,
)


def make(**arguments):
    """A decoder of f = 4 whose weights give images with large contrasts, brighter on one side."""
    torch.manual_seed(0)
    decoder = Decoder(**{**SIZES, **arguments}).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 2)
    return decoder


def latents(height=7, width=17, batch=1):
    z = torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(1))
    return z + torch.linspace(-2, 2, width)  # no tile is like the whole


@torch.no_grad()
@pytest.mark.parametrize(("tile", "keep"), [(16, 0), (20, 2**18), (16, 2**30), (100, 0), (3, 2**30)])
def test_the_image_is_that_of_the_whole(tile, keep):
    decoder, z = make(), latents(batch=2)
    want = decoder(z)
    got = decode_tiled(decoder, z, tile=tile, keep=keep)
    assert want.std() > 0.1 and got.shape == want.shape == (2, 3, 28, 68)
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("arguments", [
    dict(attn_type="none"), dict(attn_resolutions=(32,)), dict(attn_resolutions=()), dict(give_pre_end=True),
    dict(resamp_with_conv=False), dict(ch_mult=(1,), resolution=8), dict(num_groups=8, num_res_blocks=2),
], ids=str)
def test_every_kind_of_decoder(arguments):
    decoder, z = make(**arguments), latents()
    torch.testing.assert_close(decode_tiled(decoder, z, tile=20, keep=0), decoder(z), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tiles_that_are_normalized_by_themselves_would_differ():
    """What the passes are for: the same tiles, each with statistics of its own."""
    decoder, z = make(), latents()
    want = decoder(z)
    alone = torch.cat([decoder(part) for part in z.split(6, dim=-1)], dim=-1)
    assert (alone - want).abs().max() > 0.05


@torch.no_grad()
def test_bfloat16_and_the_original_stays_as_it_was():
    decoder, z = make(), latents()
    before = copy.deepcopy(decoder.state_dict())
    want = decoder(z)
    half = decode_tiled(copy.deepcopy(decoder).bfloat16(), z.bfloat16(), tile=16, keep=2**18)
    assert half.dtype == torch.bfloat16 and (half - want).abs().mean() < 0.02 * want.std()
    decode_tiled(decoder, z, tile=16)
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())
    assert sum(isinstance(module, nn.GroupNorm) for module in decoder.modules()) > 10
    assert torch.equal(decoder(z), want)


def counted(monkeypatch):
    """The latents that are decoded in tiles, from now on."""
    seen, original = [], tiled.decode_tiled

    def watched(decoder, z, **arguments):
        seen.append(z)
        return original(decoder, z, **arguments)

    monkeypatch.setattr(tiled, "decode_tiled", watched)
    return seen


def test_only_what_does_not_fit_is_decoded_in_tiles(monkeypatch):
    decoder, z, seen = make(), latents(batch=2), counted(monkeypatch)
    with torch.no_grad():
        want = decoder(z)
    largest = 28 * 68 * 32 * 4  # the map after the last upsampling
    with torch.no_grad():
        assert torch.equal(decode(decoder, z), want) and not seen
        assert torch.equal(decode(decoder, z, memory=2 * 6 * largest), want) and not seen
        one_by_one = decode(decoder, z, memory=6 * largest)
        assert not seen and (one_by_one - want).abs().max() < 1e-5
        in_tiles = decode(decoder, z, memory=6 * largest - 1)
        assert [len(part) for part in seen] == [1, 1] and (in_tiles - want).abs().max() < 1e-5
    seen.clear()
    decode(decoder, z, memory=0)  # gradients flow
    with torch.no_grad():
        decode(decoder.train(), z, memory=0)
    assert not seen


@torch.no_grad()
def test_the_vqgan_decodes_large_grids_in_tiles(monkeypatch):
    loss = {"target": "taming.modules.losses.DummyLoss"}
    model = VQModel({**SIZES, "double_z": False}, loss, n_embed=24, embed_dim=4).eval()
    nn.init.normal_(model.quantize.embedding.weight)
    codes = torch.randint(24, (1, 7, 17))
    want, seen = model.decode_code(codes), counted(monkeypatch)
    monkeypatch.setattr(tiled, "ON_CPU", 2**19)
    got = model.decode_code(codes)
    assert [tuple(z.shape) for z in seen] == [(1, 8, 7, 17)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    model.decode_memory = 2**30
    assert torch.equal(model.decode_code(codes), want) and len(seen) == 1


MEASURE = """
import torch
from pathlib import Path
from taming.modules.diffusionmodules.model import Decoder
from taming.modules.diffusionmodules.tiled import decode_tiled
torch.set_grad_enabled(False)
decoder = Decoder(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), attn_type="none",
    in_channels=3, resolution=32, z_channels=8,
).eval()
def peak():  # ru_maxrss begins with the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024
def grown(decode):
    decode(torch.randn(1, 8, 8, 8))
    before = peak()
    decode(torch.randn(1, 8, 128, 384))
    return peak() - before
print(grown(lambda z: decode_tiled(decoder, z, tile=128, keep=0)), grown(decoder))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded():
    """768x256 pixels: each map of 32 channels takes 24 MB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    tiles, whole = (int(megabytes) for megabytes in run.stdout.split())
    assert whole > 2 * tiles and 0 < tiles < 60, run.stdout
