#!/usr/bin/env python
"""How long loading a model takes beside reading the bytes of its file, and how much memory it takes at most.

    python benchmarks/loading.py               both parts; writes, and removes, 4 GB in the temporary folder
    python benchmarks/loading.py --quick       small sizes, to see that it runs

README.md in this folder says what each number means.
"""

import argparse
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from sampling import F16, NO_LOSS, Row, derived, in_turn, row, run_parts
from torch import nn

from taming.checkpoint import load_model, save_exported, write_checkpoint
from taming.config import instantiate_from_config

VQGAN = "taming.models.vqgan.VQModel"
TINY = {**F16, "ch": 32, "ch_mult": [1, 1], "z_channels": 32, "resolution": 32, "attn_resolutions": []}


def vqgan(quick: bool) -> dict:
    """The config of vqgan_imagenet_f16_16384, its discriminator included, or of a small one."""
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": 250001, "disc_num_layers": 2, "disc_weight": 0.75},
    }
    size = {"ddconfig": TINY if quick else F16, "n_embed": 16384, "embed_dim": 32 if quick else 256}
    return {"model": {"target": VQGAN, "params": {**size, "lossconfig": loss}}}


def transformer(layers: int, channels: int) -> dict:
    """The config of a transformer over a small VQGAN; 48 layers of 1536 channels are 1.4 billion weights."""
    gpt = {"vocab_size": 16384, "block_size": 256, "n_layer": layers, "n_head": 16, "n_embd": channels}
    stage = {"ddconfig": TINY, "n_embed": 16384, "embed_dim": 32, "lossconfig": NO_LOSS}
    params = {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": {"target": VQGAN, "params": stage},
        "cond_stage_config": "__is_unconditional__",
    }
    return {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}}


def made_up(config: dict) -> nn.Module:
    """The model of a config with arbitrary weights, which are there without the time of drawing them."""
    with torch.device("meta"):
        model = instantiate_from_config(config["model"])
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(1)
    return model


def size_of(model: nn.Module) -> int:
    """Bytes of a model's tensors."""
    return sum(value.nbytes for value in model.state_dict().values())


def touch(model: nn.Module) -> float:
    """Read every byte of a model's tensors, which are only mapped from the file until then."""
    return float(sum(value.sum(dtype=torch.float32) for value in model.state_dict().values()))


# ---- the parts


def seconds(options: argparse.Namespace) -> list[Row]:
    """A VQGAN of the size of vqgan_imagenet_f16_16384, with the file in the page cache."""
    config = vqgan(options.quick)
    with TemporaryDirectory() as folder:
        save_exported(made_up(config), config, folder)
        file = Path(folder) / "model.safetensors"
        amount = file.stat().st_size / 1e9
        buffer = bytearray(file.stat().st_size)

        def read_into_used_memory() -> None:
            with file.open("rb", buffering=0) as source:
                assert source.readinto(buffer) == len(buffer)

        found = in_turn(max(5, options.repeats), {
            "read the bytes": file.read_bytes,
            "read the bytes into memory in use": read_into_used_memory,
            "load_model": lambda: load_model(folder),
            "load_model, and read every tensor": lambda: touch(load_model(folder)[0]),
            "load_model, mmap=True": lambda: load_model(folder, mmap=True),
            "CRC-32 of the bytes": lambda: zlib.crc32(buffer),
        })
    reading = found["read the bytes"]
    return [
        row(f"{name}, {amount * 1e3:.0f} MB", times, gb_per_s=amount / median(times),
            times_reading=median(mine / read for mine, read in zip(times, reading, strict=True)))
        for name, times in found.items()
    ]


def memory(options: argparse.Namespace) -> list[Row]:
    """The most memory of a process that loads a large transformer, pages of the mapped file included."""
    config = transformer(*((2, 256) if options.quick else (options.layers, 1536)))
    rows = []
    with TemporaryDirectory() as folder:
        model = made_up(config)
        size = size_of(model)
        save_exported(model, config, Path(folder) / "export")
        write_checkpoint({"state_dict": model.state_dict(), "config": config}, Path(folder) / "last.ckpt")
        del model
        for name in ("export", "last.ckpt"):
            command = [sys.executable, __file__, "--measure", str(Path(folder) / name)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(told.splitlines()[-1])
            form = "safetensors" if name == "export" else name
            rows.append(row(
                f"load_model, {size / 1e9:.2f} GB, {form}", [result["seconds"]],
                peak_of_size=result["loaded"] / size, peak_of_size_all_read=result["read"] / size,
                gb_before=result["before"] / 1e9,
            ))
    return rows


def measure(path: str) -> None:
    """Load a model in a process of its own, and print by how many bytes its memory grew at most."""
    with TemporaryDirectory() as folder:  # all imports, and what else the first time brings
        config = transformer(1, 64)
        load_model(save_exported(made_up(config), config, folder))
    before = status("VmRSS")
    start = time.perf_counter()
    model = load_model(path)[0]
    taken, loaded = time.perf_counter() - start, status("VmHWM") - before
    touch(model)
    result = {"before": before, "loaded": loaded, "read": status("VmHWM") - before, "seconds": taken}
    print(json.dumps(result))


def status(key: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at most so far (ru_maxrss counts a parent's, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


# ---- the command

PARTS = {"seconds": seconds, "memory": memory}


def show(found: Row) -> str:
    """Phrase a row of the table."""
    return f"{found['what']:50} {found['median_s']:7.3f} s  {derived(found)}"


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for, print a table, and write results/<date>_loading.json."""
    argv = sys.argv[1:] if argv is None else argv
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="measurements of each time, 5 at least")
    add("--layers", type=int, default=16, help="of the transformer; default: 16; 48 are 1.4 billion weights")
    add("--quick", action="store_true", help="small sizes: seconds, to see that it runs")
    add("--out", type=Path, help="the JSON file; default: benchmarks/results/<date>_loading.json")
    add("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.measure:
        measure(options.measure)
        return 0
    run_parts("loading", PARTS, options, argv, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
