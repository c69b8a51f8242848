#!/usr/bin/env python
"""Estimate memory, arithmetic and communication of the shipped configurations: python benchmarks/scale.py.

Everything is computed on torch's meta device, from shapes: a minute or two, no weights, no data, no GPU.

    learn, frozen  parameters in millions; float32, also under bf16-mixed
    state          bytes: 20 for each parameter that learns (weight, gradient, two moments of Adam, and the
                   gradient once more in the buckets of ddp) and 4 for each frozen one
    an image       bytes that autograd saves in the forward pass of one image (stage 1) or of the longest
                   sequence (stage 2), each storage once, in float32; bf16-mixed needs about half
    GPU            state and a batch of images
    step           operations of matrix products and convolutions, forward and backward, at RATE
    sent           bytes that each of 256 GPUs sends in a step: ring all-reduce, 2 (W - 1) / W x 4 a weight
    efficiency     step / (step + what of the exchange outlasts the backward pass, two thirds of the step)

Not counted: what the allocator and workspaces add to memory (a fifth, as a rule); encoding by frozen stages;
the exchange of codes, of statistics and of the adaptive weight, which is small. Times follow from assumed
rates, not from measurements.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taming.config import instantiate_from_config, load_config
from taming.modules.losses.lpips import vgg16

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RATE = 100e12  # operations per second: a third of an A100's peak in bfloat16
LINKS = {"100 Gb/s": 10e9, "25 Gb/s": 2.5e9, "10 Gb/s": 1e9}  # bytes per second that each GPU can send
HEAD = ["configuration", "learn (M)", "frozen (M)", "state (GB)", "an image (GB)", "batch", "GPU (GB)",
        "step (ms)", "sent (MB)", *LINKS]

Parts = tuple[list[nn.Module], list[nn.Module], Callable[[], None]]  # what learns, what is frozen, a step


def main() -> None:
    """Print a table with a row for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as imagenet_vqgan; all of configs/ if there are none")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name in parser.parse_args().names or sorted(path.stem for path in CONFIGS.glob("*.yaml")):
        print(f"| `{name}` | {' | '.join(row(load_config(CONFIGS / f'{name}.yaml')))} |", flush=True)


def row(config: DictConfig) -> list[str]:
    """Return the cells of a configuration, without its name."""
    with torch.device("meta"):
        build = transformer_parts if "transformer_config" in config.model.params else vqgan_parts
        learn, frozen, step = build(config.model)
    saved, operations = cost(step, learn + frozen)
    learning, resting, batch = count(learn), count(frozen), config.data.params.batch_size
    state, seconds = 20 * learning + 4 * resting, batch * operations / RATE
    sent = sent_bytes(learning, 256)
    cells = [f"{learning / 1e6:.0f}", f"{resting / 1e6:.0f}", f"{state / 1e9:.1f}", f"{saved / 1e9:.2f}",
             f"{batch}", f"{(state + batch * saved) / 1e9:.0f}", f"{1e3 * seconds:.0f}", f"{sent / 1e6:,.0f}"]
    return cells + [f"{100 * efficiency(seconds, sent / rate):.0f} %" for rate in LINKS.values()]


def sent_bytes(parameters: int, processes: int) -> float:
    """Return what each process sends to average float32 gradients with a ring all-reduce."""
    return 2 * (processes - 1) / processes * 4 * parameters


def efficiency(step: float, exchange: float) -> float:
    """Return the share of time that is arithmetic, of a step and its exchange of so many seconds."""
    return step / (step + max(0.0, exchange - 2 / 3 * step))


def count(parts: list[nn.Module]) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for part in parts for p in part.parameters())


def vqgan_parts(section: DictConfig) -> Parts:
    """Return the parts of stage 1, and a step with one image, forward and backward."""
    model: Any = instantiate_from_config(section).train()
    resolution = section.params.ddconfig.resolution
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    x = torch.randn(1, section.params.ddconfig.in_channels, *size)
    discriminator = getattr(model.loss, "discriminator", None)
    has_lpips = getattr(model.loss, "perceptual_weight", 0.0) > 0
    lpips: list[nn.Module] = [vgg16(pretrained=False)] if has_lpips else []

    def step() -> None:
        rec = model.decoder(model.post_quant_conv(model.quant_conv(model.encoder(x))))
        total = rec.square().mean()
        for network in lpips:
            total = total + sum(features.sum() for image in (rec, x) for features in network(rgb(image)))
        if discriminator is not None:
            total = total + sum(discriminator(image).sum() for image in (rec, x, rec.detach()))
        total.backward()

    learn = [model.encoder, model.decoder, model.quantize, model.quant_conv, model.post_quant_conv]
    return learn + ([] if discriminator is None else [discriminator]), lpips, step


def rgb(image: Tensor) -> Tensor:
    """Repeat a gray image in three channels."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def transformer_parts(section: DictConfig) -> Parts:
    """Return the parts of stage 2, and a step with one sequence of the longest kind."""
    network: Any = instantiate_from_config(section.params.transformer_config).train()
    stages = section.params.first_stage_config, section.params.get("cond_stage_config")
    frozen = [model for stage in stages if (model := trained_stage(stage)) is not None]
    codes = torch.zeros(1, section.params.transformer_config.params.block_size, dtype=torch.long)

    def step() -> None:
        network(codes)[0].float().logsumexp(-1).mean().backward()

    return [network], frozen, step


def trained_stage(stage: Any) -> nn.Module | None:
    """Build the stage whose run a configuration looks for in logs/, without its loss; None for others."""
    path = OmegaConf.select(stage, "params.ckpt_path") if OmegaConf.is_dict(stage) else None
    if path is None:
        return None
    section = load_config(CONFIGS / f"{Path(path).name.strip('*_')}.yaml").model
    section.params.lossconfig = {"target": "taming.modules.losses.DummyLoss"}
    return instantiate_from_config(section)


def cost(step: Callable[[], None], parts: list[nn.Module]) -> tuple[int, int]:
    """Return the bytes that autograd saves in a step besides parameters of `parts`, and the operations."""
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        step()
    for part in parts:
        for parameter in part.parameters():
            saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values()), counter.get_total_flops()


if __name__ == "__main__":
    main()
