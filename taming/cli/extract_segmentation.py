"""Make label maps of a folder of images.

    taming extract-segmentation photos/ -o labels/ --model nvidia/segformer-b0-finetuned-ade-512-512

The model is one of the `transformers` library for semantic segmentation: a name on the hub, or a folder. A
map is a gray PNG of the model's own label ids, with the size and the name of its image; OUTDIR/labels.txt
names them, one per line from id 0 on. Existing maps are kept: start the command again after an interruption.
"""

import argparse

from taming.cli.options import add_extraction_options as add_arguments
from taming.inference import pseudo_labels
from taming.util import pick_device

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    """Load the model, name its labels, and make the label maps that are missing."""
    names, device = pseudo_labels.map_names(options.folder, options.outdir), pick_device(options.device)
    model = pseudo_labels.load_label_model(options.model, device, offline=options.offline)
    labels, file = pseudo_labels.label_names(model[1]), options.outdir / pseudo_labels.LABELS
    text = "".join(f"{label}\n" for label in labels)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file} names the labels of another model: choose another --outdir")
    options.outdir.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    estimate = pseudo_labels.label_estimate(model, device)
    count = pseudo_labels.extract_all(names, estimate, pseudo_labels.label_pixels)
    print("{made} label maps made, {kept} were there, {bad} images skipped".format(**count))
    print(f"n_labels: {len(labels)}, named in {file}")
