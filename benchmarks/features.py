"""What the way from 8-bit images to features costs beside the network alone.

The whole of `FeatureNetwork` (checks, resize, scaling, copies) and the forward pass of its network on input
that was prepared before run alternately on the same images.
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.parts import Row, in_turn, pick, row
from taming.eval.networks import load_feature_network


def evaluation(options: argparse.Namespace) -> list[Row]:
    """Features of EfficientNet-Lite0 for metrics, from 8-bit images of several sizes."""
    network = load_feature_network("efflite0", None, str(options.device))
    batch, rows = pick(options, "batch", 32, 4), []
    for side in (options.pixels,) if options.pixels else (64,) if options.quick else (224, 64, 256):
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        inputs: list[Tensor] = []
        hook = network.network.register_forward_pre_hook(partial(note_input, inputs))
        network(images)
        hook.remove()
        found = in_turn(options, {
            "network, at once": partial(forward, network.network, [torch.cat(inputs)]),
            "network, in chunks": partial(forward, network.network, inputs),
            "from 8-bit images": partial(network, images),
        }, repeats=2 if options.quick else 5 * options.repeats)
        whole = found["from 8-bit images"]
        rows += [
            row(f"{side} pixels, batch {batch}, {name}", runs, images_per_s=batch / runs.median,
                of_whole=1 / whole.speedup(runs))
            for name, runs in found.items()
        ]
    return rows


def note_input(inputs: list[Tensor], _network: nn.Module, arguments: tuple[Tensor]) -> None:
    """Keep what a network is called with."""
    inputs.append(arguments[0])


@torch.inference_mode()
def forward(network: nn.Module, inputs: list[Tensor]) -> None:
    """Apply the network, without anything around it."""
    for x in inputs:
        network(x)


PARTS = {"evaluation": evaluation}
