#!/usr/bin/env python
"""Tokenizers and autoencoders at equal time, on the built-in landscapes of 64 pixels (Table 5 at toy scale).

    python -m benchmarks.tokenizers --minutes 10                 all systems, 10 minutes of the processor each
    python -m benchmarks.tokenizers --steps 1000                 the same at equal batches
    python -m benchmarks.tokenizers vqgan_f8 --minutes 0.3       one row, to see that it runs
    python -m benchmarks.tokenizers recipes --minutes 3          one choice at a time in the demo's tokenizer
    python -m benchmarks.tokenizers networks --minutes 4         the demo's VQGAN, with two kinds of networks

All rows have about a million parameters, 512 codes where they have codes (256 in `networks`), batches of 8,
and the same images in the same order. Time is that of training steps on the processor, of all threads: other
work on the machine does not count. Schedules of a configuration are stretched over the budget. Then unseen
images are reconstructed and judged as `taming evaluate` does. A second start goes on where the first was
stopped, also within a row.
"""

import argparse
import csv
import json
import logging
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks import runs
from taming.checkpoint import find_checkpoint, load_model, read_checkpoint
from taming.cli import evaluate
from taming.config import find_config, load_config
from taming.eval.reconstruction import reconstruct
from taming.eval.results import Result, is_lower_better
from taming.models.tokenizer import Tokenizer, as_list

SHOWN = 8  # images on the sheet
SCALE = 2  # enlargement of the sheet
VALIDATE_EVERY = 500  # batches; not part of the time


@dataclass(frozen=True)
class Row:
    """A configuration, and what is changed so that all have about a million parameters and 512 codes."""

    title: str
    config: str
    changes: tuple[str, ...] = ()  # in model.params, if they do not begin with "model." or "data."

    @property
    def words(self) -> list[str]:
        """The changes as words of the command line."""
        rooted = ("model.", "data.")
        return [each if each.startswith(rooted) else f"model.params.{each}" for each in self.changes]


SYSTEMS = {
    "vae": Row("VAE", "vae/vae_landscapes", ("ddconfig.ch=16",)),
    "vqvae": Row("VQ-VAE", "vqvae/vqvae_landscapes", ("ddconfig.ch=152", "n_embed=512")),
    "vqvae2": Row("VQ-VAE-2", "vqvae2/vqvae2_landscapes", ("ddconfig.ch=120", "n_embed=512")),
    "dvae": Row("dVAE", "dvae/dvae_landscapes", ("ddconfig.n_hid=76", "n_embed=512")),
    "vqgan_f16": Row("VQGAN, f = 16", "landscapes/landscapes_vqgan", ("ddconfig.ch_mult=[1,2,2,4,4]",)),
    "vqgan_f8": Row("VQGAN, f = 8", "landscapes/landscapes_vqgan"),
    "two_level": Row(
        "two-level VQGAN", "two_level/two_level_landscapes",
        ("ddconfig.ch=12", "ddconfig.num_groups=4", "n_embed=512"),
    ),
}


MODERN = "modern/landscapes_tokenizer"
DISTANCES = ("lossconfig.params.pixel_loss=l1", "lossconfig.params.pixelloss_weight=1.0")
PLAIN = (  # what the demo's tokenizer had before the table of recipes
    *DISTANCES,
    "scheduler_config={target: taming.lr_scheduler.LambdaWarmUpCosineScheduler, params: {warm_up_steps: 50, "
    "max_decay_steps: 5000, lr_start: 0.1, lr_max: 1.0, lr_min: 0.02}}",
)


def changed(title: str, *changes: str) -> Row:
    """Return a row with 512 codes, absolute distances, a cosine, averaged weights, and what is changed."""
    return Row(title, "demo/vqgan", (*PLAIN, "n_embed=512", *changes))


def quantizer(title: str, target: str, params: str) -> Row:
    """Return its row with another quantizer, of 512 codes, in place of its own."""
    target = f"taming.modules.quantizers.{target}"
    return changed(
        title, "legacy=true", "revive_after=null",
        f"quantizer_config={{target: {target}, params: {{{params}}}}}",
    )


LEARNED = "codebook_size: 512, dim: 16"
FINE = "landscapes/landscapes_fine_vqgan"
SQUARES = ("lossconfig.params.pixel_loss=l2", "lossconfig.params.pixelloss_weight=4.0")
NO_FIGURES = ("data.params.train.params.figures=0.0", "data.params.validation.params.figures=0.0")
RECIPES = {
    "base": changed("L1, cosine learning rate, weights averaged"),
    "not_averaged": changed("weights not averaged", "model.ema_decay=null"),
    "constant_rate": changed("constant learning rate", "scheduler_config=null"),
    "squares": changed("L2 of pixels in place of L1", *SQUARES),
    "squares_not_averaged": changed("L2, weights not averaged", *SQUARES, "model.ema_decay=null"),
    "modern": Row("modern: L2, constant learning rate", MODERN),
    "no_discriminator": changed("no discriminator", "lossconfig.params.disc_weight=0.0"),
    "blur_lecam": changed(
        "discriminator of VQGAN+: blurs, LeCam",
        "lossconfig.params.disc_adaptive=false", "lossconfig.params.lecam_weight=0.001",
        "lossconfig.params.disc_num_layers=3", "lossconfig.params.disc_ndf=64",  # no longer read
        "lossconfig.params.disc_config={target: taming.modules.discriminator.blur.BlurPoolDiscriminator, "
        "params: {ndf: 16, n_layers: 2}}",
    ),
    "not_revived": changed("codes not revived", "revive_after=null"),
    "unit_length": quantizer(
        "8 channels of unit length (LlamaGen)", "vector.VQ", f"{LEARNED}, codebook_dim: 8, l2_normalize: true"
    ),
    "rotation": quantizer(
        "rotation trick", "vector.VQ", f"{LEARNED}, revive_after: 10, estimator: rotation"
    ),
    "diveq": quantizer("DiVeQ", "vector.VQ", f"{LEARNED}, revive_after: 10, estimator: diveq"),
    "running_means": quantizer(
        "codes as running means", "vector.VQ", f"{LEARNED}, revive_after: 10, decay: 0.99"
    ),
    "kmeans": quantizer("start from clusters", "vector.VQ", f"{LEARNED}, revive_after: 10, kmeans_steps: 10"),
    "sim_vq": quantizer("SimVQ", "sim_vq.SimVQ", LEARNED),
    "ibq": quantizer("IBQ", "index_propagation.IBQ", LEARNED),
    "fsq": quantizer("FSQ, 8x8x8", "fsq.FSQ", "levels: [8, 8, 8], dim: 16"),
    "lfq": quantizer("LFQ, 9 bits", "lookup_free.LFQ", LEARNED),
    "bsq": quantizer("BSQ, 9 bits", "lookup_free.BSQ", LEARNED),
}
NETWORKS = {  # 16x16 codes of 256
    "convolutions": Row("networks of the VQGAN", FINE, ("n_embed=256", *DISTANCES)),
    "strided": Row("networks of VQ-VAE", "demo/vqgan", (*PLAIN, "model.ema_decay=null")),
}
ROWS = SYSTEMS | RECIPES | NETWORKS
SETS = {"systems": tuple(SYSTEMS), "recipes": tuple(RECIPES), "networks": tuple(NETWORKS)}
METRICS = ("PSNR", "SSIM", "ST-LPIPS", "LPIPS", "rFD", "rFID")  # in the table: what their names begin with


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate the rows; print a table, and write it, the numbers and a sheet of images."""
    argv = sys.argv[1:] if argv is None else argv
    known = (*ROWS, *SETS)
    rows = f"any of {', '.join(ROWS)}; or {', '.join(SETS)}; default: systems"
    parser = runs.options_parser("tokenizers", __doc__, rows, "unseen images to reconstruct")
    runs.add_budget(parser, "each row")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the images")
    options = runs.read_options(parser, argv, known)
    folder = options.folder or Path("logs") / f"tokenizers_{runs.budget_name(options)}"
    runs.check_folder(folder, {
        "minutes": options.minutes, "steps": options.steps, "threads": options.threads,
        "num_images": options.num_images, "seed": options.seed,
    })
    names = [name for each in options.rows or ["systems"] for name in SETS.get(each, (each,))]
    found = {}
    for name in names:
        print(f"\n## {ROWS[name].title}", flush=True)
        measured = runs.kept(folder / f"{name}.json", partial(measure, name, folder, options))
        if measured is None:
            return 130  # stopped by Ctrl-C: the run is saved
        found[name] = measured
    sheet = sheet_of({ROWS[name].title: Path(found[name]["run"]) for name in names})
    runs.write(
        "tokenizers", options.out, argv, {"rows": list(found.values())}, partial(markdown, found=found),
        partial(sheet.save, optimize=True),
    )
    return 0


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Train and evaluate a row, or what is left of that; None where it was stopped by a signal."""
    run = runs.trained(name, folder, start_words(ROWS[name], name, folder, options))
    if run is None:
        return None
    checkpoint = read_checkpoint(find_checkpoint(run), tensors=())
    model, _, _ = load_model(find_checkpoint(run))
    grids = as_list(model.code_shape(*model.image_size)) if isinstance(model, Tokenizer) else []
    reconstruction = (runs.unseen(options.num_images), "--protocol", "reconstruction")
    return {
        "name": name, "title": ROWS[name].title, "run": str(run), "batches": checkpoint["batches_seen"],
        "cpu_minutes": runs.cpu_minutes(checkpoint), "grids": grids,
        "parameters": sum(p.numel() for key, p in model.named_parameters() if not key.startswith("loss.")),
        "curve": curve(run), "evaluation": runs.evaluated(run, *reconstruction)[0],
    }


def start_words(
    row: Row, name: str, folder: Path, options: argparse.Namespace,
    validate_every: int | float = VALIDATE_EVERY,  # batches, or epochs as in Lightning
) -> list[str]:
    """Return the words of the training command for a new run."""
    planned = load_config([find_config(row.config)]).lightning.trainer.max_steps
    amount = f"cpu_minutes={options.minutes}" if options.minutes else f"batches={options.steps}"
    budget = "lightning.callbacks.budget"
    return [
        "--base", row.config, "-t", "-n", name, "--logdir", str(folder), "--seed", str(options.seed),
        "--gpus", "0", "--max_steps", "-1", "--val_check_interval", str(validate_every),
        "--enable_progress_bar", "False", "--enable_model_summary", "False",
        "lightning.callbacks.image_logger=null", f"{budget}.target=taming.training.callbacks.Budget",
        f"{budget}.params.planned_batches={planned}", f"{budget}.params.{amount}",
        *row.words,
    ]


def curve(run: Path) -> list[tuple[int, float]]:
    """Return (batches, dB) of the validations in training, from the curves of the run."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line.get("val/psnr")]
    return sorted({int(line["step"]) + 1: float(line["val/psnr"]) for line in lines}.items())


# ---- what is written


def markdown(command: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the table, the best of each column in bold, and what its numbers depend on."""
    steps = min((row["curve"][-1][0] for row in found.values() if row["curve"]), default=0)
    results = {name: Result.from_json(json.dumps(row["evaluation"])) for name, row in found.items()}
    metrics = list(dict.fromkeys(
        metric for result in results.values() for metric in result.metrics if metric.startswith(METRICS)
    ))
    heads = ["", "codes", "parameters", "batches", "minutes", *metrics, "usage"]
    heads += [f"PSNR at {steps} batches"] * bool(steps)
    best = {metric: (min if is_lower_better(metric) else max)(
        result.metrics[metric] for result in results.values() if metric in result.metrics
    ) for metric in metrics}
    lines = [f"    {command}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in found.items():
        values = results[name].metrics
        grids = " + ".join(f"{h}x{w}" for h, w in row["grids"])
        count = sum(h * w for h, w in row["grids"])
        usage = [f"{100 * value:.0f} %" for key, value in values.items() if key.startswith("usage")]
        cells = [
            row["title"], f"{count} ({grids})" if grids else "-", f"{row['parameters'] / 1e6:.2f}M",
            f"{row['batches']:,}", f"{row['cpu_minutes']:.1f}",
            *(number(values.get(metric), best[metric]) for metric in metrics), ", ".join(usage) or "-",
        ]
        if steps:
            points = np.array(row["curve"]) if row["curve"] else np.full((1, 2), np.nan)
            cells.append(f"{np.interp(steps, points[:, 0], points[:, 1]):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    protocol = next(iter(results.values())).protocol
    networks = [protocol.get(key) or {} for key in ("network", "perceptual")]
    judges = ", ".join(f"{each['name']} ({str(each['sha256'])[:12]})" for each in networks if each)
    lines += ["", f"{protocol['images']['count']} unseen images; {judges}."]
    return "\n".join(lines) + "\n"


def number(value: float | None, best: float) -> str:
    """Phrase a metric, in bold where it is the best."""
    if value is None:
        return "-"
    text = f"{value:.4g}"
    return f"**{text}**" if value == best else text


def sheet_of(found: dict[str, Path]) -> Image.Image:
    """Show unseen images, and below them the reconstructions of each run, with its title."""
    pictures: dict[str, Tensor] = {}
    for title, run in found.items():
        subject = evaluate.load_subject(run, device="cpu")
        source = evaluate.DatasetImages(subject.config.data, "validation", limit=SHOWN)
        pixels = source.read(range(SHOWN))[1]
        pictures.setdefault("images", pixels)
        pictures[title] = reconstruct(subject.model, pixels)[0]
    height, width = next(iter(pictures.values())).shape[2:]
    side, font = (width + 2) * SCALE, ImageFont.load_default(16)
    left = 12 + math.ceil(max(font.getlength(title) for title in pictures))  # for the titles
    image = Image.new("RGB", (left + SHOWN * side, len(pictures) * (height + 2) * SCALE), "white")
    pen = ImageDraw.Draw(image)
    for line, (title, pixels) in enumerate(pictures.items()):
        top = line * (height + 2) * SCALE
        pen.text((4, top + height * SCALE // 2), title, "black", font, anchor="lm")
        for column, each in enumerate(pixels):
            picture = Image.fromarray(each.permute(1, 2, 0).cpu().numpy())
            picture = picture.resize((width * SCALE, height * SCALE), Image.Resampling.NEAREST)
            image.paste(picture, (left + column * side, top))
    return image


if __name__ == "__main__":
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
    sys.exit(main())
