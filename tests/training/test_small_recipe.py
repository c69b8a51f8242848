"""The recipe of docs/small.md: small models, one folder, a run that ends when validation stops improving."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming.config import instantiate_from_config, load_config
from taming.training.checks import check_loss_files
from tests.tiny import curves, resume, train

CONFIGS = Path(__file__).parents[2] / "configs"
VQGAN, TRANSFORMER = CONFIGS / "custom_small_vqgan.yaml", CONFIGS / "custom_small_transformer.yaml"
QUICK = (  # two batches an epoch; only a validation that halves the loss many times over counts as better
    "size=32", "data.params.num_workers=0", "lightning.callbacks.early_stopping.params.patience=2",
    "lightning.callbacks.early_stopping.params.min_delta=1000", "--check_val_every_n_epoch", "1",
)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The words that name a folder of 20 images; `logs` lies beside it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        pixels = random.integers(256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return ["data.params.train.params.folder=photos"]


@pytest.fixture
def said(caplog):
    """What Lightning's callbacks log, which does not reach the root logger."""
    lightning = logging.getLogger("pytorch_lightning")
    lightning.addHandler(caplog.handler)
    yield caplog
    lightning.removeHandler(caplog.handler)


def test_a_run_of_each_stage_ends_when_validation_no_longer_improves(photos, said, capsys):
    logs = Path("logs")
    stage_1 = train(VQGAN, logs, "custom_small_vqgan", *photos, *QUICK, "model.params.ddconfig.ch=8")
    # the first validation is the best; two more do not improve on it
    validated = [row for row in curves(stage_1) if "val/rec_loss" in row]
    assert len(validated) == 3 and load_config(VQGAN).lightning.trainer.max_epochs > 100
    assert "val/rec_loss did not improve in the last 2 records" in said.text
    assert f"trained for 6 batches: {stage_1}" in capsys.readouterr().out

    resume(stage_1)  # the next validation ends it again
    assert len([row for row in curves(stage_1) if "val/rec_loss" in row]) == 4

    said.clear()
    stage_2 = train(  # finds stage 1 by the name that the file gives
        TRANSFORMER, logs, "custom_small_transformer", *photos, *QUICK,
        "model.params.transformer_config.params.n_layer=1",
    )
    assert len([row for row in curves(stage_2) if "val/loss" in row]) == 3
    assert "val/loss did not improve in the last 2 records" in said.text


def test_models_are_small_and_need_no_download():
    """Both stages together have about five million weights."""
    tokenizer, prior = load_config(VQGAN).model, load_config(TRANSFORMER).model.params.transformer_config
    check_loss_files(tokenizer, download=False)  # raises if a file of weights is wanted
    with torch.device("meta"):
        model = instantiate_from_config(tokenizer)
        gpt = instantiate_from_config({**prior, "params": {"block_size": 256, **prior.params}})
    sizes = [sum(p.numel() for p in each) for each in (model.generator_parameters(), gpt.parameters())]
    assert 4e6 < sum(sizes) < 6e6 and 3e6 < sizes[1]
