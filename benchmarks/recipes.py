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
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.parts import machine
from benchmarks.tokenizers import (
    FINE,
    MODERN,
    NO_FIGURES,
    RESULTS,
    Row,
    check_folder,
    cpu_minutes,
    sheet_of,
    start_words,
    trained,
)
from taming.checkpoint import find_checkpoint, load_model, read_checkpoint
from taming.cli import evaluate
from taming.cli.parser import Parser, build_parser
from taming.config import find_config, load_config
from taming.eval.results import is_lower_better
from taming.util import atomic_write

PLAIN = ("revive_after=null", "model.ema_decay=null", "scheduler_config=null", "legacy=true")


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
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("recipes", nargs="*", metavar="RECIPE", help=f"any of {', '.join(RECIPES)}; default: all")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of the processor, for the training of each stage")
    budget.add_argument("--steps", type=int, help="batches of each stage, in place of --minutes")
    add("--seeds", type=int, default=1, help="runs of each recipe; the table has mean and standard deviation")
    add("--photos", type=Path, help="a folder of images, all of its unseen ones, in place of landscapes")
    add("--threads", type=int, default=1, help="of torch; default: 1")
    add("-n", "--num-images", type=int, default=2048, help="unseen images, and samples")
    add("--folder", type=Path, help="of the runs; default: logs/recipes_<budget>")
    add("--out", type=Path, help="the JSON file; the table and the sheet are put beside it; default: "
        "benchmarks/results/<date>_recipes.json")
    options = parser.parse_args(argv)
    if unknown := set(options.recipes) - {*RECIPES}:
        parser.error(f"no recipe {', '.join(sorted(unknown))}: choose from {', '.join(RECIPES)}")
    torch.set_num_threads(options.threads)
    amount = f"{options.minutes:g}min" if options.minutes else f"{options.steps}steps"
    data = "_photos" if options.photos else ""
    folder = options.folder or Path("logs") / f"recipes_{amount}{data}"
    check_folder(folder, {
        "minutes": options.minutes, "steps": options.steps, "threads": options.threads,
        "num_images": options.num_images, "photos": options.photos and str(options.photos.resolve()),
    })
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        options.seed = seed
        for name in options.recipes or RECIPES:
            print(f"\n## {RECIPES[name].tokenizer.title}, seed {seed}", flush=True)
            if (measured := measure(name, folder, options)) is None:
                return 130  # stopped by Ctrl-C: the run is saved
            found.setdefault(name, []).append(measured)
    out = options.out or RESULTS / f"{time.strftime('%Y-%m-%d_%H-%M')}_recipes.json"
    write(out, f"python -m benchmarks.recipes {shlex.join(argv)}", found)
    return 0


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Train and evaluate both stages of a recipe, or what is left of that; None where it was stopped."""
    label = f"{name}_seed{options.seed}"
    kept = folder / f"{label}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    recipe, measured = RECIPES[name], {"name": name, "seed": options.seed}
    first: Path | None = None
    for stage in ("tokenizer", "prior"):
        row = recipe.tokenizer if first is None else prior(recipe, first, without_class=bool(options.photos))
        if options.photos:
            row = with_photos(row, options.photos, folder / f"{label}_{stage}.yaml")
        words = start_words(row, f"{label}_{stage}", folder, options, validate_every=1.0)
        run = trained(f"{label}_{stage}", folder, words)
        if run is None:
            return None
        checkpoint = read_checkpoint(find_checkpoint(run), tensors=())
        model, _, _ = load_model(find_checkpoint(run))
        others = ("loss.", "first_stage_model.")
        own = [p for key, p in model.named_parameters() if not key.startswith(others)]
        protocols = ["reconstruction"] if first is None else ["generation", "likelihood"]
        measured[stage] = {
            "run": str(run), "batches": checkpoint["batches_seen"], "cpu_minutes": cpu_minutes(checkpoint),
            "parameters": sum(p.numel() for p in own), "evaluations": evaluated(run, protocols, options),
        }
        first = run
    with atomic_write(kept) as partial:
        partial.write_text(json.dumps(measured), encoding="utf-8")
    return measured


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


def evaluated(run: Path, protocols: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a run on unseen images, as `taming evaluate` does."""
    parser = build_parser(evaluate, "recipes.py")
    assert isinstance(parser, Parser)
    words = [str(run), "--protocol", *protocols, "--device", "cpu"]
    if not options.photos:
        words += ["-n", str(options.num_images), f"data.params.validation.params.length={options.num_images}"]
    results = evaluate.evaluate_run(evaluate.load_subject(run, device="cpu"), parser.read(words))
    return [json.loads(result.to_json()) for result in results if result is not None]


# ---- what is written


def write(out: Path, command: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table; write it, all numbers and a sheet of the first seed's reconstructions."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(command, found)
    print(f"\n{text}")
    date = time.strftime("%Y-%m-%d %H:%M")
    content = {"command": command, "date": date, "machine": machine(), "recipes": found}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    runs = {RECIPES[name].tokenizer.title: Path(each[0]["tokenizer"]["run"]) for name, each in found.items()}
    sheet_of(runs).save(out.with_suffix(".png"), optimize=True)
    print(f"written to {out}, .md and .png")


def markdown(command: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table, a line for each metric, the best of each in bold: mean and deviation of the seeds."""
    values = {name: [metrics_of(each) for each in runs] for name, runs in found.items()}
    metrics = list(dict.fromkeys(metric for runs in values.values() for metric in runs[0]))
    titles = [RECIPES[name].tokenizer.title for name in found]
    lines = [f"    {command}", "", "| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for stage in ("tokenizer", "prior"):
        first = [runs[0][stage] for runs in found.values()]
        cells = [f"{each['parameters'] / 1e6:.2f}M, {each['batches']:,}" for each in first]
        lines.append(f"| {stage}: parameters, batches | " + " | ".join(cells) + " |")
    for metric in metrics:
        means = [statistics.fmean(run[metric] for run in runs) for runs in values.values()]
        best = (min if is_lower_better(metric) else max)(means)
        cells = []
        for mean, runs in zip(means, values.values(), strict=True):
            text = f"**{mean:.4g}**" if mean == best else f"{mean:.4g}"
            if len(runs) > 1:
                text += f" ± {statistics.stdev(run[metric] for run in runs):.2g}"
            cells.append(text)
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def metrics_of(measured: dict[str, Any]) -> dict[str, float]:
    """Return all metrics of both stages."""
    stages = [measured[stage]["evaluations"] for stage in ("tokenizer", "prior")]
    return {key: value for each in stages for result in each for key, value in result["metrics"].items()}


if __name__ == "__main__":
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
    sys.exit(main())
