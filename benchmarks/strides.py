#!/usr/bin/env python
"""What a longer stride of the window saves, and what it costs: benchmarks/strides.py logs/RUN

Panoramas are drawn at several strides from a trained transformer; the negative log-likelihood of their codes
under the exact rule, stride 1, says how much less likely the faster ones are. README.md in this folder says
what the numbers mean.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from taming.checkpoint import load_model
from taming.cli.parser import exit_status
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import conditions_of
from taming.modules.util import Labelator
from taming.sampling import image_generators, window_nll


def main(argv: list[str] | None = None) -> int:
    """Draw at each stride, and print a line for it."""
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("run", type=Path, help="run of a transformer, without a condition or of classes")
    parser.add_argument("-n", "--count", type=int, default=8, help="pictures at each stride; default: 8")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="in codes")
    return exit_status(compare, parser.parse_args(argv))


def compare(options: argparse.Namespace) -> None:
    """Draw and judge the same pictures at each stride."""
    model, _, _ = load_model(options.run)
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{options.run} is a {type(model).__name__}: give a run of a transformer")
    side = model.first_stage_model.resolution
    size, window = (side, 4 * side), model.latent_shape()
    classes = None
    if isinstance(model.cond_stages[0], Labelator):
        classes = [i % model.cond_stages[0].n_classes for i in range(options.count)]
    parts = conditions_of(model, options.count, size, classes)
    inner = model.condition_windows(parts)
    print(f"{size[1]}x{size[0]} pixels, {options.count} pictures")
    print("stride  s/token  times  nats/code  standard error")
    first = None
    for stride in options.strides:
        start = time.perf_counter()
        codes = model.sample_codes(
            parts, size=size, stride=stride, generator=image_generators(0, range(options.count))
        )
        seconds = (time.perf_counter() - start) / codes[0].numel()
        first = first or seconds
        nll = window_nll(model.transformer, parts, codes, window=window, condition_windows=inner)
        nll = nll.mean((1, 2))  # (B,)
        error = nll.std() / options.count**0.5
        numbers = f"{seconds:9.4f} {first / seconds:6.1f} {nll.mean():10.3f} {error:15.3f}"
        print(f"{stride:6d}{numbers}", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
