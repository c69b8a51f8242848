"""How much of its speed work keeps while other processes use every core."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.parts import Row, in_turn, pick, row
from benchmarks.sampling import build_gpt, sizes
from benchmarks.training import Stepper, build_vqgan
from taming.sampling import sample_tokens
from taming.threads import measured_threads

SPIN = "while True: pass"


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Keep so many processes busy for the time of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy(options: argparse.Namespace) -> list[Row]:
    """Decoding and a training step beside one spinning process per core, on a CPU without other work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpt, steps = build_gpt(options, sizes(options)[0]), pick(options, "tokens", 64, 16)
    prefix = torch.zeros(8, 1, dtype=torch.int64, device=options.device)
    options = argparse.Namespace(**{**vars(options), "ch": options.ch or 32, "pixels": options.pixels or 64})
    stepper = Stepper(build_vqgan(options).train())
    images = {"image": torch.rand(2, options.pixels, options.pixels, 3, device=options.device) * 2 - 1}
    ways = {
        f"decode {steps} tokens, batch 8": partial(sample_tokens, gpt, prefix, steps, top_k=100),
        f"stage-1 step, {options.pixels} pixels, batch 2": partial(stepper, images),
    }
    before, rows = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        alone = in_turn(options, ways)
        with spinning(cores):
            torch.set_num_threads(chosen := measured_threads(before))
            beside = in_turn(options, ways)
            torch.set_num_threads(before)
            unchosen = in_turn(options, ways, repeats=1, warm_up=False)
    finally:
        torch.set_num_threads(before)
    for name, runs in alone.items():
        rows.append(row(f"{name}, alone, 1 thread", runs))
        for others, threads in ((beside[name], chosen), (unchosen[name], before)):
            how = "chosen" if others is beside[name] else "not chosen"
            what = f"{name}, {cores} spinning processes, {threads} threads ({how})"
            rows.append(row(what, others, of_one_thread=runs.median / others.median))
    return rows


PARTS = {"busy": busy}
