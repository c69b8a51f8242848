"""Operations of a step, and how fast and how well used a run says that it is."""

import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from taming.training.acceleration import accelerate
from taming.training.callbacks import throughput
from taming.training.callbacks.throughput import OperationCounter, measure_matmul, peak_operations
from tests.tiny import train, write_transformer, write_vqgan
from tests.training.test_acceleration import tokenizer


def test_operations_of_products_convolutions_and_their_gradients():
    linear, conv = nn.Linear(8, 16, bias=False), nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x, image = torch.rand(4, 8), torch.rand(2, 3, 6, 7)
    with OperationCounter() as counter:
        linear(x)
    assert counter.operations == 2 * 4 * 8 * 16
    with OperationCounter() as counter:
        conv(image)
    assert counter.operations == 2 * (2 * 5 * 6 * 7) * (3 * 3 * 3)
    with OperationCounter() as counter:
        linear(x.requires_grad_()).sum().backward()
    assert counter.operations == 3 * 2 * 4 * 8 * 16


def test_operations_are_those_of_torchs_counter_and_change_nothing():
    model, x = tokenizer(), torch.rand(2, 3, 16, 24)

    def step():
        model.zero_grad()
        F.l1_loss(model(x)[0], x).backward()
        return [p.grad for p in model.encoder.parameters()]

    plain = [gradient.clone() for gradient in step()]
    with FlopCounterMode(display=False) as reference:
        step()
    with OperationCounter() as counter:
        counted = step()
    assert counter.operations == reference.get_total_flops() > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
    accelerate(model, {"activation_checkpointing": True})
    with OperationCounter() as recomputing:
        step()
    assert recomputing.operations == counter.operations  # what is computed again does not count


def test_curves_of_both_stages(tmp_path, monkeypatch):
    run = train(write_vqgan(tmp_path), tmp_path / "logs", "vq", "--max_steps", 4, "--log_every_n_steps", 1)

    def rows(run):
        with open(run / "metrics.csv", newline="") as file:
            return [row for row in csv.DictReader(file) if row["perf/images_per_second"]]

    first = rows(run)
    assert len(first) == 4
    for row in first:
        assert float(row["perf/images_per_second"]) > 0
        assert 0 <= float(row["perf/data_percent"]) <= 100
        assert 0.05 < float(row["perf/peak_memory_gb"]) < 64
        assert float(row["perf/mfu_percent"]) > 0
        assert float(row["perf/hours_left"]) >= 0
    prior = train(write_transformer(tmp_path, run), tmp_path / "logs", "t", "--max_steps", 2,
                  "--log_every_n_steps", 1)
    row = rows(prior)[-1]
    codes = float(row["perf/tokens_per_second"]) / float(row["perf/images_per_second"])
    assert codes == pytest.approx(round(codes)) and codes > 1


def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch):
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_operations(torch.device("cuda"), "bf16-mixed") == 989e12
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_operations(torch.device("cuda"), "bf16-mixed") == 756e12
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device: "another")
    monkeypatch.setattr(throughput, "measure_matmul", lambda device, dtype: (device.type, dtype))
    assert peak_operations(torch.device("cuda"), "16-mixed") == ("cuda", torch.float16)
    assert peak_operations(torch.device("cpu"), "bf16-mixed") == ("cpu", torch.bfloat16)
    assert peak_operations(torch.device("cpu"), "32-true") == ("cpu", torch.float32)


def test_a_matrix_product_is_measured():
    assert 1e7 < measure_matmul(torch.device("cpu"), torch.float32, side=64, seconds=0.01) < 1e14
