#!/usr/bin/env python
"""Label maps of a folder of images: scripts/extract_segmentation.py photos/ -o labels/ --model NAME

The model is one of the `transformers` library for semantic segmentation: a name on the hub, such as
nvidia/segformer-b0-finetuned-ade-512-512, or a folder. A map is a gray PNG of the model's own label ids, with
the size and the name of its image; OUTDIR/labels.txt names them, a line each from 0 on. What is there already
is kept: start the command again after an interruption.
"""

import argparse
import sys

from taming.inference.pseudo_labels import (
    LABELS,
    extract_all,
    label_estimate,
    label_names,
    label_pixels,
    load_label_model,
    map_names,
    read_options,
)
from taming.util import exit_status, pick_device


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, read_options(__doc__, argv))


def run(options: argparse.Namespace) -> None:
    """Load the model, and make what is missing."""
    names, device = map_names(options.folder, options.outdir), pick_device(options.device)
    model = load_label_model(options.model, device, offline=options.offline)
    labels = label_names(model[1])
    options.outdir.mkdir(parents=True, exist_ok=True)
    (options.outdir / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    estimate = label_estimate(model, device)
    count = extract_all(names, estimate, label_pixels)
    print("{made} label maps made, {kept} were there, {bad} images skipped".format(**count))
    print(f"n_labels: {len(labels)}, named in {options.outdir / LABELS}")


if __name__ == "__main__":
    sys.exit(main())
