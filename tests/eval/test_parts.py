"""Parts: the same numbers from one process or several, after an interruption, in the order of the images."""

import threading

import pytest
import torch

from taming.eval import parts
from taming.eval.parts import Parts, batches, joined


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(parts, "PART", 4)


def measure(numbers):
    return {
        "square": torch.tensor([n * n for n in numbers]),
        "bad": torch.tensor([n for n in numbers if n == 5]),
    }


def as_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(parts, "rank_and_world_size", lambda: (rank, world_size))


def test_all_images_in_their_order(tmp_path):
    job = Parts(tmp_path, {"a": 1}, 10)
    job.measure(measure, "images")
    found = job.collect()
    assert found["square"].tolist() == [n * n for n in range(10)] and found["bad"].tolist() == [5]
    assert job.collect("bad").keys() == {"bad"}
    job.remove()
    assert list(tmp_path.iterdir()) == []


def test_several_processes_share_the_parts(tmp_path, monkeypatch):
    job, computed = Parts(tmp_path, {"a": 1}, 22), {}
    for rank in (2, 0, 1):
        as_process(monkeypatch, rank, 3)
        computed[rank] = []
        job.measure(
            lambda numbers, rank=rank: computed[rank].append(numbers[0]) or measure(numbers), "images"
        )
    assert computed == {0: [0, 12], 1: [4, 16], 2: [8, 20]}
    assert job.collect()["square"].tolist() == [n * n for n in range(22)]


def test_a_process_waits_for_the_parts_of_others(tmp_path, monkeypatch):
    job = Parts(tmp_path, {"a": 1}, 8)
    as_process(monkeypatch, 0, 2)
    job.measure(measure, "images")

    def other():
        as_process(monkeypatch, 1, 2)
        job.measure(measure, "images")

    late = threading.Timer(0.5, other)
    late.start()
    assert job.collect()["square"].tolist() == [n * n for n in range(8)]
    late.join()


def test_an_interrupted_evaluation_goes_on(tmp_path):
    seen = []

    def compute(numbers):
        seen.append(numbers)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(numbers)

    job = Parts(tmp_path, {"a": 1}, 12)
    with pytest.raises(KeyboardInterrupt):
        job.measure(compute, "images")
    Parts(tmp_path, {"a": 1}, 12).measure(compute, "images")
    assert [numbers[0] for numbers in seen] == [0, 4, 4, 8]
    assert job.collect()["square"].tolist() == [n * n for n in range(12)]


def test_another_evaluation_has_other_parts(tmp_path):
    folders = {Parts(tmp_path, {"a": a, "b": "x"}, 12).folder for a in (1, 2)}
    assert len(folders) == 2
    assert Parts(tmp_path, {"b": "x", "a": 1}, 12).folder in folders


def test_batches_and_what_only_some_hold():
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    found = joined([{"a": torch.tensor([1])}, {"b": torch.tensor([2])}, {"a": torch.tensor([3])}])
    assert found["a"].tolist() == [1, 3] and found["b"].tolist() == [2]
