"""The benchmarks: what is compared gives the same results, and results can be compared."""

import json
from argparse import Namespace

import pytest
import torch

from benchmarks import compare
from benchmarks import training_2021 as old
from benchmarks.parts import GPTS, machine
from benchmarks.training import build_transformer, build_vqgan
from taming.modules.quantizers.base import nearest_code

OPTIONS = Namespace(quick=True, ch=None, pixels=32, tokens=None, device=torch.device("cpu"))


def test_the_stage_1_step_of_2021_has_the_losses_of_ours():
    images = torch.rand(2, 32, 32, 3) * 2 - 1
    x = images.permute(0, 3, 1, 2)
    model = build_vqgan(OPTIONS).train()
    model.loss.discriminator = type(model.loss.discriminator)(3, 8, 2)  # for small images
    with torch.no_grad():
        rec, codebook_loss = model(x)
    z_q, loss, _ = old.quantize(model, old.encode(model, x))
    torch.testing.assert_close(loss, codebook_loss)
    torch.testing.assert_close(old.decode(model, z_q), rec, rtol=1e-4, atol=1e-4)

    rec = rec.requires_grad_()
    nll = model.loss._reconstruction(codebook_loss, x, rec)[1]
    step = old.Stage1Step(model, rate=0.0)
    log = step(images, factor=1.0)
    torch.testing.assert_close(log["rec_loss"], nll.detach(), rtol=1e-4, atol=1e-5)
    disc_loss, _ = model.loss(codebook_loss, x, rec, 1, 0)
    torch.testing.assert_close(log["disc_loss"].detach(), disc_loss.detach(), rtol=1e-3, atol=1e-4)


def test_the_stage_2_step_of_2021_has_the_loss_of_ours():
    model = build_transformer(OPTIONS, "tiny")
    images = torch.rand(2, 32, 32, 3) * 2 - 1
    with torch.no_grad():
        expected = model.shared_step({"image": images})
    torch.testing.assert_close(old.Stage2Step(model, rate=1e-3)(images), expected, rtol=1e-4, atol=1e-5)


def test_the_search_of_2021_finds_the_same_codes():
    z, codes = torch.randn(100, 8), torch.randn(32, 8)
    assert torch.equal(old.nearest(z, codes), nearest_code(z, codes))


def test_sizes_have_the_parameters_of_their_names():
    for name, (layers, _, channels) in GPTS.items():
        if name != "tiny":
            blocks = 12 * layers * channels**2 / 1e6  # millions, without embeddings
            stated = float(name[:-1]) * (1000 if name.endswith("B") else 1)
            assert stated == pytest.approx(blocks, rel=0.05), name


def results(path, seconds, peak=1.0, **changes):
    described = machine() | changes
    median = sorted(seconds)[len(seconds) // 2]
    rows = [{"what": "a step", "median_s": median, "all_s": seconds, "peak_gb": peak}]
    path.write_text(json.dumps({"machine": described, "parts": {"part": rows}}))
    return str(path)


@pytest.mark.parametrize(("seconds", "peak", "status"), [
    ([1.0, 1.0, 1.1], 1.0, 0),
    ([1.3, 1.3, 1.4], 1.0, 1),  # slower
    ([1.0, 1.3, 1.4], 1.0, 0),  # but not each time
    ([0.5, 0.5, 0.5], 1.0, 0),
    ([1.0, 1.0, 1.0], 1.3, 1),  # more memory
])
def test_regressions_are_found(tmp_path, capsys, seconds, peak, status):
    before = results(tmp_path / "a.json", [0.9, 1.0, 1.2])
    after = results(tmp_path / "b.json", seconds, peak)
    assert compare.main([before, after]) == status
    assert "part: a step" in capsys.readouterr().out
    assert compare.main([before, after, "--threshold", "2"]) == 0


def test_other_machines_are_not_compared(tmp_path, capsys):
    before, after = results(tmp_path / "a.json", [1.0]), results(tmp_path / "b.json", [1.0], cores=999)
    assert compare.main([before, after]) == 2
    assert "cores" in capsys.readouterr().err
    assert compare.main([before, after, "--any-machine"]) == 0
    (tmp_path / "c.json").write_text("[]")
    assert compare.main([before, str(tmp_path / "c.json")]) == 2
