"""The comparison of priors: readings of curves, sizes, and the command from start to end."""

import csv
import json
import math

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from taming.cli import main
from taming.config import find_config, instantiate_from_config, load_config
from taming.data.codes.writer import CodeWriter
from taming.data.sampler import SeededDataset
from taming.inference.encode import encode_dataset, header_of
from taming.training.checks import check_agreement
from taming.training.compare_priors import (
    Codes,
    Comparison,
    Point,
    PriorRun,
    build_model,
    choose_sizes,
    codes_hash,
    encode,
    mean_and_error,
    nll_at,
    read_comparison,
    step_at,
    summarize,
    table,
)

STAGE = {"target": "taming.models.vqgan.VQModel", "params": dict(
    ddconfig=dict(double_z=False, z_channels=8, resolution=32, in_channels=3, out_ch=3, ch=8,
                  ch_mult=[1, 1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4),
    lossconfig={"target": "taming.modules.losses.DummyLoss"}, n_embed=16, embed_dim=4,
)}


def landscapes(length, split):
    return {"target": "taming.data.landscapes.Landscapes", "params": {
        "size": 32, "keys": ["image", "class_label"], "length": length, "split": split}}


def configuration(**changes):
    return {
        "comparison": {
            "parameters": 8400, "steps": 4, "evaluate_every": 2, "seeds": [0, 1], "reference": "PixelSNAIL",
            "priors": {
                "GPT": {"target": "taming.modules.transformer.mingpt.GPT",
                        "params": {"vocab_size": 16, "n_head": 2, "embd_pdrop": 0.1},
                        "sizes": {"n_layer": [1, 2], "n_embd": [18, 20, 22, 24]}},
                "PixelSNAIL": {"target": "taming.modules.priors.pixelsnail.PixelSNAIL",
                               "params": {"vocab_size": 16, "n_block": 1, "n_res_block": 1, "kernel_size": 3,
                                          "n_head": 2},
                               "sizes": {"channel": [8, 12, 13, 16], "res_channel": list(range(4, 20))}},
            },
        } | changes,
        "model": {
            "base_learning_rate": 1.0e-3, "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": {"first_stage_config": STAGE, "cond_stage_key": "class_label", "pkeep": 0.9,
                       "cond_stage_config": {"target": "taming.modules.util.Labelator",
                                             "params": {"n_classes": 16}}},
        },
        "data": {"target": "taming.data.datamodule.DataModuleFromConfig", "params": {
            "batch_size": 4, "num_workers": 0,
            "train": landscapes(10, "train"), "validation": landscapes(5, "validation"),
        }},
    }


@pytest.fixture
def yaml_file(tmp_path):
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(configuration()))
    return file


def curve(pace, slope, steps=(0, 10, 20, 30)):
    return [Point(step, pace * step, math.nan, 6.0 - slope * step) for step in steps]


def test_readings_are_interpolated_and_never_extrapolated():
    points = curve(0.5, 0.1)
    assert nll_at(points, "step", 20) == 4.0 and nll_at(points, "step", 15) == pytest.approx(4.5)
    assert nll_at(points, "seconds", 2.5) == pytest.approx(5.5) and step_at(points, 12.5) == pytest.approx(25)
    assert nll_at(points, "step", 0) == 6.0 and nll_at(points, "seconds", 15.0) == 3.0
    for axis, value in (("step", 31), ("seconds", 15.1), ("step", -1)):
        message = f"{axis} = {value:g} is outside of the curve, 0 to .*: train longer"
        with pytest.raises(ValueError, match=message):
            nll_at(points, axis, value)
    with pytest.raises(ValueError, match="outside of the curve, nothing"):
        nll_at([], "step", 0)


def test_means_have_standard_errors():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([2.0])[0] == 2.0 and math.isnan(mean_and_error([2.0])[1])


def test_equal_steps_and_equal_time():
    """Per seed: the time is that which the reference of the same seed took for its steps."""
    curves = {
        "slow": {0: curve(2.0, 0.1, (0, 10, 20)), 1: curve(2.0, 0.1, (0, 10, 20))},
        "fast": {0: curve(1.0, 0.05, (0, 10, 20)), 1: curve(0.5, 0.05, (0, 10, 20))},
    }
    found = summarize(curves, {"slow": 7, "fast": 8}, "fast", 20)
    assert [one["nll_at_steps"] for one in found["seeds"]["slow"]] == [4.0, 4.0]
    assert [one["nll_at_time"] for one in found["seeds"]["slow"]] == pytest.approx([5.0, 5.5])  # 20 s, 10 s
    assert found["priors"]["slow"]["nll_at_time"] == (pytest.approx(5.25), pytest.approx(0.25))
    assert found["priors"]["slow"]["steps_at_time"][0] == pytest.approx(7.5)
    assert found["priors"]["fast"]["nll_at_time"] == found["priors"]["fast"]["nll_at_steps"] == (5.0, 0.0)
    text = table({"protocol": {"codes": "4x4 of 16", "seeds": [0, 1], "steps": 20, "reference": "fast",
                               "device": "cpu", "threads": 1}, **found})
    assert "| slow | 7 | 4.000 ± 0.000 | 5.250 ± 0.250 | 8 | 2.000 |" in text


def test_sizes_are_those_nearest_to_the_number():
    config, comparison = read_comparison(OmegaConf.create(configuration()), "table.yaml")
    first = comparison.priors["GPT"]
    model = build_model(config, {**first, "params": first["params"] | {"n_layer": 1, "n_embd": 20}}, 0)
    numbers = []
    for prior in comparison.priors.values():  # some widths are not divided by the heads, and left out
        chosen, number = choose_sizes(model, prior, 8400)
        numbers.append(number)
        built = build_model(config, chosen, 0).transformer
        assert sum(p.numel() for p in built.parameters()) == number
    assert abs(numbers[0] - numbers[1]) < 0.02 * min(numbers) and abs(numbers[0] - 8400) <= 84
    with pytest.raises(ValueError, match="no sizes of .*GPT have 9,000,000 parameters within 1%: n_lay"):
        choose_sizes(model, first, 9_000_000)
    with pytest.raises(ValueError, match="n_embd: 9 is not a multiple of n_head: 2"):
        choose_sizes(model, {**first, "sizes": {"n_embd": [9]}}, 8400)
    with pytest.raises(ValueError, match="1200 combinations of the sizes"):
        choose_sizes(model, {**first, "sizes": {"n_embd": range(1200)}}, 8400)


def test_the_command(yaml_file, tmp_path, capsys):
    outdir = tmp_path / "out"
    words = ["compare-priors", str(yaml_file), "-o", str(outdir), "--device", "cpu"]
    assert main(words) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "GPT: " in text and "parameters, n_embd=24, n_layer=1\n" in text
    result = json.loads((outdir / "result.json").read_text())
    sizes = [prior["parameters"] for prior in result["priors"].values()]
    assert max(sizes) <= 1.02 * min(sizes)
    assert result["protocol"]["codes"] == "4x4 of 16" and result["protocol"]["train_grids"] == 10
    with open(outdir / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("GPT", "PixelSNAIL"):
        for seed in (0, 1):
            mine = [row for row in rows if (row["prior"], row["seed"]) == (name, str(seed))]
            assert [int(row["step"]) for row in mine][:3] == [0, 2, 4]
            assert sorted(mine, key=lambda row: float(row["seconds"])) == mine
            given = next(one for one in result["seeds"][name] if one["seed"] == seed)
            assert given["nll_at_steps"] == float(mine[2]["nll"])
            assert abs(float(mine[0]["nll"]) - math.log(16)) < 0.3
    assert text.endswith((outdir / "table.md").read_text())
    before = (outdir / "curves.csv").read_text()
    assert main(words) == 0  # nothing is left to train
    assert (outdir / "curves.csv").read_text() == before and "step 2" not in capsys.readouterr().out
    assert main([*words, "comparison.steps=6"]) == 1
    assert "holds a comparison with other settings: choose another folder" in capsys.readouterr().err


def make_run(config, prior, folder, seed=0):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(16, (n, 17), generator=generator) for n in (10, 3)]
    sets = [Codes(each[:, 1:], [each[:, :1]]) for each in values]
    model = build_model(config, prior, seed)
    model.learning_rate = 1e-3
    file = folder / "run.ckpt"
    return PriorRun(model, *sets, batch_size=4, seed=seed, views=1, file=file, log=lambda point: None)


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    config, comparison = read_comparison(OmegaConf.create(configuration()), "table.yaml")
    prior = comparison.priors["GPT"]  # with dropout, and replaced codes
    prior = {**prior, "params": prior["params"] | {"n_layer": 1, "n_embd": 8}}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = make_run(config, prior, tmp_path / "whole")
    whole.until(6, 0.0, 2)
    make_run(config, prior, tmp_path / "parts").until(2, 0.0, 2)
    torch.rand(7)  # other random numbers in between
    parts = make_run(config, prior, tmp_path / "parts")
    parts.until(6, 0.0, 2)
    assert [(p.step, p.nll) for p in parts.curve] == [(p.step, p.nll) for p in whole.curve]
    assert [p.train_loss for p in parts.curve[1:]] == [p.train_loss for p in whole.curve[1:]]
    assert [p.seconds for p in parts.curve] == sorted(p.seconds for p in parts.curve)  # time adds up
    networks = [each.model.transformer.parameters() for each in (parts, whole)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*networks, strict=True))
    before = whole.curve[-1].step
    whole.until(6, whole.curve[-1].seconds + 1e-9, 2)  # at least the time as well
    assert whole.curve[-1].step > before


def test_a_code_cache_gives_the_same_codes(tmp_path):
    config, comparison = read_comparison(OmegaConf.create(configuration()), "table.yaml")
    prior = comparison.priors["GPT"]
    model = build_model(config, {**prior, "params": prior["params"] | {"n_layer": 1, "n_embd": 8}}, 0).eval()
    data = instantiate_from_config(config.data)
    data.setup()
    dataset = SeededDataset(data.datasets["train"], data.seed)
    header = header_of(model, dataset, {}, split="train", views=1, batch_size=4)
    encode_dataset(model, dataset, CodeWriter(tmp_path / "train.tcc", header, 4))
    config.data.params.train = {
        "target": "taming.data.codes.CodeDataset", "params": {"path": str(tmp_path / "train.tcc")},
    }
    cached = instantiate_from_config(config.data)
    cached.setup()
    check_agreement(config, model, cached)
    assert codes_hash(encode(model, data, "train")) == codes_hash(encode(model, cached, "train"))


def test_codes_are_identified():
    one, other = (Codes(torch.full((2, 3), i), [torch.zeros(2, 1, dtype=torch.int64)]) for i in (0, 1))
    assert codes_hash(one) == codes_hash(one) != codes_hash(other)
    assert codes_hash(one, other) != codes_hash(other, one)


@pytest.mark.parametrize(("change", "message"), [
    (dict(steps=0), "comparison does not accept steps: 0; it must be a whole number of at least 1"),
    (dict(seeds=[]), r"does not accept seeds: \[\]"),
    (dict(reference="RAR"), "comparison.reference: 'RAR' is none of the priors: GPT, PixelSNAIL"),
    (dict(stepps=3), r"comparison does not accept 'stepps' \(did you mean steps"),
    (dict(priors={"PixelSNAIL": {"params": {}}}), "comparison.priors.PixelSNAIL: write target, params"),
])
def test_a_wrong_section(change, message):
    with pytest.raises(ValueError, match=message):
        read_comparison(OmegaConf.create(configuration(**change)), "table.yaml")


def test_a_configuration_for_training_is_none():
    with pytest.raises(ValueError, match="no section `comparison"):
        read_comparison(load_config(find_config("demo/transformer")), "demo/transformer")


@pytest.mark.parametrize("table, tokenizer", [
    ("tables/landscapes_priors", "landscapes/landscapes_vqgan"),
    ("tables/photos_priors", "custom_small_vqgan"),
])
def test_shipped_tables_have_priors_of_equal_size(table, tokenizer):
    given = ["data.params.train.params.folder=photos"]
    config, comparison = read_comparison(load_config(find_config(table), given), "table")
    stage = load_config(find_config(tokenizer), given)
    config.model.params.first_stage_config = OmegaConf.to_container(stage, resolve=True)["model"]
    config.model.params.first_stage_config.params.lossconfig = {"target": "taming.modules.losses.DummyLoss"}
    prior = comparison.priors["GPT"]
    model = build_model(config, {**prior, "params": prior["params"] | {"n_layer": 1, "n_embd": 64}}, 0)
    numbers = [choose_sizes(model, each, comparison.parameters)[1] for each in comparison.priors.values()]
    assert max(numbers) <= 1.02 * min(numbers) and isinstance(comparison, Comparison)
