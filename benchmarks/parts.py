"""The frame of all benchmarks: alternating measurements, the machine's floors, a table and a JSON file.

What is compared runs alternately, in one process and over the same weights, and medians are shown, since
other work on the machine disturbs single runs. README.md in this folder says what each number means.
"""

import argparse
import ctypes
import ctypes.util
import functools
import gc
import json
import math
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch

import taming
from benchmarks.counting import Counter
from taming.util import pick_device

ROOT = Path(__file__).resolve().parents[1]
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}
F16 = {  # the published f = 16 VQGAN, 256 pixels to 16 x 16 codes
    "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
}
GPTS = {  # layers, heads, channels
    "tiny": (2, 4, 128), "87M": (12, 12, 768), "310M": (24, 16, 1024), "1.4B": (48, 24, 1536),
}
# Operations per second of dense matrix products in bfloat16, by the beginning of the name; the makers'
# larger numbers are those of sparse matrices.
PEAKS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
}
CPU = torch.device("cpu")
Row = dict[str, Any]
Part = Callable[[argparse.Namespace], list[Row]]


# ---- measuring


@dataclass
class Runs:
    """Measurements of one function: seconds, and the bytes by which its memory grew at most."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return median(self.seconds)

    def speedup(self, before: "Runs") -> float:
        """Return how many times faster than another these are: the median over neighbouring runs."""
        return median(old / new for old, new in zip(before.seconds, self.seconds, strict=True))


def in_turn(
    options: argparse.Namespace, functions: Mapping[str, Callable[[], object]], *, repeats: int | None = None,
    warm_up: bool = True, with_peak: bool = True,
) -> dict[str, Runs]:
    """Run functions alternately, so often, after one run of each that does not count if asked.

    Memory is measured in the first run of each, which on a CPU slows that run down; see `measure`.
    """
    runs = {name: Runs() for name in functions}
    clock = time.process_time if options.cpu_time else time.perf_counter
    first = 0 if warm_up else 1
    for repeat in range(first, (repeats or options.repeats) + 1):
        for name, function in functions.items():
            gc.collect()
            seconds, peak = measure(function, options.device, clock, with_peak and repeat == first)
            if repeat:
                runs[name].seconds.append(seconds)
            if peak is not None:
                runs[name].peaks.append(peak)
    return runs


def measure(
    function: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter,
    with_peak: bool = True,
) -> tuple[float, int | None]:
    """Time one call; return seconds, and the bytes by which memory grew at most, where the system tells.

    On a CPU free memory goes back to the system before its growth can be measured, and the call then waits
    for new pages, which a loop does not: time another call, without `with_peak`.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated(device) - before
    resident = reset_peak() if with_peak else None
    began = clock()
    function()
    seconds = clock() - began
    return seconds, None if resident is None else memory_status("VmHWM") - resident


def reset_peak() -> int | None:
    """Let the kernel forget the highest memory of this process; return the present one, None if it cannot."""
    try:
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)  # memory that is freed, but not given back
        Path("/proc/self/clear_refs").write_text("5")
        return memory_status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def memory_status(key: str) -> int:
    """Return bytes of this process by /proc: VmRSS now, VmHWM at most (ru_maxrss counts a parent's, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def row(what: str, runs: Runs, **derived: float) -> Row:
    """Make a line of the table: the median, all measurements, and what follows from them."""
    peak = {"peak_gb": median(runs.peaks) / 1e9} if runs.peaks else {}
    return {"what": what, "median_s": runs.median, "all_s": runs.seconds, **derived, **peak}


def compare(
    options: argparse.Namespace, functions: Mapping[str, Callable[[], object]], *, what: str = "",
    unit: str | None = None, amount: float = 1.0, against: str | None = None,
    read_bytes: Mapping[str, float] | None = None, repeats: int | None = None,
) -> list[Row]:
    """Count the operations of functions in their first run, measure them alternately, and make rows.

    Args:
        options: of the command line.
        functions: what to run, by name.
        what: begins each row.
        unit, amount: what a call works through: `images_per_s` for "images".
        against: name of the function that the others are compared with: `speedup`.
        read_bytes: memory that each function must read at least; the floor is then the time of reading it,
            else that of its operations.
        repeats: runs that count.
    """
    counted, peaks = {name: Counter() for name in functions}, {}
    for name, function in functions.items():  # the warm-up
        gc.collect()
        with counted[name]:
            _, peaks[name] = measure(function, options.device)
    runs = in_turn(options, functions, repeats=repeats, warm_up=False, with_peak=False)
    speed, rows = rates(options.device, options.quick), []
    for name, measured in runs.items():
        if not measured.peaks and (grown := peaks[name]) is not None:
            measured.peaks.append(grown)
        derived: dict[str, float] = {}
        if unit:
            derived[f"{unit}_per_s"] = amount / measured.median
        if against:
            derived["speedup"] = measured.speedup(runs[against])
        flops = counted[name].flops
        if flops:
            derived["gflop"] = sum(flops.values()) / 1e9
        floor = sum(count / speed.get(dtype, speed["float32"]) for dtype, count in flops.items())
        if read_bytes is not None:
            floor = read_bytes[name] / speed["read"]
        if floor:
            derived["share_of_floor"] = floor / measured.median
        if (peak := peak_rate(options.device)) and flops:
            derived["mfu"] = sum(flops.values()) / peak / measured.median
        rows.append(row(f"{what}, {name}" if what else name, measured, **derived))
    return rows


# ---- what the machine can do


def floors(options: argparse.Namespace) -> list[Row]:
    """What the machine gives now: matmul (GFLOP/s) and reading memory (GB/s), as torch sees them."""
    on_gpu = options.device.type == "cuda"
    side, length = (1024, 2**24) if options.quick else (8192, 2**30) if on_gpu else (2048, 2**28)
    x = torch.randn(side, side, device=options.device)
    memory = torch.ones(length, device=options.device)
    matrix = memory.view(2 ** (int(math.log2(length)) // 2), -1)
    vector, half = torch.ones(matrix.shape[1], device=options.device), x.bfloat16()
    flop, size = 2 * side**3 / 1e9, memory.nbytes / 1e9
    runs = in_turn(options, {
        "matmul float32": lambda: x @ x, "matmul bfloat16": lambda: half @ half,
        "read: sum": memory.sum, "read: matrix @ vector": lambda: matrix @ vector,
    }, repeats=max(5, options.repeats))
    units = [("gflop_per_s", flop)] * 2 + [("gb_per_s", size)] * 2
    found = zip(runs.items(), units, strict=True)
    return [row(name, each, **{unit: amount / each.median}) for (name, each), (unit, amount) in found]


@functools.cache
def rates(device: torch.device, quick: bool) -> dict[str, float]:
    """Return operations per second by dtype, and bytes per second under "read", measured once per run."""
    options = argparse.Namespace(device=device, quick=quick, repeats=5, cpu_time=False)
    rows = floors(options)
    found = {each["what"].removeprefix("matmul "): each["gflop_per_s"] * 1e9 for each in rows[:2]}
    return {**found, "read": max(each["gb_per_s"] for each in rows[2:]) * 1e9}


def peak_rate(device: torch.device) -> float | None:
    """Return the operations per second in bfloat16 that a GPU's maker states, None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for start, rate in PEAKS.items() if name.startswith(start)), None)


def machine(device: torch.device = CPU) -> Row:
    """Describe what the numbers depend on, without names of the host or its paths."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    on_gpu = device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if on_gpu else {}
    return {
        **gpu, "processor": names[0] if names else platform.processor(),
        "cores": cores, "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "load_average": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__, "taming": taming.__version__,
        "lightning": pl.__version__,
    }


def kind_of(described: Row) -> str:
    """Name the kind of a machine: the folder of its results."""
    words = described.get("gpu") or f"{described['cores']} cores {described['processor']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


# ---- sizes and models


def pick(options: argparse.Namespace, name: str, full: Any, quick: Any) -> Any:
    """Return the value of an option, or the part's own, which `--quick` makes small."""
    given = getattr(options, name)
    return given if given is not None else quick if options.quick else full


def copies_of(function: Callable[[], object], count: int) -> Callable[[], None]:
    """Return a function that runs another so often."""

    def run() -> None:
        for _ in range(count):
            function()

    return run


# ---- the command


def show(found: Row) -> str:
    """Phrase a row of the table."""
    low, high = min(found["all_s"]), max(found["all_s"])
    unit, scale = ("s", 1.0) if found["median_s"] >= 0.1 else ("ms", 1e3)
    spread = f"({low * scale:.3f} .. {high * scale:.3f})"
    return f"{found['what']:62} {found['median_s'] * scale:8.3f} {unit:2} {spread:22} {derived(found)}"


def derived(found: Row) -> str:
    """Phrase what follows from the times of a row."""
    plain = ("what", "median_s", "all_s")
    return "  ".join(f"{key} {value:.4g}" for key, value in found.items() if key not in plain)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all parts share."""
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="measurements of each; default: 3")
    add("--quick", action="store_true", help="small sizes, to see that it runs: the numbers mean nothing")
    add("--threads", type=int, help="threads of torch; default: its own choice")
    add("--device", type=pick_device, default=pick_device(), help="default: a GPU if there is one")
    add("--cpu-time", action="store_true", help="count CPU time, not wall time: for a busy machine")
    add("--out", type=Path, help="the JSON file; default: benchmarks/results/<machine>/<date>.json")
    add("--batch", type=int, help="images or sequences at once")
    add("--pixels", type=int, help="side of the images; default: 256")
    add("--ch", type=int, help="channels of the VQGAN at full resolution; default: 128")
    add("--gpt", choices=GPTS, help="size of the transformer")
    add("--tokens", type=int, help="codes of an image; default: 256")
    add("--compile", action="store_true", help="compile encoder, decoder, discriminator and blocks")


def run_parts(parts: Mapping[str, Part], options: argparse.Namespace, argv: list[str]) -> Path:
    """Run the parts that `options.parts` names; print a table, write it to a JSON file, return its path."""
    if options.threads:
        torch.set_num_threads(options.threads)
    command = f"python -m benchmarks {shlex.join(argv)}".rstrip()
    described = machine(options.device)
    date = time.strftime("%Y-%m-%d %H:%M")
    results: Row = {"command": command, "date": date, "machine": described, "parts": {}}
    print(command, *(f"{key}: {value}" for key, value in described.items()), sep="\n", flush=True)
    default = ROOT / "benchmarks" / "results" / kind_of(described) / f"{time.strftime('%Y-%m-%d_%H-%M')}.json"
    file = options.out or default
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts or parts:
        print(f"\n{name}: {(parts[name].__doc__ or '').splitlines()[0]}", flush=True)
        results["parts"][name] = parts[name](options)
        for found in results["parts"][name]:
            print(f"  {show(found)}", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")  # what is measured is kept
        release(options.device)
    print(f"\nwritten to {file}")
    return file


def release(device: torch.device) -> None:
    """Free the memory of a part before the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
