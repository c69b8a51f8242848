"""Throughput of a run, and how much of the device it uses: images and tokens per second, memory, MFU."""

import resource
import sys
import time
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from taming.training.acceleration import counting, is_recomputing
from taming.training.callbacks.clock import StepClock

GB = 1e9
COUNT_EVERY = 1000  # batches: a step changes when the discriminator starts
# Dense matrix products per second in bfloat16, in the vendor's data sheets (not those with sparsity)
PEAKS = {
    "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12,
}


class OperationCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention that run inside.

    A multiplication with its addition counts as two. What is computed again in a backward pass, to save
    memory, is left out. The operators themselves run as they would without it.

    Attributes:
        operations: the number so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not is_recomputing():
            self.operations += formula(*args, **kwargs, out_val=out)
        return out


class Throughput(Callback):
    """Measure a run, into the curves `perf/...`, every `log_every_n_steps` batches of the trainer.

        perf/images_per_second          of all devices, waiting for data included
        perf/tokens_per_second          of a prior: codes that it learns from
        perf/data_percent               share of the time that training waits for data
        perf/peak_memory_gb             of the device; of the process where that is a CPU
        perf/mfu_percent                model FLOPs utilization (Chowdhery et al. 2022, "PaLM", appendix B)
        perf/hours_left                 until the end of the whole run

    MFU is the share of the device's peak that the operations of a step would need. They are counted on the
    first batch, and every 1,000 batches; those of frozen stages are among them. The peak of a GPU is that of
    its data sheet for dense bfloat16 products; that of a CPU, and of an unknown GPU, is a matrix product,
    measured for a moment before the first batch. Nothing waits for the device.
    """

    def __init__(self) -> None:
        self.operations: int | None = None  # of a step on one device
        self.peak = 0.0  # operations per second of one device
        self._clock = StepClock()
        self._counter: OperationCounter | None = None
        self._images = 0  # of a batch, on one device

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._clock = StepClock()
        self._clock.start(trainer, pl_module)
        self.operations = None
        self.peak = peak_operations(pl_module.device, str(trainer.precision))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._clock.begin()
        self._images = pl_module.batch_size_of(batch)
        if self.operations is None or pl_module.batches_seen % COUNT_EVERY == 0:
            self._counter = OperationCounter()
            counting(True)
            self._counter.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._stop_counting()
        self._clock.end()
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.measured(trainer, pl_module), batch_size=1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._clock.pause()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
            counting(False)
            self.operations = counter.operations

    def utilization(self) -> float | None:
        """Return the MFU, 0 to 1, where operations were counted."""
        if not self.operations or not self.peak:
            return None
        return self.operations / self._clock.seconds_per_batch / self.peak

    def measured(self, trainer: Any, model: Any) -> dict[str, float]:
        """Return the values of the curves."""
        images = self._images * trainer.world_size / self._clock.seconds_per_batch
        found = {
            "images_per_second": images, "data_percent": 100 * self._clock.data_share,
            "peak_memory_gb": peak_memory(model.device) / GB,
        }
        if (tokens := model.tokens_per_image) is not None:
            found["tokens_per_second"] = images * tokens
        if (utilization := self.utilization()) is not None:
            found["mfu_percent"] = 100 * utilization
        if (left := self._clock.seconds_left(trainer, model)) is not None:
            found["hours_left"] = left / 3600
        return {f"perf/{name}": float(value) for name, value in found.items()}


def peak_memory(device: torch.device) -> int:
    """Return the most memory in bytes that was in use on a GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def peak_operations(device: torch.device, precision: str) -> float:
    """Return the floating-point operations per second that a device reaches in matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for key, peak in PEAKS.items() if key in name), None)
        if known is not None:
            return known
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    return measure_matmul(device, dtype)


def measure_matmul(device: torch.device, dtype: torch.dtype, side: int = 1024, seconds: float = 0.2) -> float:
    """Measure the operations per second of products of square matrices, the best of several."""
    side = 4 * side if device.type == "cuda" else side
    a = torch.ones(side, side, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    a @ a
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best
