"""Checkpoints with changed bytes: each loads with the weights that were written, or is one line of error.

2,000 mutations run by default, 20,000 with TAMING_FUZZ=20000.
"""

import os
import random
import signal
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from taming.checkpoint import load_model, read_checkpoint, save_exported, write_checkpoint
from taming.checkpoint.families import identify
from taming.config import ConfigError, instantiate_from_config, load_config
from tests.checkpoint.published import LAYOUTS, meta, pack, shard, to_flax

TOTAL = int(os.environ.get("TAMING_FUZZ", "2000"))
SECONDS = 20  # that any file may take
LEGACY = Path(__file__).parent / "golden" / "legacy_lightning_1_0.ckpt"
GPT = {"vocab_size": 7, "block_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 4}
CONFIG = {"model": {"target": "taming.modules.transformer.mingpt.GPT", "params": GPT}}


@pytest.fixture
def watchdog():
    """Fail where a file takes too long."""

    def too_long(*_):
        raise AssertionError(f"took more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def mutations(data: bytes, count: int, seed: int):
    """Yield copies of `data` with changes: flipped bits, overwritten bytes and numbers, cuts, repeats."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            place = rng.randrange(len(changed))
            kind = rng.randrange(6)
            if kind < 3:
                changed[place] ^= 1 << rng.randrange(8)
            elif kind == 3:
                changed[place] = rng.randrange(256)
            elif kind == 4:
                changed[place:place + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            elif rng.random() < 0.5:
                del changed[place:place + rng.randrange(1, 40)]
            else:
                changed[place:place] = changed[place:place + rng.randrange(1, 40)]
        yield bytes(changed)


def check(file: Path, read, expected: dict[str, torch.Tensor], count: int, watchdog) -> None:
    data = file.read_bytes()
    silent = 0
    for number, changed in enumerate(mutations(data, count, seed=len(data))):
        file.write_bytes(changed)
        watchdog()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read()
        except ValueError as error:
            text = str(error)
            assert file.name in text or "config" in text or "model" in text, (number, text)
            assert len(text.splitlines()) == 1, (number, text)
            continue
        silent += 1
        assert found.keys() == expected.keys(), number
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"mutation {number} loads other weights for {key}"
    assert silent < count


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return instantiate_from_config(CONFIG["model"])


@pytest.mark.slow
def test_checkpoints_of_today(tmp_path, weights, watchdog):
    file = tmp_path / "run" / "last.ckpt"
    write_checkpoint({"state_dict": weights.state_dict(), "config": CONFIG, "batches_seen": 3}, file)
    read = lambda: load_model(file)[0].state_dict()  # noqa: E731
    check(file, read, weights.state_dict(), TOTAL * 35 // 100, watchdog)


@pytest.mark.slow
def test_exports(tmp_path, weights, watchdog):
    file = save_exported(weights, CONFIG, tmp_path / "export") / "model.safetensors"
    read = lambda: load_model(file)[0].state_dict()  # noqa: E731
    check(file, read, weights.state_dict(), TOTAL * 35 // 100, watchdog)


@pytest.mark.slow
def test_checkpoints_of_2021(tmp_path, watchdog):
    file = tmp_path / "old.ckpt"
    file.write_bytes(LEGACY.read_bytes())
    expected = read_checkpoint(file)["state_dict"]
    read = lambda: read_checkpoint(file, tensors=("state_dict",))["state_dict"]  # noqa: E731
    check(file, read, expected, TOTAL // 10, watchdog)


@pytest.mark.slow
def test_configurations(tmp_path, watchdog):
    """A changed configuration is one line of error, or builds a model or none; never anything else."""
    file = tmp_path / "config.yaml"
    section = OmegaConf.create({**CONFIG, "other": "${model.params.n_embd}", "data": [1, {"a": "b"}]})
    OmegaConf.save(section, file)
    for number, changed in enumerate(mutations(file.read_bytes(), TOTAL // 5, seed=4)):
        file.write_bytes(changed)
        watchdog()
        try:
            OmegaConf.to_container(load_config(file))
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and "config.yaml" in str(error), (number, str(error))


@pytest.mark.slow
def test_published_forms(tmp_path, watchdog):
    """Arrays of flax have no checksums; a change of their structure is one line of error, as of an index."""
    state = {f"down.{i}.conv.weight": torch.rand(4, 3, 3, 3) for i in range(6)} | {"norm.bias": torch.ones(5)}
    index = shard(state, tmp_path, "pytorch_model.bin") / "pytorch_model.bin.index.json"
    flax = tmp_path / "flax_model.msgpack"
    flax.write_bytes(pack(to_flax(state)))
    for file in (flax, index):
        for number, changed in enumerate(mutations(file.read_bytes(), TOTAL // 10, seed=5)):
            file.write_bytes(changed)
            watchdog()
            try:
                found = read_checkpoint(file)["state_dict"]
            except ValueError as error:
                assert file.name in str(error) and len(str(error).splitlines()) == 1, (number, str(error))
                continue
            assert all(isinstance(value, torch.Tensor) for value in found.values()), number


@pytest.mark.slow
def test_names_of_families_with_other_shapes(watchdog):
    """Whatever shapes the tensors have, it is a config or one line of error."""
    rng = random.Random(6)
    for layout, shapes in LAYOUTS.items():
        for number in range(TOTAL // 100):
            state = meta(shapes)
            for key in rng.sample(sorted(state), rng.choice((1, 3, 20))):
                if rng.random() < 0.4:
                    del state[key]
                    continue
                shape = [rng.choice((0, 1, 3, 96, 2**12)) for _ in range(rng.randrange(6))]
                state[key] = torch.empty(shape, device="meta")
            watchdog()
            try:
                published = identify(state)
                section = published and published.model
                weights = published and published.state
            except ValueError as error:
                assert len(str(error).splitlines()) == 1, (layout, number, str(error))
                continue
            assert published is None or ("target" in section and len(weights) > 0), (layout, number)
