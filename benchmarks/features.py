#!/usr/bin/env python
"""What the way from 8-bit images to features costs beside the network alone: benchmarks/features.py

The whole of `FeatureNetwork` (checks, resize, scaling, copies) and the forward pass of its network on input
that was prepared before run alternately on the same images. README.md in this folder says what the numbers
mean.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from taming.cli.parser import exit_status
from taming.eval.networks import FEATURE_NETWORKS, load_feature_network


def main(argv: list[str] | None = None) -> int:
    """Measure each size, and print a line for it."""
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("--network", choices=FEATURE_NETWORKS, default="efflite0", help="default: efflite0")
    parser.add_argument("--weights", help="its file, or the folder that has it")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 64, 256], help="sides in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch; default: 32")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of measurements; default: 15")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: for a busy machine")
    return exit_status(measure, parser.parse_args(argv))


def measure(options: argparse.Namespace) -> None:
    """Run both ways alternately, and compare neighbouring runs."""
    if options.threads:
        torch.set_num_threads(options.threads)
    network = load_feature_network(options.network, options.weights, options.device)
    clock, unit = (time.process_time, "CPU second") if options.cpu_time else (time.perf_counter, "second")
    threads = torch.get_num_threads()
    print(f"{options.network}, {threads} threads, torch {torch.__version__}; images per {unit}")
    print("pixels  network, at once  network, in chunks  from 8-bit images  to at once  to chunks")
    for side in options.sizes:
        images = torch.randint(0, 256, (options.batch, 3, side, side), dtype=torch.uint8)
        inputs: list[Tensor] = []
        hook = network.network.register_forward_pre_hook(partial(note_input, inputs))
        network(images)
        hook.remove()
        ways = (
            partial(forward, network.network, [torch.cat(inputs)]),
            partial(forward, network.network, inputs),
            partial(network, images),
        )
        times = [
            [seconds(way, network.device, clock) for way in ways] for _ in range(options.repeats + 1)
        ][1:]  # the first is slower
        rates = [options.batch / median(column) for column in zip(*times, strict=True)]
        shares = [median(line[i] / line[2] for line in times) for i in range(2)]
        print(f"{side:6d}{rates[0]:18.1f}{rates[1]:20.1f}{rates[2]:19.1f}{shares[0]:12.2f}{shares[1]:11.2f}")


def note_input(inputs: list[Tensor], _network: nn.Module, arguments: tuple[Tensor]) -> None:
    """Keep what a network is called with."""
    inputs.append(arguments[0])


@torch.inference_mode()
def forward(network: nn.Module, inputs: list[Tensor]) -> None:
    """Apply the network, without anything around it."""
    for x in inputs:
        network(x)


def seconds(function: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Time one call."""
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


if __name__ == "__main__":
    sys.exit(main())
