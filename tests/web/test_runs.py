"""Which runs are offered: with and without a checkpoint, first stages, several places, none."""

import os

import pytest

from taming.web.runs import find_runs

TRANSFORMER = "model: {target: taming.models.cond_transformer.Net2NetTransformer, params: {}}"
VQGAN = "model: {target: taming.models.vqgan.VQModel, params: {}}"


def write(folder, name, model=TRANSFORMER, checkpoint="last.ckpt", age=0):
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    (run / "configs" / "project.yaml").write_text(model)
    if checkpoint:
        (run / "checkpoints" / checkpoint).write_bytes(b"weights")
    os.utime(run, (1e9 - age, 1e9 - age))
    return run


def names(*places):
    return [run.name for run in find_runs(places)]


def test_runs_below_a_folder_newest_first(tmp_path):
    write(tmp_path, "a", age=2)
    write(tmp_path, "demo/b", age=1)
    write(tmp_path, "c", checkpoint="epoch=1.ckpt", age=3)
    (tmp_path / "samples").mkdir()
    assert names(tmp_path) == ["demo/b", "a", "c"]


def test_without_a_checkpoint_it_says_so(tmp_path):
    write(tmp_path, "new", checkpoint="")
    (run,) = find_runs([tmp_path])
    assert run.problem == f"{tmp_path / 'new'} has no checkpoint yet: train it further, or choose another run"


def test_first_stages_are_listed_only_if_named(tmp_path):
    write(tmp_path, "transformer")
    first = write(tmp_path, "vqgan", VQGAN)
    unknown = write(tmp_path, "odd", "model: {target: somebody.Else}", age=9)
    assert names(tmp_path) == ["transformer", "odd"]
    assert names(first, unknown) == ["vqgan", "odd"]


def test_one_place_in_another_and_names_twice(tmp_path):
    one = write(tmp_path / "x", "run")
    two = write(tmp_path / "y", "run")
    file = one / "checkpoints" / "last.ckpt"
    assert names(one, tmp_path / "x", one) == ["run"]
    assert names(tmp_path / "x", tmp_path / "y") == [str(one), str(two)]
    assert names(file) == ["last.ckpt"]


def test_no_run_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run of a transformer in .*make demo.* -r"):
        find_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        find_runs([tmp_path / "gone"])
