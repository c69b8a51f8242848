#!/usr/bin/env python
"""How fast it samples, codes pictures and trains, beside the 2021 sampler and beside what the machine can do.

    python benchmarks/sampling.py                       all parts, half an hour on two cores
    python benchmarks/sampling.py --quick floors decode   small sizes, two parts

What is compared runs in turn, in one process and over the same weights, and medians are shown, since other
work on the machine disturbs single runs. README.md in this folder says what each number means.
"""

import argparse
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from sampler_2021 import sample_2021, window_2021
from torch import Tensor
from torch.utils.data import DataLoader

import taming
from taming.config import instantiate_from_config, load_config
from taming.modules.transformer.mingpt import GPT
from taming.sampling import image_generators, sample_tokens, sample_window

ROOT = Path(__file__).resolve().parents[1]
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}
F16 = {  # the published f = 16 VQGAN, 256 pixels to 16 x 16 codes
    "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
}
Row = dict[str, object]


# ---- measuring


def in_turn(
    repeats: int, functions: dict[str, Callable[[], object]], warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each function, run in turn `repeats` times, after one run that does not count if asked."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(0 if warm_up else 1, repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(what: str, seconds: list[float], **derived: float) -> Row:
    """One line of the table: the median, all measurements, and what follows from the median."""
    return {"what": what, "median_s": median(seconds), "all_s": seconds, **derived}


def floors(options: argparse.Namespace) -> list[Row]:
    """What the machine gives now: matmul (GFLOP/s) and reading memory (GB/s), as torch sees them."""
    side, length = (1024, 2**24) if options.quick else (2048, 2**28)
    x, memory = torch.randn(side, side), torch.ones(length)
    matrix = memory.view(2 ** (int(math.log2(length)) // 2), -1)
    vector, half = torch.ones(matrix.shape[1]), x.bfloat16()
    flop, size = 2 * side**3 / 1e9, memory.nbytes / 1e9
    seconds = in_turn(max(5, options.repeats), {
        "matmul float32": lambda: x @ x, "matmul bfloat16": lambda: half @ half,
        "read: sum": memory.sum, "read: matrix @ vector": lambda: matrix @ vector,
    })
    units = [("gflop_per_s", flop)] * 2 + [("gb_per_s", size)] * 2
    found = zip(seconds.items(), units, strict=True)
    return [row(name, s, **{unit: amount / median(s)}) for (name, s), (unit, amount) in found]


def decode(options: argparse.Namespace) -> list[Row]:
    """Tokens from a start token, top-k 100: today's sampler, 2021's, and today's in bfloat16."""
    steps, layers, heads, channels = (32, 2, 4, 128) if options.quick else (256, 12, 12, 768)
    torch.manual_seed(0)
    gpt = GPT(vocab_size=1024, block_size=512, n_layer=layers, n_head=heads, n_embd=channels).eval()
    half = deepcopy(gpt).bfloat16()
    weights = sum(p.numel() for p in (*gpt.blocks.parameters(), *gpt.head.parameters()))  # read in every step
    for batch in (1, 3):
        prefix = torch.arange(batch)[:, None]
        old, new = sample_2021(gpt, prefix, 24, 100, greedy=True), sample_tokens(gpt, prefix, 24, greedy=True)
        assert torch.equal(old, new), f"the samplers disagree: {old.tolist()} and {new.tolist()}"
    rows: list[Row] = []
    bandwidth = max(found["gb_per_s"] for found in floors(options)[2:])
    for batch in (8, 1):
        prefix = torch.zeros(batch, 1, dtype=torch.int64)
        functions = {
            "2021 float32": (lambda p=prefix: sample_2021(gpt, p, steps, 100), 4),
            "float32": (lambda p=prefix: sample_tokens(gpt, p, steps, top_k=100), 4),
            "bfloat16": (lambda p=prefix: sample_tokens(half, p, steps, top_k=100), 2),
        }
        seconds = in_turn(options.repeats, {name: f for name, (f, _) in functions.items()}, warm_up=False)
        before = seconds["2021 float32"]
        for name, (_, width) in functions.items():
            floor, time_taken = steps * weights * width / 1e9 / bandwidth, median(seconds[name])
            rows.append(row(
                f"{steps} tokens, batch {batch}, {weights / 1e6:.0f}M weights, {name}", seconds[name],
                tokens_per_s=batch * steps / time_taken, share_of_floor=floor / time_taken,
                speedup=median(old / new for old, new in zip(before, seconds[name], strict=True)),
            ))
    return rows


def window(options: argparse.Namespace) -> list[Row]:
    """Codes in the middle of a 16x64 grid, window 16x16, top-k 100, batch 1: 2021's way and today's."""
    (layers, heads, channels), count = ((2, 4, 128), 8) if options.quick else ((12, 12, 768), 16)
    torch.manual_seed(0)
    gpt = GPT(vocab_size=1024, block_size=512, n_layer=layers, n_head=heads, n_embd=channels).eval()
    half, columns = deepcopy(gpt).bfloat16(), range(16, 16 + count)
    c, known = torch.randint(1024, (2, 1, 16, 64))
    mask = torch.ones(16, 64, dtype=torch.bool)
    mask[8, columns.start : columns.stop] = False

    def today(model: GPT, **settings: object) -> Tensor:
        return sample_window(model, c, known=known, mask=mask, **settings)

    old, new = window_2021(gpt, c, known, columns[:4], 100, greedy=True), today(gpt, greedy=True)
    assert torch.equal(old[:, 8, 16:20], new[:, 8, 16:20]), "the samplers disagree"
    seconds = in_turn(options.repeats, {
        "2021 float32": lambda: window_2021(gpt, c, known, columns, 100),
        "float32": lambda: today(gpt, top_k=100), "bfloat16": lambda: today(half, top_k=100),
        "float32, stride 8": lambda: today(gpt, top_k=100, stride=8),
        "bfloat16, stride 8": lambda: today(half, top_k=100, stride=8),
    }, warm_up=False)
    before = seconds["2021 float32"]
    return [
        row(
            f"{count} codes in a window, {name}", taken, s_per_token=median(taken) / count,
            speedup=median(old / new for old, new in zip(before, taken, strict=True)),
        )
        for name, taken in seconds.items()
    ]


def wavefront(options: argparse.Namespace) -> list[Row]:
    """A whole 16x64 grid through a small GPT, one code after the other and all that can be drawn at once."""
    width = 24 if options.quick else 64
    torch.manual_seed(0)
    gpt = GPT(vocab_size=1024, block_size=512, n_layer=2, n_head=2, n_embd=64).eval()
    c, steps, codes = torch.randint(1024, (1, 16, width)), {}, {}

    def run(waves: bool) -> None:
        def count(step: int, _: Tensor) -> None:
            steps[waves] = step + 1

        one = image_generators(0, [0])
        codes[waves] = sample_window(gpt, c, wavefront=waves, generator=one, callback=count)

    seconds = in_turn(options.repeats, {"in turn": lambda: run(False), "wavefront": lambda: run(True)}, False)
    assert torch.equal(codes[False], codes[True]), "the two draw different codes"
    return [
        row(f"16x{width} codes, {name}", taken, steps=steps[name == "wavefront"])
        for name, taken in seconds.items()
    ]


def guidance(options: argparse.Namespace) -> list[Row]:
    """Tokens after a class, top-k 100, float32: without guidance, at scale 1 and at scale 2."""
    steps, layers, heads, channels = (32, 2, 4, 128) if options.quick else (256, 12, 12, 768)
    torch.manual_seed(0)
    gpt = GPT(vocab_size=1024, block_size=512, n_layer=layers, n_head=heads, n_embd=channels).eval()
    rows: list[Row] = []
    for batch in (8, 1):
        prefix, null = torch.zeros(batch, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)

        def draw(prefix: Tensor = prefix, **settings: object) -> Tensor:
            return sample_tokens(gpt, prefix, steps, top_k=100, **settings)

        seconds = in_turn(options.repeats, {
            "no guidance": draw,
            "scale 1": lambda draw=draw, null=null: draw(guidance=1.0, null_prefix=null),
            "scale 2": lambda draw=draw, null=null: draw(guidance=2.0, null_prefix=null),
        }, warm_up=False)
        plain = seconds["no guidance"]
        rows += [
            row(
                f"{steps} tokens, batch {batch}, {name}", taken,
                times_plain=median(new / old for old, new in zip(plain, taken, strict=True)),
            )
            for name, taken in seconds.items()
        ]
    return rows


TILES = """
import sys, time
from pathlib import Path
import torch
from taming.config import instantiate_from_config
from taming.modules.diffusionmodules.tiled import decode
torch.set_num_threads(int(sys.argv[5]))
params = {"ddconfig": eval(sys.argv[1]), "n_embed": 1024, "embed_dim": 256, "lossconfig": eval(sys.argv[2])}
model = instantiate_from_config({"target": "taming.models.vqgan.VQModel", "params": params}).eval()
codes = torch.randint(1024, (1, int(sys.argv[3]) // 16, int(sys.argv[4]) // 16))
start = time.perf_counter()
with torch.no_grad():
    model.decode_code(codes)
seconds = time.perf_counter() - start
peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024 / 1e9)
"""


def tiles(options: argparse.Namespace) -> list[Row]:
    """A large picture through the f = 16 VQGAN in a process of its own, once: time and its highest memory."""
    sizes = [(256, 256)] if options.quick else [(512, 1024), (1024, 4096)]
    rows = []
    for height, width in sizes:
        arguments = repr(F16), repr(NO_LOSS), str(height), str(width), str(torch.get_num_threads())
        command = [sys.executable, "-c", TILES, *arguments]
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
        what = f"decode {width}x{height} pixels"
        rows.append(row(what, [float(found[0])], peak_gb=float(found[1])))
    return rows


@torch.no_grad()
def autoencoder(options: argparse.Namespace) -> list[Row]:
    """Pictures to codes and back through the f = 16 VQGAN with 128 channels, float32."""
    batch, side = (1, 64) if options.quick else (2, 256)
    params = {"ddconfig": F16, "n_embed": 1024, "embed_dim": 256, "lossconfig": NO_LOSS}
    model = instantiate_from_config({"target": "taming.models.vqgan.VQModel", "params": params}).eval()
    x = torch.rand(batch, 3, side, side) * 2 - 1
    codes = torch.zeros(batch, side // 16, side // 16, dtype=torch.int64)
    functions = {"encode": lambda: model.encode(x), "decode": lambda: model.decode_code(codes)}
    what = f"{side} pixels, batch {batch}"
    return [
        row(f"{name}, {what}", seconds, images_per_s=batch / median(seconds))
        for name, seconds in in_turn(options.repeats, functions).items()
    ]


class Stopwatch(pl.Callback):
    """Seconds of each training batch, without the loading of its data."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def training(options: argparse.Namespace) -> list[Row]:
    """A step of each stage at the sizes of `make demo`, the discriminator and its loss included."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # advice for real trainings
    rows = []
    first = load_config(ROOT / "configs/demo/vqgan.yaml")
    second = load_config(ROOT / "configs/demo/transformer.yaml")
    stage = {"target": first.model.target, "params": {**first.model.params, "lossconfig": NO_LOSS}}
    second.model.params.first_stage_config = stage
    for name, config in (("stage 1", first), ("stage 2", second)):
        model = instantiate_from_config(config.model)
        model.learning_rate, model.batches_seen = 1e-4, 10**6  # the discriminator began before that
        data, steps = config.data.params, (2 if options.quick else 3 * options.repeats) + 2
        size = data.batch_size
        data.train.params.update(length=size * steps, cache=False)
        watch = Stopwatch()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, precision=config.lightning.trainer.precision, callbacks=[watch],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(instantiate_from_config(data.train), size))
        seconds = watch.seconds[2:]
        what = f"{name} step of the demo, {data.train.params.size} pixels, batch {size}, {trainer.precision}"
        rows.append(row(what, seconds, images_per_s=size / median(seconds)))
    return rows


# ---- the command

PARTS = {
    "floors": floors, "decode": decode, "window": window, "wavefront": wavefront, "guidance": guidance,
    "autoencoder": autoencoder, "tiles": tiles, "training": training,
}


def machine() -> Row:
    """What the numbers depend on, without names of the host or its paths."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "load_average": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__, "taming": taming.__version__,
        "lightning": pl.__version__,
    }


def show(found: Row) -> str:
    """Phrase a row of the table."""
    spread = f"({min(found['all_s']):.3f} .. {max(found['all_s']):.3f})"
    return f"{found['what']:62} {found['median_s']:8.3f} s {spread:20} {derived(found)}"


def derived(found: Row, digits: int = 3) -> str:
    """Phrase what follows from the times of a row."""
    plain = ("what", "median_s", "all_s")
    return "  ".join(f"{key} {value:.{digits}g}" for key, value in found.items() if key not in plain)


def run_parts(
    script: str, parts: dict[str, Callable[[argparse.Namespace], list[Row]]], options: argparse.Namespace,
    argv: list[str], show: Callable[[Row], str],
) -> None:
    """Run the parts that `options.parts` names, or all; print a table, and write it to a JSON file.

    Args:
        script: name of the file here, without its ending; the JSON file is named after it and the time, if
            `options.out` gives no name.
        parts: what there is, by name; the first line of a docstring is the heading.
        options, argv: of the command line.
        show: phrases a row.
    """
    command = f"python benchmarks/{script}.py {shlex.join(argv)}".rstrip()
    results = {"command": command, "date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "parts": {}}
    print(command, *(f"{key}: {value}" for key, value in results["machine"].items()), sep="\n", flush=True)
    for name in options.parts or parts:
        print(f"\n{name}: {parts[name].__doc__}", flush=True)
        results["parts"][name] = rows = parts[name](options)
        for found in rows:
            print(f"  {show(found)}", flush=True)
    suffix = "" if script == "sampling" else f"_{script}"
    name = f"{time.strftime('%Y-%m-%d_%H-%M')}{suffix}.json"
    file = options.out or Path(__file__).parent / "results" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for, print a table, and write results/<date>.json."""
    argv = sys.argv[1:] if argv is None else argv
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each; default: 3")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, to see that it runs")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/<date>.json")
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    run_parts("sampling", PARTS, options, argv, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
