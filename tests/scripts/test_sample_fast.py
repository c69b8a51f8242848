"""Pictures from the command line: settings, classes, resumption, and errors of one line."""

import errno

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from taming.checkpoint import load_model, save_exported
from taming.cli import command, sample
from taming.cli.options import sampling_options
from taming.cli.parser import build_parser
from taming.config import instantiate_from_config
from taming.data.files.images import read_image
from taming.inference.loading import PRECISIONS, decode, load_transformer
from taming.modules.transformer.cpu_inference import PackedLinear

main = command("sample")


def parse(words):
    return build_parser(sample).read(words)


DD = {
    "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # f = 2: 8 x 8 codes
STAGE = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "ddconfig": DD, "n_embed": 16, "embed_dim": 4,
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    },
}
SOS = "__is_unconditional__"
LABELS = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 3}}
GRID = {
    "target": "taming.modules.conditioners.label_grid.LabelGrid",
    "params": {"n_labels": 10, "down_factor": 4},
}
NULL = {"null_token": 16, "cond_dropout": 0.1}  # behind the codes, 0..15
COORDINATES = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 16, "down_factor": 4}}


def export(folder, condition, key="class_label", strong=False, **more):
    """An exported run; `strong` weights heed their condition more."""
    gpt = {"vocab_size": 17, "block_size": 129, "n_layer": 1, "n_head": 2, "n_embd": 32}
    model = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": key, "first_stage_config": STAGE, "cond_stage_config": condition, **more,
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        },
    }
    torch.manual_seed(0)
    built = instantiate_from_config(model)
    built.first_stage_model.quantize.embedding.weight.data.mul_(50.0)  # other codes, other pictures
    built.first_stage_model.decoder.conv_out.weight.data.mul_(10.0)
    for parameter in built.transformer.parameters() if strong else ():
        parameter.data.mul_(10.0)
    return str(save_exported(built, {"model": model}, folder, step=7))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return export(tmp_path_factory.mktemp("labelled"), LABELS)


def draw(run, folder, *arguments):
    status = main(["-r", run, "-o", str(folder), "--device", "cpu", *map(str, arguments)])
    return status, sorted(folder.glob("sample_*.png"))


def near(a, b):
    """Equal but for rounding: another batch size is another order of sums."""
    return abs(read_image(a).astype(int) - read_image(b).astype(int)).max() <= 1


def test_a_sample_is_the_same_in_any_batch(labelled, tmp_path):
    status, all_at_once = draw(labelled, tmp_path / "a", "-n", 5, "--batch_size", 5)
    assert status == 0 and len(all_at_once) == 5
    _, in_pairs = draw(labelled, tmp_path / "b", "-n", 5, "--batch_size", 2)
    assert [path.name for path in in_pairs] == [f"sample_{i:06d}.png" for i in range(5)]
    assert all(near(a, b) for a, b in zip(all_at_once, in_pairs, strict=True))
    assert not near(all_at_once[0], all_at_once[3])  # the same class, another number
    _, other_seed = draw(labelled, tmp_path / "c", "-n", 1, "--seed", 1)
    assert not near(all_at_once[0], other_seed[0])


def test_classes_come_in_turn_and_are_noted(labelled, tmp_path):
    _, paths = draw(labelled, tmp_path, "-n", 4, "--classes", "2,0", "-k", 5, "-p", 0.9, "-t", 0.5)
    notes = [Image.open(path).info for path in paths]
    assert [note["class"] for note in notes] == ["2", "0", "2", "0"]
    expected = {"seed": "0", "top_k": "5", "top_p": "0.9", "temperature": "0.5", "step": "7"}
    assert expected.items() <= notes[0].items()
    assert Image.open(paths[0]).size == (16, 16)


def test_what_is_there_is_not_drawn_again(labelled, tmp_path, capsys):
    _, paths = draw(labelled, tmp_path, "-n", 2)
    before = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    _, paths = draw(labelled, tmp_path, "-n", 3)
    assert paths[0].stat().st_mtime_ns == before[0] and len(paths) == 3
    assert "1 of them there already" in capsys.readouterr().out
    status, _ = draw(labelled, tmp_path, "-n", 3, "-t", 0.7)
    error = capsys.readouterr().err
    assert status == 1 and "sample_000000.png was generated with temperature 1.0" in error


def test_the_sheet_has_a_row_per_class(labelled, tmp_path):
    draw(labelled, tmp_path, "-n", 6, "--grid")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (2 * 18 + 2, 3 * 18 + 2)  # 3 classes, 2 samples of each, 2 pixels between
        second = sheet.crop((20, 2, 36, 18))
    assert second.tobytes() == Image.open(tmp_path / "sample_000003.png").tobytes()
    draw(labelled, tmp_path, "-n", 4, "--grid", tmp_path / "other.png")
    assert Image.open(tmp_path / "other.png").size == (2 * 18 + 2, 2 * 18 + 2)


def test_settings_name_the_folder(tmp_path):
    run = export(tmp_path, LABELS)
    assert main(["-r", run, "-n", "1", "-k", "3", "--classes", "1", "--device", "cpu"]) == 0
    folder = tmp_path / "samples" / "seed_0_top_k_3_top_p_None_temperature_1.0_classes_1" / "7"
    assert (folder / "sample_000000.png").is_file()


def test_without_a_condition(tmp_path):
    status, paths = draw(export(tmp_path / "run", SOS), tmp_path / "out", "-n", 2, "--batch_size", 1)
    assert status == 0 and len(paths) == 2 and "class" not in Image.open(paths[0]).info
    assert not near(*paths)


def test_with_coordinates(tmp_path):
    run = export(tmp_path / "run", COORDINATES, "coord")
    status, paths = draw(run, tmp_path / "out", "-n", 2)
    assert status == 0 and len(paths) == 2 and not near(*paths)


@pytest.mark.parametrize("arguments, message", [
    (["-k", "17"], "top_k is 17: give 1 to 16, or leave it out for all"),
    (["--classes", "3"], "class id 3 is outside 0..2"),
    (["--classes", "a,1"], "--classes a,1: give class numbers"),
    (["--device", "nonsense"], "no device nonsense here"),
    (["--guidance", "2"], "has no null token to be guided away from: train it with cond_dropout"),
    (["--steps", "8"], "steps is 8, but it is for masked priors, and this one samples code by code"),
    (["--mask-order", "halton"], "mask_order is halton, but it is for masked priors"),
])
def test_errors_are_one_line(labelled, tmp_path, capsys, arguments, message):
    status, paths = draw(labelled, tmp_path, "-n", 1, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 1 and not paths
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize("words, message", [
    (["-t", "0"], "--temperature: 0 is not a number above 0"),
    (["--temperature", "-1"], "--temperature: -1 is not a number above 0"),
    (["-n", "0"], "-n/--num-samples: 0 is not a whole number of at least 1"),
    (["--top_k", "0"], "--top-k: 0 is not a whole number of at least 1"),
    (["--top_p", "0"], "--top-p: 0 is not a number above 0, at most 1"),
    (["--min_p", "2"], "--min-p: 2 is not a number of at least 0, at most 1"),
    (["--guidance", "nan"], "--guidance: nan is not a number of at least 0"),
    (["--stride", "0"], "--stride: 0 is not a whole number of at least 1"),
    (["--seed", "-1"], "--seed: -1 is not a whole number of at least 0"),
    (["--seed", "one"], "--seed: invalid int value: 'one'"),
])
def test_numbers_that_will_not_do(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(["-r", "run", *words])
    error = capsys.readouterr().err
    assert error.startswith("error: argument ") and message in error and error.count("\n") == 1


def test_where_nothing_can_be_written(labelled, tmp_path, capsys):
    file, out = tmp_path / "file", tmp_path / "out"
    file.touch()
    for words, message in (
        (["-o", file], f"--outdir {file}: {file} is a file"),
        (["-o", file / "sub"], f"--outdir {file / 'sub'}: {file} is a file"),
        (["-o", out, "--grid", tmp_path], f"--grid {tmp_path} is a folder"),
        (["-o", out, "--grid", tmp_path / "a.jpg"], "choose a name that ends in .png"),
    ):
        assert main(["-r", labelled, "--device", "cpu", "-n", "1", *map(str, words)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_samples_of_another_run_are_not_taken_for_these(labelled, tmp_path, capsys):
    draw(labelled, tmp_path / "out", "-n", 1)
    assert draw(export(tmp_path / "run", LABELS, strong=True), tmp_path / "out", "-n", 1)[0] == 1
    assert "sample_000000.png was generated with model " in capsys.readouterr().err


def test_models_that_cannot_be_sampled_say_so(tmp_path, capsys):
    stage = save_exported(instantiate_from_config(STAGE), {"model": STAGE}, tmp_path / "stage")
    assert draw(str(stage), tmp_path / "out")[0] == 1
    assert "is a VQModel: give a run of stage 2" in capsys.readouterr().err
    run = export(tmp_path / "depth", "__is_first_stage__", "depth")
    assert draw(run, tmp_path / "out")[0] == 1
    assert "conditioned on depth" in capsys.readouterr().err
    run = export(tmp_path / "sos", SOS)
    assert draw(run, tmp_path / "out", "--classes", "1")[0] == 1
    assert "not conditioned on classes" in capsys.readouterr().err
    assert draw(str(tmp_path / "nothing"), tmp_path / "out")[0] == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_class_beside_other_conditions(tmp_path, capsys):
    conditions, keys = [LABELS, GRID], ["class_label", "segmentation"]
    run = export(tmp_path / "run", conditions, keys, strong=True, **NULL)
    status, paths = draw(run, tmp_path / "out", "-n", 4)  # the label map is left out
    assert status == 0 and [Image.open(path).info["class"] for path in paths] == ["0", "1", "2", "0"]
    assert draw(run, tmp_path / "guided", "-n", 1, "--guidance", 5)[0] == 0
    assert not near(paths[0], tmp_path / "guided" / "sample_000000.png")
    run = export(tmp_path / "without", conditions, keys)
    assert draw(run, tmp_path / "no")[0] == 1
    assert "segmentation is missing: give a class number, 0 to 2; give a label map" in capsys.readouterr().err


def test_what_broke_off_is_drawn_again(labelled, tmp_path):
    _, paths = draw(labelled, tmp_path, "-n", 2)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-20])
    _, paths = draw(labelled, tmp_path, "-n", 2)
    assert paths[1].read_bytes() == whole
    paths[0].write_bytes(b"")
    assert draw(labelled, tmp_path, "-n", 2)[0] == 0 and Image.open(paths[0]).size == (16, 16)


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_reduced_precision_is_that_of_the_transformer(labelled, tmp_path, precision):
    options = parse(["-r", labelled, "--precision", precision, "--device", "cpu"])
    model, _, note = load_transformer(options.run, sampling_options(options), device=options.device)
    assert {p.dtype for p in model.transformer.parameters()} == {PRECISIONS[precision]}
    assert {p.dtype for p in model.first_stage_model.parameters()} == {torch.float32}
    assert note["precision"] == precision
    with torch.no_grad():
        cache = model.transformer.new_cache(2, 64)
    packed = [m for block in cache.blocks for m in block.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == (6 if precision == "bf16" else 0)  # the layers of a block; float16 cannot be packed
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode_to_z(x)[1], load_model(labelled)[0].encode_to_z(x)[1])
    pictures = decode(model, torch.randint(16, (1, 8, 8)))
    assert pictures.dtype == torch.float32
    status, paths = draw(labelled, tmp_path, "-n", 2, "--precision", precision)
    assert status == 0 and len(paths) == 2 and not near(*paths)


def test_the_progress_counts_tokens(labelled, tmp_path, capsys):
    draw(labelled, tmp_path, "-n", 3, "--batch_size", 2)
    error = capsys.readouterr().err
    assert "192/192" in error and "token/s" in error  # 3 pictures of 8 x 8 codes


def test_logits_that_are_no_numbers(tmp_path, capsys):
    run = export(tmp_path / "run", LABELS)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    weights["transformer.head.weight"][:] = torch.nan
    save_file(weights, tmp_path / "run" / "model.safetensors", {"format": "pt", "step": "7"})
    assert draw(run, tmp_path / "out", "-n", 1)[0] == 1
    assert "error: the logits of step 0 are NaN" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_no_part(labelled, tmp_path, monkeypatch, capsys):
    save, left = Image.Image.save, [2]

    def full(image, file, *arguments, **options):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        save(image, file, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    status, paths = draw(labelled, tmp_path, "-n", 4)
    error = capsys.readouterr().err.splitlines()[-1]
    file = tmp_path / "sample_000002.png"
    assert status == 1 and error.startswith(f"error: {file}: No space left on device; make room, then start")
    assert sorted(tmp_path.iterdir()) == paths and len(paths) == 2
    monkeypatch.undo()
    assert len(draw(labelled, tmp_path, "-n", 4)[1]) == 4
    assert "2 of them there already" in capsys.readouterr().out


def test_no_metadata_holds_a_path_of_this_machine(labelled, tmp_path):
    _, (path,) = draw(labelled, tmp_path / "out", "-n", 1)
    values = [str(value) for value in Image.open(path).info.values()]
    assert [value for value in values if "/" in value or str(tmp_path) in value] == []


def test_a_file_of_other_origin_is_not_replaced(labelled, tmp_path, capsys):
    file = tmp_path / "sample_000000.png"
    for content in (b"not a PNG", b"\x89PNG\r\n\x1a\n of somebody's"):
        file.write_bytes(content)
        assert draw(labelled, tmp_path, "-n", 1)[0] == 1
        assert "is not marked as written by taming" in capsys.readouterr().err
        assert file.read_bytes() == content
