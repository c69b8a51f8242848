"""How long checkpoints take to load and to save, and in how much memory, beside reading the bytes."""

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.parts import F16, NO_LOSS, ROOT, Row, Runs, in_turn, memory_status, row
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
    """The model of a config with arbitrary weights, without the time of initializing them."""
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


def load(options: argparse.Namespace) -> list[Row]:
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

        found = in_turn(options, {
            "read the bytes": file.read_bytes,
            "read the bytes into memory in use": read_into_used_memory,
            "load_model": lambda: load_model(folder),
            "load_model, and read every tensor": lambda: touch(load_model(folder)[0]),
            "load_model, mmap=True": lambda: load_model(folder, mmap=True),
            "CRC-32 of the bytes": lambda: zlib.crc32(buffer),
        }, repeats=max(5, options.repeats))
    return [
        row(f"{name}, {amount * 1e3:.0f} MB", runs, gb_per_s=amount / runs.median,
            times_reading=1 / runs.speedup(found["read the bytes"]))
        for name, runs in found.items()
    ]


def save(options: argparse.Namespace) -> list[Row]:
    """A VQGAN and the moments of its optimizer, written whole or not at all, and by torch alone."""
    config = vqgan(options.quick)
    model = made_up(config)
    content = {
        "state_dict": model.state_dict(), "config": config,
        "optimizer_states": [{"moments": [p.detach().clone() for p in model.parameters() for _ in range(2)]}],
    }
    amount = (size_of(model) + 2 * sum(p.nbytes for p in model.parameters())) / 1e9
    with TemporaryDirectory() as folder:

        def plain() -> None:
            with Path(folder, "plain.ckpt").open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())

        found = in_turn(options, {
            "torch.save": plain,
            "write_checkpoint": lambda: write_checkpoint(content, Path(folder, "last.ckpt")),
            "save_exported": lambda: save_exported(model, config, Path(folder, "export")),
        })
    sizes = {"save_exported": size_of(model) / 1e9}
    return [
        row(f"{name}, {sizes.get(name, amount) * 1e3:.0f} MB", runs,
            gb_per_s=sizes.get(name, amount) / runs.median)
        for name, runs in found.items()
    ]


def load_memory(options: argparse.Namespace) -> list[Row]:
    """The most memory of a process that loads a large transformer, pages of the mapped file included."""
    config = transformer(*((2, 256) if options.quick else (16, 1536)))
    rows = []
    with TemporaryDirectory() as folder:
        model = made_up(config)
        size = size_of(model)
        save_exported(model, config, Path(folder) / "export")
        write_checkpoint({"state_dict": model.state_dict(), "config": config}, Path(folder) / "last.ckpt")
        del model
        for name in ("export", "last.ckpt"):
            command = [sys.executable, "-m", "benchmarks.loading", str(Path(folder) / name)]
            told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            result = json.loads(told.splitlines()[-1])
            form = "safetensors" if name == "export" else name
            rows.append(row(
                f"load_model, {size / 1e9:.2f} GB, {form}", Runs([result["seconds"]]),
                peak_of_size=result["loaded"] / size, peak_of_size_all_read=result["read"] / size,
                gb_before=result["before"] / 1e9,
            ))
    return rows


def measure_loading(path: str) -> None:
    """Load a model in a process of its own, and print by how many bytes its memory grew at most."""
    with TemporaryDirectory() as folder:  # all imports, and what else the first time brings
        config = transformer(1, 64)
        load_model(save_exported(made_up(config), config, folder))
    before = memory_status("VmRSS")
    start = time.perf_counter()
    model = load_model(path)[0]
    taken, loaded = time.perf_counter() - start, memory_status("VmHWM") - before
    touch(model)
    result = {"before": before, "loaded": loaded, "read": memory_status("VmHWM") - before, "seconds": taken}
    print(json.dumps(result))


PARTS = {"load": load, "save": save, "load_memory": load_memory}

if __name__ == "__main__":
    measure_loading(sys.argv[1])
