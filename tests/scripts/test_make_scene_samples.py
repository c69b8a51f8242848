"""Pictures of layouts: kinds, sizes, what a window reads of a layout, arguments of 2021, errors."""

import pytest
import torch
from PIL import Image

from scripts.make_scene_samples import main  # by its name of 2021
from taming.checkpoint import save_exported
from taming.config import instantiate_from_config
from taming.data.files.images import read_image
from tests.scripts.test_make_samples import stage

KEYS = ["objects_bbox", "objects_center_points", "pose_tokens"]


def export(folder, key="objects_bbox", **more):
    """A run over 4x4 codes of 32 pixels, and layouts of the built-in landscapes."""
    gpt = {"vocab_size": 512, "block_size": 36 + 15, "n_layer": 1, "n_head": 2, "n_embd": 16}
    data = {"size": 32, "length": 5, "split": "validation", "keys": ["image", key]}
    data |= {"figures": 0.9}
    model = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": key, "first_stage_config": stage("VQModel", 3), **more,
            "cond_stage_config": {
                "target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": key},
            },
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        },
    }
    landscapes = {"target": "taming.data.landscapes.Landscapes", "params": data}
    params = {"batch_size": 2, "num_workers": 0, "validation": landscapes, "wrap": True}
    torch.manual_seed(0)
    built = instantiate_from_config(model)
    built.first_stage_model.quantize.embedding.weight.data.mul_(50.0)  # other codes, other pictures
    built.first_stage_model.decoder.conv_out.weight.data.mul_(10.0)
    for parameter in built.transformer.parameters():
        parameter.data.mul_(10.0)  # another layout, other codes
    config = {"model": model, "data": {"target": "main.DataModuleFromConfig", "params": params}}
    return str(save_exported(built, config, folder))


def draw(run, folder, *arguments):
    return main(["-r", run, "-o", str(folder), "--device", "cpu", *map(str, arguments)])


def pixels(folder, name):
    return read_image(folder / f"{name}.png").astype(int)


@pytest.mark.parametrize("key", KEYS)
def test_each_kind_of_layout(key, tmp_path):
    run, out = export(tmp_path / "run", key), tmp_path / "out"
    assert draw(run, out, "-n", 2, "-N", 2, "--batch_size", 3, "--sheets", "-R", "32,48") == 0
    assert [path.name for path in sorted((out / "layouts").iterdir())] == ["000000.png", "000001.png"]
    names = [path.name for path in sorted((out / "samples").iterdir())]
    assert names == ["000000_000.png", "000000_001.png", "000001_000.png", "000001_001.png"]
    assert pixels(out, "samples/000000_000").shape == pixels(out, "layouts/000000").shape == (32, 48, 3)
    assert (pixels(out, "samples/000000_000") != pixels(out, "samples/000000_001")).any()
    assert Image.open(out / "sheets" / "000001.png").size == (3 * 50 + 2, 36)
    assert (pixels(out, "layouts/000000") != pixels(out, "layouts/000001")).any()


def test_a_sample_is_the_same_however_many_are_drawn(tmp_path, capsys):
    run = export(tmp_path / "run")
    assert draw(run, tmp_path / "a", "-n", 2, "-N", 3) == 0
    assert draw(run, tmp_path / "b", "-n", 2, "-N", 2, "--batch_size", 1) == 0
    a, b = (pixels(tmp_path / name, "samples/000001_001") for name in "ab")
    assert abs(a - b).max() <= 1
    (tmp_path / "a" / "samples" / "000001_001.png").unlink()
    assert draw(run, tmp_path / "a", "-n", 2, "-N", 3) == 0
    assert "5 of 6 there already" in capsys.readouterr().out
    assert abs(pixels(tmp_path / "a", "samples/000001_001") - b).max() <= 1


def test_pictures_of_other_data_are_not_taken_for_these(tmp_path, capsys):
    run = export(tmp_path / "run")
    words = ["-n", 1, "-N", 1]
    assert draw(run, tmp_path / "out", *words) == 0
    assert draw(run, tmp_path / "out", *words, "data.params.validation.params.seed=5") == 1
    assert "000000_000.png was generated with data " in capsys.readouterr().err


def test_windows_read_their_part_of_the_layout_by_default(tmp_path):
    run = export(tmp_path / "run")
    for name, words in (("window", []), ("whole", ["--layout", "whole"])):
        for size in ("32x32", "48x48"):
            assert draw(run, tmp_path / name / size, "-n", 1, "-N", 1, "--resolution", size, *words) == 0
    same = [
        (pixels(tmp_path / "window" / size, "samples/000000_000")
         == pixels(tmp_path / "whole" / size, "samples/000000_000")).all()
        for size in ("32x32", "48x48")
    ]
    assert same == [True, False]  # at the training size there is one window, and it is everything


def test_arguments_of_2021(tmp_path):
    run = export(tmp_path / "run")
    data = "data={target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: "
    data += "taming.data.landscapes.Landscapes, params: {size: 32, length: 1, split: train, "
    data += "keys: [image, objects_bbox]}}}}"
    words = ["--outdir", str(tmp_path / "out"), "--ignore_base_data", "--top_k", "10", "--temperature", "0.9"]
    assert main(["-r", run, *words, "-R", "32,32", "-C", "objects_bbox", "-N", "1", data]) == 0
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["000000_000.png"]


def test_guidance_with_a_null_token(tmp_path):
    run = export(tmp_path / "run", null_token=511, cond_dropout=0.1)
    for name, words in (("plain", []), ("guided", ["--guidance", 4])):
        assert draw(run, tmp_path / name, "-n", 1, "-N", 1, "-R", "48x32", *words) == 0
    plain, guided = (pixels(tmp_path / name, "samples/000000_000") for name in ("plain", "guided"))
    assert (plain != guided).any()


def test_errors_are_one_line(tmp_path, capsys):
    run = export(tmp_path / "run")
    for arguments, message in (
        (["-R", "30x64"], "the nearest is 32x64"),
        (["-C", "pose_tokens"], "not on pose_tokens"),
        (["--guidance", "2"], "no null token"),
        (["--ignore_base_data"], "no section `data`"),
        (["data.params.validation.target=taming.data.shards.Nothing"], "Nothing"),
    ):
        assert draw(run, tmp_path / "no", *arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("error: ") == 1
    for arguments, message in (
        (["-R", "wide"], "argument -R/--resolution: wide: give HEIGHTxWIDTH in pixels"),
        (["-n", "0"], "argument -n/--num-layouts: 0 is not a whole number of at least 1"),
        (["--layout", "hole"], "'hole' is none of window, whole (did you mean whole?)"),
    ):
        with pytest.raises(SystemExit):
            draw(run, tmp_path / "no", *arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
