"""How fast it samples and decodes, beside the samplers of 2021 and the time of reading the weights once."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from benchmarks.parts import F16, GPTS, NO_LOSS, ROOT, Row, Runs, compare, in_turn, pick, row
from benchmarks.sampler_2021 import sample_2021, window_2021
from taming.modules.transformer.mingpt import GPT
from taming.sampling import image_generators, sample_tokens, sample_window

VOCABULARY = 1024


def build_gpt(options: argparse.Namespace, name: str, block_size: int = 512) -> GPT:
    """Build a GPT of a size in `GPTS`, with its own random weights, to sample from."""
    layers, heads, channels = GPTS[name]
    torch.manual_seed(0)
    gpt = GPT(VOCABULARY, block_size, n_layer=layers, n_head=heads, n_embd=channels)
    return gpt.eval().requires_grad_(False).to(options.device)


def sizes(options: argparse.Namespace, on_gpu: tuple[str, ...] = ("310M", "1.4B")) -> tuple[str, ...]:
    """Return the sizes of transformers to measure: of the option, or those of the device."""
    if options.gpt:
        return (options.gpt,)
    return ("tiny",) if options.quick else on_gpu if options.device.type == "cuda" else ("87M",)


def decode(options: argparse.Namespace) -> list[Row]:
    """Tokens from a start token, top-k 100: 2021's sampler, today's, and today's in bfloat16."""
    steps = pick(options, "tokens", 256, 32)
    rows: list[Row] = []
    for size in sizes(options):
        gpt = build_gpt(options, size)
        half = deepcopy(gpt).bfloat16()
        weights = sum(p.numel() for p in (*gpt.blocks.parameters(), *gpt.head.parameters()))
        check_greedy(options, gpt)
        read = {name: float(steps * weights * width) for name, width in
                (("2021 float32", 4), ("float32", 4), ("bfloat16", 2))}  # all weights in every step
        for batch in (options.batch,) if options.batch else (1, 8, 64):
            prefix = torch.zeros(batch, 1, dtype=torch.int64, device=options.device)
            rows += compare(
                options,
                {
                    "2021 float32": partial(sample_2021, gpt, prefix, steps, 100),
                    "float32": partial(sample_tokens, gpt, prefix, steps, top_k=100),
                    "bfloat16": partial(sample_tokens, half, prefix, steps, top_k=100),
                },
                what=f"{steps} tokens, batch {batch}, {size}", unit="tokens", amount=batch * steps,
                against="2021 float32", read_bytes=read,
            )
    return rows


def check_greedy(options: argparse.Namespace, gpt: GPT) -> None:
    """Compare the most likely tokens of both samplers; a GPU's kernels may round differently."""
    prefix = torch.arange(3, device=options.device)[:, None]
    old, new = sample_2021(gpt, prefix, 24, 100, greedy=True), sample_tokens(gpt, prefix, 24, greedy=True)
    if options.device.type == "cpu":
        assert torch.equal(old, new), f"the samplers disagree: {old.tolist()} and {new.tolist()}"


def window(options: argparse.Namespace) -> list[Row]:
    """Codes in the middle of a 16x64 grid, window 16x16, top-k 100, batch 1: 2021's way and today's."""
    count = 8 if options.quick else 16
    rows: list[Row] = []
    for size in sizes(options, ("310M",)):
        gpt, columns = build_gpt(options, size), range(16, 16 + count)
        half = deepcopy(gpt).bfloat16()
        c, known = torch.randint(VOCABULARY, (2, 1, 16, 64), device=options.device)
        mask = torch.ones(16, 64, dtype=torch.bool, device=options.device)
        mask[8, columns.start : columns.stop] = False
        today: Callable[..., Tensor] = partial(sample_window, condition=c, known=known, mask=mask)
        old, new = window_2021(gpt, c, known, columns[:4], 100, greedy=True), today(gpt, greedy=True)
        if options.device.type == "cpu":
            assert torch.equal(old[:, 8, 16:20], new[:, 8, 16:20]), "the samplers disagree"
        rows += compare(
            options,
            {
                "2021 float32": partial(window_2021, gpt, c, known, columns, 100),
                "float32": partial(today, gpt, top_k=100), "bfloat16": partial(today, half, top_k=100),
                "float32, stride 8": partial(today, gpt, top_k=100, stride=8),
                "bfloat16, stride 8": partial(today, half, top_k=100, stride=8),
            },
            what=f"{count} codes in a window, {size}", unit="codes", amount=count, against="2021 float32",
        )
    return rows


def wavefront(options: argparse.Namespace) -> list[Row]:
    """A whole 16x64 grid, one code after the other and all at once that do not depend on each other."""
    width, on_gpu = 18 if options.quick else 64, options.device.type == "cuda"
    size = options.gpt or ("310M" if on_gpu and not options.quick else "tiny")
    gpt = build_gpt(options, size)
    gpt = gpt.bfloat16() if on_gpu else gpt
    c, steps, codes = torch.randint(VOCABULARY, (1, 16, width), device=options.device), {}, {}

    def run(waves: bool) -> None:
        def count(step: int, _: Tensor) -> None:
            steps[waves] = step + 1

        one = image_generators(0, [0])
        codes[waves] = sample_window(gpt, c, wavefront=waves, generator=one, callback=count)

    runs = in_turn(options, {"in turn": partial(run, False), "wavefront": partial(run, True)}, warm_up=on_gpu)
    if not on_gpu:
        assert torch.equal(codes[False], codes[True]), "the two sample different codes"
    return [
        row(f"16x{width} codes, {size}, {name}", each, steps=steps[name == "wavefront"])
        for name, each in runs.items()
    ]


def guidance(options: argparse.Namespace) -> list[Row]:
    """Tokens after a class, top-k 100, float32: without guidance, at scale 1 and at scale 2."""
    steps = pick(options, "tokens", 256, 32)
    rows: list[Row] = []
    for size in sizes(options, ("310M",)):
        gpt = build_gpt(options, size)
        for batch in (options.batch,) if options.batch else (8, 1):
            prefix = torch.zeros(batch, 1, dtype=torch.int64, device=options.device)
            sample = partial(sample_tokens, gpt, prefix, steps, top_k=100)
            null = torch.ones_like(prefix[:1])
            runs = in_turn(options, {
                "no guidance": sample,
                "scale 1": partial(sample, guidance=1.0, null_prefix=null),
                "scale 2": partial(sample, guidance=2.0, null_prefix=null),
            }, warm_up=False)
            rows += [
                row(f"{steps} tokens, batch {batch}, {size}, {name}", each,
                    times_plain=1 / each.speedup(runs["no guidance"]))
                for name, each in runs.items()
            ]
    return rows


TILES = """
import sys, time
from pathlib import Path
import torch
from taming.config import instantiate_from_config
torch.set_num_threads(int(sys.argv[5]))
params = {"ddconfig": eval(sys.argv[1]), "n_embed": 1024, "embed_dim": 256, "lossconfig": eval(sys.argv[2])}
model = instantiate_from_config({"target": "taming.models.vqgan.VQModel", "params": params}).eval()
codes = torch.randint(1024, (1, int(sys.argv[3]) // 16, int(sys.argv[4]) // 16))
start = time.perf_counter()
with torch.no_grad():
    model.decode_code(codes)
seconds = time.perf_counter() - start
peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def tiles(options: argparse.Namespace) -> list[Row]:
    """A large image through the f = 16 VQGAN on the CPU, once, each in a process of its own."""
    rows = []
    for height, width in [(256, 256)] if options.quick else [(512, 1024), (1024, 4096)]:
        arguments = repr(F16), repr(NO_LOSS), str(height), str(width), str(torch.get_num_threads())
        command = [sys.executable, "-c", TILES, *arguments]
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
        rows.append(row(f"decode {width}x{height} pixels", Runs([float(found[0])], [int(found[1])])))
    return rows


PARTS = {
    "decode": decode, "window": window, "wavefront": wavefront, "guidance": guidance, "tiles": tiles,
}
