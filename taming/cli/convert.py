"""Convert a checkpoint to safetensors and YAML, or back to a .ckpt file; or take one part out of it.

    taming convert last.ckpt vqgan/ --config model.yaml    a file of 2021 and its YAML
    taming convert logs/RUN vqgan/                         a run directory, which has its config
    taming convert vqgan/ vqgan.ckpt                       back: torch.load reads it as it is
    taming convert logs/RUN vqgan/ --part first_stage_model    the tokenizer inside a transformer's run
    taming convert c2i_B_256.pt llamagen/ --first-stage vq_ds16_c2i.pt    a published prior and its tokenizer

The folder holds model.safetensors, which cannot hold code, and config.yaml. All commands take either form,
and so do load_model and from_pretrained. The .ckpt has the keys state_dict, config and batches_seen. If
weights and config do not agree, the difference is printed by name and nothing is written.

A part is what the names of weights begin with: first_stage_model, cond_stage_model, transformer. Its config
is cut out of that of the whole. A .ckpt file needs none.

Of a run that averages its weights (model.ema_decay) the averages are written; --no-ema writes the weights as
they were trained last.

States of optimizers are left out, so training does not resume from the result; it can start from its weights.
The perceptual network of the loss, which a file of 2021 may hold, is left out as well; a message names it.
"""

import argparse
import logging

from taming.checkpoint.convert import convert, extract
from taming.checkpoint.save import CONFIG_NAME, WEIGHTS_NAME, save_exported
from taming.cli.options import add_allow, path, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("source", metavar="IN", type=path, help="checkpoint file, run directory or exported folder")
    add("target", metavar="OUT", type=path, help="a folder, made if it is new, or a file that ends in .ckpt")
    add("submodel", metavar="PART", nargs="?", help="the same as --part PART, as in 2021")
    add("--part", metavar="PART", help="take this part out of the model, first_stage_model for instance")
    parser.set_defaults(default_part=None)  # scripts/extract_submodel.py has another one
    add("--first-stage", metavar="FILE", type=path, help="the tokenizer of IN, a prior that is published "
        "alone: OUT holds both")
    add("--size", type=size, metavar="HxW", help="with --first-stage: of the images in pixels, 384x384 for "
        "instance; default: that of the prior")
    add("--config", metavar="YAML", type=path, help="config of the whole model, if IN does not have it; "
        "with --first-stage: of the prior")
    add("--no-ema", dest="ema", action="store_false", help="the trained weights, not their averages")
    add_allow(parser)


def run(options: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    named = sorted({part for part in (options.submodel, options.part) if part})
    if len(named) > 1:
        raise ValueError(f"two parts are named: {' and '.join(named)}")
    part = named[0] if named else options.default_part
    if options.size is not None and options.first_stage is None:
        raise ValueError("--size is that of a prior with its tokenizer: give --first-stage, or leave it out")
    if options.first_stage is not None:
        from taming.inference.combine import combine  # Lightning takes seconds to import

        if named or options.target.suffix:
            raise ValueError(f"--first-stage writes a whole model to a folder, not {part or options.target}")
        if not options.ema:
            raise ValueError("--no-ema is for one checkpoint, not with --first-stage: leave it out")
        model, config = combine(
            options.source, options.first_stage, size=options.size, config=options.config
        )
        folder = save_exported(model, config, options.target)
        files = [folder / WEIGHTS_NAME, folder / CONFIG_NAME]
    elif part is None:
        files = convert(options.source, options.target, options.config, ema=options.ema)
    else:
        files = extract(options.source, options.target, part, options.config, ema=options.ema)
    for file in files:
        origin = "" if part is None or options.first_stage else f"{part} to "
        print(f"written: {origin}{file} ({file.stat().st_size / 1e6:.1f} MB)")
