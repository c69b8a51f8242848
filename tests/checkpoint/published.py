"""Published checkpoints for tests: golden cases of other projects in the form of their files, and layouts."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = json.loads(gzip.decompress((GOLDEN / "layouts_conv.json.gz").read_bytes()))

State = dict[str, Tensor]


def golden(name: str) -> tuple[State, State, State]:
    """Return the state dict of a case under its project's names, its inputs, and its outputs."""
    found = load_file(GOLDEN / f"{name}.safetensors")
    parts = ("state/", "in/", "out/")
    state, inputs, outputs = (
        {key.removeprefix(part): v for key, v in found.items() if key.startswith(part)} for part in parts
    )
    return state, inputs, outputs


def meta(shapes: dict[str, list[int]]) -> State:
    """Return a state dict without data."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def zeros(shapes: dict[str, list[int]]) -> State:
    """Return a state dict of zeros that takes no memory: each is one number, seen many times."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def with_averages(state: State) -> State:
    """Add running averages as SEED-Voken and latent diffusion save them, and spoil the weights themselves."""
    averages = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    return {key: torch.zeros_like(value) for key, value in state.items()} | averages | counters


def to_flax(state: State) -> dict:
    """Return a tree of arrays with the names and shapes that vqgan-jax gives a VQGAN."""
    tree: dict = {}
    for key, value in state.items():
        parts = key.split(".")
        names = parts[:-1]
        for i in range(len(names) - 1, 0, -1):
            if names[i].isdigit():
                names[i - 1 : i + 1] = [f"{names[i - 1]}_{names[i]}"]
        kind, array = parts[-1], value.numpy()
        if "norm" in key:
            kind = {"weight": "scale"}.get(kind, kind)
            array = array[None, None, None]
        elif kind == "weight" and array.ndim == 4:
            kind, array = "kernel", array.transpose(2, 3, 1, 0)
        elif kind == "weight":
            kind = "embedding"
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        node[kind] = np.ascontiguousarray(array)
    return tree


def shard(state: State, folder: Path, name: str, number: int = 3) -> Path:
    """Write a state dict in pieces, with an index, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, _, suffix = name.rpartition(".")
    keys = sorted(state)
    places = {key: f"{stem}-{i % number + 1:05}-of-{number:05}.{suffix}" for i, key in enumerate(keys)}
    for file in set(places.values()):
        piece = {key: state[key].contiguous() for key in keys if places[key] == file}
        save_file(piece, folder / file) if suffix == "safetensors" else torch.save(piece, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def pack(value: object) -> bytes:
    """Write msgpack as flax does: arrays are its extension type 1, of shape, type and data."""
    if isinstance(value, dict):
        items = b"".join(pack(key) + pack(item) for key, item in value.items())
        return struct.pack(">BH", 0xDE, len(value)) + items
    if isinstance(value, list):
        return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(pack, value))
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, np.ndarray):
        content = pack([list(value.shape), str(value.dtype), value.tobytes()])
        return struct.pack(">BIb", 0xC9, len(content), 1) + content
    if isinstance(value, int):
        return struct.pack(">BI", 0xCE, value)
    raise TypeError(type(value))
