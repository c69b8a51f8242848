"""Callbacks apart from whole runs: when pictures are due, and that drawing them leaves training alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from taming.training.callbacks import ImageLogger, plain


class Painter:
    """Stands where a model is: it draws noise, or runs out of memory."""

    batches_seen, device, training = 12, torch.device("cpu"), True

    def __init__(self, full=False):
        self.full, self.modes = full, []

    def eval(self):
        self.train(False)

    def train(self, mode):
        self.training = mode
        self.modes.append(mode)

    def log_images(self, batch, scale=1.0):
        if self.full:
            raise torch.OutOfMemoryError
        assert not torch.is_grad_enabled()
        return {"noise": scale * torch.randn(len(batch["image"]), 3, 4, 4)}


def draw(tmp_path, painter, **params):
    plugin = SimpleNamespace(forward_context=torch.no_grad)
    trainer = SimpleNamespace(precision_plugin=plugin, default_root_dir=tmp_path, loggers=[])
    batch = {"image": torch.zeros(5, 4, 4, 3), "path": list("abcde")}
    ImageLogger(**params).log_images(trainer, painter, batch, "train")
    return tmp_path / "images" / "train" / "noise_000012.png"


@pytest.mark.parametrize(("powers", "due"), [(True, [1, 2, 4, 6, 12]), (False, [6, 12])])
def test_pictures_are_due_at_powers_of_two_and_every_n(powers, due):
    logger = ImageLogger(batch_frequency=6, increase_log_steps=powers)
    assert [batch for batch in range(14) if logger.is_due(batch)] == due
    assert not any(ImageLogger(batch_frequency=0).is_due(batch) for batch in range(14))


def test_pictures_repeat_and_leave_random_numbers_and_mode_alone(tmp_path):
    painter, state = Painter(), torch.get_rng_state()
    first = np.asarray(Image.open(draw(tmp_path, painter, max_images=2)))
    assert first.shape == (8, 14, 3)  # two pictures of 4x4 with lines of 2 around
    assert torch.equal(torch.get_rng_state(), state)
    assert painter.modes == [False, True]
    torch.rand(3)
    assert np.array_equal(np.asarray(Image.open(draw(tmp_path, painter, max_images=2))), first)


def test_unclamped_pictures_are_scaled_into_range(tmp_path):
    params = {"clamp": False, "log_images_kwargs": {"scale": 100.0}, "max_images": 1}
    pixels = np.asarray(Image.open(draw(tmp_path, Painter(), **params)))[2:-2, 2:-2]
    assert 0 < np.mean((pixels > 0) & (pixels < 255)) and (pixels.min() == 0 or pixels.max() == 255)


def test_full_memory_costs_the_pictures_only(tmp_path, caplog):
    painter = Painter(full=True)
    assert not draw(tmp_path, painter).exists()
    assert "no pictures" in caplog.text and painter.training


def test_plain_makes_containers_of_plain_python():
    from omegaconf import OmegaConf

    found = plain(OmegaConf.create({"a": [1, {"b": "${c}"}], "c": 2}))
    assert found == {"a": [1, {"b": 2}], "c": 2} and type(found["a"]) is list
