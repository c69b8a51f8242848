#!/usr/bin/env python
"""Train both stages on the built-in landscapes, and draw pictures: python scripts/demo.py (make demo).

Needs no GPU, no data and no download; some minutes on two cores. A run that was cut short goes on where it
stopped: stages that are complete are not trained again.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import make_panorama, sample_fast
from taming import train
from taming.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
COAST_BY_DAY = "13"  # of the 16 classes of taming.data.landscapes


def main(argv: list[str] | None = None) -> int:
    """Train, draw, and say where the pictures are; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--outdir", default="logs/demo", help="where runs and pictures go")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    options, overrides = parser.parse_known_args(argv)
    start, out = time.monotonic(), Path(options.outdir)
    for name in ("vqgan", "transformer"):
        config = ["--base", str(ROOT / "configs" / "demo" / f"{name}.yaml")]
        if name == "transformer":
            config.append(f"model.params.first_stage_config.params.ckpt_path={stage_run(out, 'vqgan')}")
        status = train_stage(out, name, config + overrides)
        if status:
            return status
    samples = out / "samples"
    status = sample_fast.main([
        "-r", str(stage_run(out, "transformer")), "-o", str(samples), "-n", "64", "--batch_size", "64",
        "--top_p", "0.95", "--seed", str(options.seed), "--grid", str(out / "samples.png"),
    ])
    status = status or make_panorama.main([
        "-r", str(stage_run(out, "transformer")), "-o", str(out / "panorama.png"), "--class", COAST_BY_DAY,
        "--top_p", "0.95", "--stride", "4", "--seed", str(options.seed),
    ])
    if status:
        return status
    vqgan = last_metrics(stage_run(out, "vqgan"))
    transformer = last_metrics(stage_run(out, "transformer"))
    print(f"""
stage 1   PSNR {vqgan["val/psnr"]:.1f} dB, SSIM {vqgan["val/ssim"]:.3f} on unseen scenes; \
{vqgan["val/codebook_usage_percent"]:.0f} % of the codes in use
stage 2   {transformer["val/loss"]:.3f} nats per code on unseen scenes
pictures  {out / "samples.png"}   64 samples, four of each biome and time of day
          {out / "panorama.png"}   one scene, four times as wide as those it was trained on
          {newest(stage_run(out, "vqgan") / "images" / "val", "inputs")}   unseen scenes
          {newest(stage_run(out, "vqgan") / "images" / "val", "reconstructions")}   their reconstructions
          {samples}   the samples one by one
{(time.monotonic() - start) / 60:.1f} minutes""")
    return 0


def stage_run(out: Path, name: str) -> Path:
    """The newest run directory of a stage."""
    runs = sorted(out.glob(f"*_demo_{name}"))
    return runs[-1] if runs else out / f"*_demo_{name}"


def train_stage(out: Path, name: str, arguments: list[str]) -> int:
    """Train one stage; a run of it that is there already is completed instead."""
    last = stage_run(out, name) / "checkpoints" / "last.ckpt"
    if last.is_file():
        checkpoint = read_checkpoint(last)
        if checkpoint["batches_seen"] >= checkpoint["config"]["lightning"]["trainer"]["max_steps"]:
            print(f"{last.parents[1]} is trained already")
            return 0
        return train.main(["-t", "-r", str(last.parents[1]), "--no-test"])
    return train.main([*arguments, "-t", "-l", str(out), "-n", f"demo_{name}", "--no-test"])


def last_metrics(run: Path) -> dict[str, float]:
    """The last value of each curve of a run."""
    with open(run / "metrics.csv", newline="") as file:
        rows = csv.DictReader(file)
        return {key: float(value) for row in rows for key, value in row.items() if value}


def newest(folder: Path, name: str) -> Path:
    """The last picture of a kind that a run wrote."""
    return max(folder.glob(f"{name}_*.png"), default=folder)


if __name__ == "__main__":
    sys.exit(main())
