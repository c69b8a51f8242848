"""Pictures through a first stage: sizes, names, the table, bad files."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.reconstruct import main
from taming.checkpoint import save_exported
from taming.config import instantiate_from_config
from taming.data.files.images import read_image
from taming.images import from_uint8
from taming.metrics import psnr, ssim

DD = {
    "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # f = 4
STAGE = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "ddconfig": DD, "n_embed": 16, "embed_dim": 4,
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stage")
    return str(save_exported(instantiate_from_config(STAGE), {"model": STAGE}, folder))


@pytest.fixture
def photos(tmp_path):
    """Three pictures of two sizes, one of them deeper, and a broken file."""
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (22, 17)), ("b.png", (24, 24)), ("sub/c.png", (24, 24))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def reconstruct(run, out, *arguments):
    status = main(["-r", run, "-o", str(out), "--device", "cpu", *map(str, arguments)])
    table = out / "metrics.csv"
    return status, list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []


def pixels(path):
    return torch.from_numpy(from_uint8(read_image(path))).permute(2, 0, 1)[None]


def test_a_folder(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    status, rows = reconstruct(run, out, photos)
    assert status == 0
    assert [(row["file"], row["width"], row["height"]) for row in rows[:-1]] == [
        (str(photos / "a.jpg"), "20", "16"), (str(photos / "b.png"), "24", "24"),
        (str(photos / "sub/c.png"), "24", "24"),
    ]
    assert Image.open(out / "a.png").size == (20, 16) and Image.open(out / "sub/c.png").size == (24, 24)
    with Image.open(out / "comparison.png") as sheet:  # 3 pairs, 2 in a row, on 24 x 24
        assert sheet.size == (4 * 26 + 2, 2 * 26 + 2)
        first = sheet.crop((2, 2, 22, 18))
    assert first.tobytes() == Image.open(photos / "a.jpg").crop((1, 0, 21, 16)).tobytes()
    printed = capsys.readouterr()
    assert "3 images reconstructed, 1 skipped" in printed.out and "broken.png" in printed.err


def test_the_numbers_are_those_of_the_files(run, photos, tmp_path):
    out = tmp_path / "out"
    _, rows = reconstruct(run, out, photos, "--batch_size", 1)
    before, after = pixels(photos / "b.png"), pixels(out / "b.png")
    row, mean = rows[1], rows[-1]
    assert float(row["psnr"]) == pytest.approx(psnr(before, after).item(), abs=0.02)  # the file has 8 bits
    assert float(row["ssim"]) == pytest.approx(ssim(before, after).item(), abs=2e-3)
    assert float(row["l1"]) == pytest.approx((before - after).abs().mean().item(), abs=2e-3)
    assert 1 <= int(row["codes"]) <= 16 and row["perplexity"] == ""
    assert mean["file"] == "mean of 3"
    assert float(mean["l1"]) == pytest.approx(np.mean([float(row["l1"]) for row in rows[:-1]]))
    most = max(int(row["codes"]) for row in rows[:-1])
    assert float(mean["usage_percent"]) >= 100 * most / 16 and 1 <= float(mean["perplexity"]) <= 16
    _, batched = reconstruct(run, tmp_path / "batched", photos, "--batch_size", 4)
    for one, many in zip(rows, batched, strict=True):
        assert float(one["psnr"]) == pytest.approx(float(many["psnr"]), rel=1e-3)


def test_size_and_single_files(run, photos, tmp_path):
    status, rows = reconstruct(run, tmp_path / "out", photos / "a.jpg", photos / "sub/c.png", "--size", 32)
    assert status == 0 and [row["width"] for row in rows[:-1]] == ["32", "32"]
    assert Image.open(tmp_path / "out/c.png").size == (32, 32)


def test_names_that_differ_in_the_ending_alone(run, photos, tmp_path):
    Image.open(photos / "a.jpg").save(photos / "a.png")
    reconstruct(run, tmp_path / "out", photos)
    assert (tmp_path / "out/a.png").exists() and (tmp_path / "out/a.png.png").exists()


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_names_of_several_folders_and_of_the_sheet(run, tmp_path):
    for i, name in enumerate(("x/a.png", "y/a.png", "z/A.jpg", "x/comparison.png", "a.png")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(path)
    folders = [tmp_path / "in" / name for name in ("x", "y", "z", "a.png", "x/a.png")]  # the last one twice
    status, rows = reconstruct(run, tmp_path / "out", *folders)
    assert status == 0 and len(rows) == 5 + 1
    names = [path.name for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len({name.lower() for name in names}) == 6 and "comparison.png" in names
    assert Image.open(tmp_path / "out/comparison.png").size == (4 * 18 + 2, 3 * 18 + 2)  # of 5 pairs


def test_no_input_is_replaced(run, photos, tmp_path, capsys):
    before = files_of(photos)
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "b.png").write_bytes(b"something of somebody's")
    for inputs, out, message in (
        ([photos], photos, f"--outdir {photos} lies in {photos}, which is read"),
        ([photos], photos / "out", f"lies in {photos}, which is read"),
        ([photos / "b.png"], photos, "b.png would replace an input"),
        ([photos / "b.png"], beside, "b.png exists and is not marked as written by taming"),
        ([photos / "sub/../b.png"], photos / "sub/..", "b.png would replace an input"),
    ):
        assert reconstruct(run, out, *inputs)[0] == 1
        assert message in capsys.readouterr().err
    assert files_of(photos) == before and [path.name for path in beside.iterdir()] == ["b.png"]


def test_the_table_of_a_run_is_not_replaced(run, photos, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,0.5\n")
    assert main(["-r", run, "-o", str(tmp_path), "--device", "cpu", str(photos / "b.png")]) == 1
    assert "metrics.csv exists and is another table" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n1,0.5\n"


def test_results_of_before_are_replaced(run, photos, tmp_path):
    for _ in range(2):
        status, rows = reconstruct(run, tmp_path / "out", photos)
        assert status == 0 and len(rows) == 4


def test_the_first_stage_of_a_transformer(photos, tmp_path):
    gpt = {"vocab_size": 16, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}
    model = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "first_stage_config": STAGE, "cond_stage_config": "__is_unconditional__",
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        },
    }
    run = save_exported(instantiate_from_config(model), {"model": model}, tmp_path / "run")
    status, rows = reconstruct(str(run), tmp_path / "out", photos / "b.png")
    assert status == 0 and len(rows) == 2


def test_packages_are_allowed(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "stages_of_mine.py").write_text(
        "from taming.models.vqgan import VQModel\nclass Mine(VQModel): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"model": STAGE | {"target": "stages_of_mine.Mine"}}
    run = str(save_exported(instantiate_from_config(STAGE), config, tmp_path / "run"))
    assert reconstruct(run, tmp_path / "out", photos / "b.png")[0] == 1
    assert "--allow stages_of_mine" in capsys.readouterr().err
    assert reconstruct(run, tmp_path / "out", photos / "b.png", "--allow", "stages_of_mine")[0] == 0


def test_errors_are_one_line(run, photos, tmp_path, capsys):
    for arguments, message in (
        ([photos / "broken.png"], "none of 1 images could be read"),
        ([tmp_path / "nothing.png"], "none of 1 images could be read"),
        ([photos, "--size", 30], "not a multiple of f = 4"),
    ):
        assert reconstruct(run, tmp_path / "out", *arguments)[0] == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0]
    assert main(["-r", run, "-o", str(photos / "b.png"), str(photos)]) == 1
    assert "b.png is a file: name another folder" in capsys.readouterr().err
    for word in ("--size", "--batch-size"):
        with pytest.raises(SystemExit):
            reconstruct(run, tmp_path / "out", photos, word, 0)
        assert f"argument {word}: 0 is not a whole number of at least 1" in capsys.readouterr().err
    Image.new("RGB", (3, 9)).save(photos / "tiny.png")
    assert reconstruct(run, tmp_path / "out", photos / "tiny.png")[0] == 1
    assert "smaller than 4 pixels" in capsys.readouterr().err


NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}


def exported(folder, target, **params):
    torch.manual_seed(0)
    model = {"target": f"taming.models.{target}", "params": params}
    return str(save_exported(instantiate_from_config(model), {"model": model}, folder))


def test_codes_of_two_levels_are_counted_together(photos, tmp_path, capsys):
    ddconfig = dict(in_channels=3, out_ch=3, resolution=16, ch=8, num_res_blocks=1, res_ch=4)
    run = exported(
        tmp_path / "run", "vqvae2.VQVAE2", ddconfig=ddconfig, n_embed=1, embed_dim=4, lossconfig=NO_LOSS
    )
    status, rows = reconstruct(run, tmp_path / "out", photos / "b.png")
    assert status == 0 and rows[0]["codes"] == "2"  # the only one of each level
    assert rows[-1]["usage_percent"] == "100.0"
    assert "100.0 % of the codebook" in capsys.readouterr().out


def test_autoencoders_without_codes(photos, tmp_path, capsys):
    kl = exported(
        tmp_path / "kl", "autoencoder_kl.AutoencoderKL", ddconfig={**DD, "double_z": True}, embed_dim=4,
        lossconfig=NO_LOSS,
    )
    status, rows = reconstruct(kl, tmp_path / "out", photos)
    assert status == 0 and len(rows) == 4 and {row["codes"] for row in rows} <= {"0", "0.0"}
    assert rows[-1]["usage_percent"] == "" and "codebook" not in capsys.readouterr().out
    assert pixels(tmp_path / "out" / "a.png").shape == (1, 3, 16, 20)
    vae = exported(
        tmp_path / "vae", "vae.GaussianVAE", ddconfig=dict(in_channels=3, resolution=16, latent_dim=3, ch=4)
    )
    assert reconstruct(vae, tmp_path / "out", photos)[0] == 1
    assert "but the model is made for 16x16" in capsys.readouterr().err
    assert reconstruct(vae, tmp_path / "out", photos, "--size", 16)[0] == 0
