#!/usr/bin/env python
"""Three recipes of both stages at equal time: that of 2021, LlamaGen's, and `configs/modern/`.

    python -m benchmarks.recipes --minutes 15 --seeds 3                   the built-in landscapes, 64 pixels
    python -m benchmarks.recipes --minutes 15 --seeds 3 --photos photos   a folder of images, without a class
    python -m benchmarks.recipes modern --minutes 0.05 -n 16              one recipe, to see that it runs

A recipe is its networks, quantizer, losses, optimizer and prior. All have about a million parameters and 256
codes of 512 in the first stage, about three million parameters in the second, and no perceptual loss, since
LPIPS needs a download. Each stage trains for `--minutes` of the processor, on the same images in the same
order; then unseen images are reconstructed, described in codes, and generated. A second start goes on where
the first was stopped.
"""

import argparse
import json
import logging
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks import runs
from benchmarks.tokenizers import FINE, MODERN, NO_FIGURES, Row, sheet_of, start_words
from taming.checkpoint import find_checkpoint, load_model, read_checkpoint
from taming.config import find_config, load_config
from taming.eval.results import is_lower_better

PLAIN = ("revive_after=null", "scheduler_config=null", "legacy=true")


@dataclass(frozen=True)
class Recipe:
    """The first and the second stage; the latter's checkpoint is added."""

    tokenizer: Row
    prior: Row
    without_class: tuple[str, ...] = ()  # what the prior needs then, beside UNCONDITIONAL


RECIPES = {
    "2021": Recipe(
        Row("2021", FINE, (
            *NO_FIGURES, *PLAIN, "betas=[0.5,0.9]", "lossconfig.params.pixel_loss=l1",
            "lossconfig.params.pixelloss_weight=1.0", "lossconfig.params.disc_weight=0.8",
        )),
        Row("2021", "landscapes/landscapes_class_transformer", ("scheduler_config=null",)),
    ),
    "llamagen": Recipe(
        Row("LlamaGen", FINE, (
            *NO_FIGURES, *PLAIN, "betas=[0.9,0.95]", "lossconfig.params.disc_adaptive=false",
            "lossconfig.params.disc_weight=0.5", "lossconfig.params.pixelloss_weight=1.0",
            "quantizer_config={target: taming.modules.quantizers.vector.VQ, "
            "params: {codebook_size: 512, dim: 16, codebook_dim: 8, l2_normalize: true}}",
        )),
        Row("LlamaGen", "modern/landscapes_llama", (
            "scheduler_config=null", "transformer_config.params.embedding_from_codebook=false",
        )),
        ("cond_dropout=0.0", "null_token=null"),
    ),
    "modern": Recipe(
        Row("modern", MODERN), Row("modern", "modern/landscapes_prior"),
        ("cond_dropout=0.0", "null_token=null", "transformer_config.params.adaln=false"),
    ),
}
UNCONDITIONAL = ("cond_stage_config=__is_unconditional__", "sos_token=0")
HELD_OUT = 0.3  # share of the photos


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate the recipes; print a table, and write it, the numbers and a sheet of images."""
    argv = sys.argv[1:] if argv is None else argv
    rows = f"any of {', '.join(RECIPES)}; default: all"
    parser = runs.options_parser("recipes", __doc__, rows, "unseen images, and samples")
    runs.add_budget(parser, "each stage")
    add = parser.add_argument
    add("--seeds", type=int, default=1, help="runs of each recipe; the table has mean and standard deviation")
    add("--photos", type=Path, help="a folder of images, all of its unseen ones, in place of landscapes")
    options = runs.read_options(parser, argv, RECIPES)
    data = "_photos" if options.photos else ""
    folder = options.folder or Path("logs") / f"recipes_{runs.budget_name(options)}{data}"
    runs.check_folder(folder, {
        "minutes": options.minutes, "steps": options.steps, "threads": options.threads,
        "num_images": options.num_images, "photos": options.photos and str(options.photos.resolve()),
    })
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        options.seed = seed
        for name in options.rows or RECIPES:
            print(f"\n## {RECIPES[name].tokenizer.title}, seed {seed}", flush=True)
            if (measured := measure(name, folder, options)) is None:
                return 130  # stopped by Ctrl-C: the run is saved
            found.setdefault(name, []).append(measured)
    first = {RECIPES[name].tokenizer.title: each[0]["tokenizer"]["run"] for name, each in found.items()}
    sheet = sheet_of({title: Path(run) for title, run in first.items()})
    runs.write(
        "recipes", options.out, argv, {"recipes": found}, partial(markdown, found=found),
        partial(sheet.save, optimize=True),
    )
    return 0


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Train and evaluate both stages of a recipe, or what is left of that; None where it was stopped."""
    recipe, label = RECIPES[name], f"{name}_seed{options.seed}"
    measured: dict[str, Any] = {"name": name, "seed": options.seed}
    for stage in ("tokenizer", "prior"):
        row = recipe.tokenizer
        if stage == "prior":
            row = prior(recipe, Path(measured["tokenizer"]["run"]), without_class=bool(options.photos))
        file = folder / f"{label}_{stage}.json"
        found = runs.kept(file, partial(measure_stage, row, stage, file.stem, folder, options))
        if found is None:
            return None
        measured[stage] = found
    return measured


def measure_stage(
    row: Row, stage: str, name: str, folder: Path, options: argparse.Namespace
) -> dict[str, Any] | None:
    """Train and evaluate a stage, or what is left of that; None where it was stopped by a signal."""
    protocols = ("reconstruction",) if stage == "tokenizer" else ("generation", "likelihood")
    words = ["--protocol", *protocols]
    if options.photos:
        row = with_photos(row, options.photos, folder / f"{name}.yaml")
    else:
        words += ["-n", str(options.num_images), runs.unseen(options.num_images)]
    run = runs.trained(name, folder, start_words(row, name, folder, options, validate_every=1.0))
    if run is None:
        return None
    checkpoint = read_checkpoint(find_checkpoint(run), tensors=())
    model, _, _ = load_model(find_checkpoint(run))
    others = ("loss.", "first_stage_model.")
    own = [p for key, p in model.named_parameters() if not key.startswith(others)]
    return {
        "run": str(run), "batches": checkpoint["batches_seen"], "cpu_minutes": runs.cpu_minutes(checkpoint),
        "parameters": sum(p.numel() for p in own), "evaluations": runs.evaluated(run, *words),
    }


def prior(recipe: Recipe, first_stage: Path, *, without_class: bool) -> Row:
    """Return the second stage of a recipe, over the codes of a run."""
    changes = (*recipe.prior.changes, f"first_stage_config.params.ckpt_path={json.dumps(str(first_stage))}")
    if without_class:
        changes = (*changes, *UNCONDITIONAL, *recipe.without_class)
    return replace(recipe.prior, changes=changes)


def with_photos(row: Row, folder: Path, kept: Path) -> Row:
    """Return the row with a folder of images in place of its data, in a configuration that is kept."""
    config = load_config([find_config(row.config)])
    for part, target in (("train", "CustomTrain"), ("validation", "CustomTest")):
        params = {"folder": str(folder.resolve()), "split": HELD_OUT, "size": "${size}"}
        config.data.params[part] = {"target": f"taming.data.custom.{target}", "params": params}
    OmegaConf.save(config, kept)
    changes = tuple(change for change in row.changes if not change.startswith("data."))
    return replace(row, config=str(kept), changes=changes)


# ---- what is written


def markdown(command: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table, a line for each metric, the best of each in bold: mean and deviation of the seeds."""
    values = {name: [metrics_of(each) for each in seeds] for name, seeds in found.items()}
    metrics = list(dict.fromkeys(metric for seeds in values.values() for metric in seeds[0]))
    titles = [RECIPES[name].tokenizer.title for name in found]
    lines = [f"    {command}", "", "| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for stage in ("tokenizer", "prior"):
        first = [seeds[0][stage] for seeds in found.values()]
        cells = [f"{each['parameters'] / 1e6:.2f}M, {each['batches']:,}" for each in first]
        lines.append(f"| {stage}: parameters, batches | " + " | ".join(cells) + " |")
    for metric in metrics:
        means = [statistics.fmean(seed[metric] for seed in seeds) for seeds in values.values()]
        best = (min if is_lower_better(metric) else max)(means)
        cells = []
        for mean, seeds in zip(means, values.values(), strict=True):
            text = f"**{mean:.4g}**" if mean == best else f"{mean:.4g}"
            if len(seeds) > 1:
                text += f" ± {statistics.stdev(seed[metric] for seed in seeds):.2g}"
            cells.append(text)
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def metrics_of(measured: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of both stages.

    PSNR and perplexity, which both have, are the tokenizer's: the prior's PSNR is the same, and its
    perplexity follows from its nats per code.
    """
    found: dict[str, float] = {}
    for stage in ("tokenizer", "prior"):
        for result in measured[stage]["evaluations"]:
            for metric, value in result["metrics"].items():
                found.setdefault(metric, value)
    return found


if __name__ == "__main__":
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
    sys.exit(main())
