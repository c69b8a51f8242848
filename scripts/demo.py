#!/usr/bin/env python
"""Train both stages on the built-in landscapes, and draw pictures: python scripts/demo.py (make demo).

Needs no GPU, no data and no download; some minutes on two cores. A run that was cut short goes on where it
stopped: stages that are complete are not trained again.
"""

import argparse
import csv
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from scripts import make_panorama, sample_fast
from taming.checkpoint import read_checkpoint
from taming.data.files.images import read_image
from taming.data.landscapes import Landscapes
from taming.images import from_uint8, image_grid, save_png
from taming.training import command as train
from taming.util import number

ROOT = Path(__file__).resolve().parents[1]
COAST_BY_DAY = "13"  # of the 16 classes of taming.data.landscapes
COMPLETED = range(1, 16, 2)  # scenes of the validation set: each biome by day and at night


def main(argv: list[str] | None = None) -> int:
    """Train, draw, and say where the pictures are; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--outdir", default="logs/demo", help="where runs and pictures go")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the samples")
    options, overrides = parser.parse_known_args(argv)
    start, out = time.monotonic(), Path(options.outdir)
    for name in ("vqgan", "transformer"):
        config = ["--base", str(ROOT / "configs" / "demo" / f"{name}.yaml")]
        if name == "transformer":
            config.append(f"model.params.first_stage_config.params.ckpt_path={stage_run(out, 'vqgan')}")
        status = train_stage(out, name, config + overrides)
        if status:
            return status
    status = draw(out, options.seed)
    if status:
        return status
    vqgan = last_metrics(stage_run(out, "vqgan"))
    transformer = last_metrics(stage_run(out, "transformer"))
    print(f"""
stage 1   PSNR {vqgan["val/psnr"]:.1f} dB, SSIM {vqgan["val/ssim"]:.3f} on unseen scenes; \
{vqgan["val/codebook_usage_percent"]:.0f} % of the codes in use
stage 2   {transformer["val/loss"]:.3f} nats per code on unseen scenes
pictures  {out / "samples.png"}   64 samples, four of each biome and time of day
          {out / "panorama.png"}   drawn after configs/demo/panorama.png, four times as wide as in training
          {out / "completions.png"}   upper halves of unseen scenes, completed below
          {newest(stage_run(out, "vqgan") / "images" / "val", "sheet")}   unseen scenes, \
each beside its reconstruction
          {out / "samples"}   the samples one by one
{(time.monotonic() - start) / 60:.1f} minutes""")
    return 0


def draw(out: Path, seed: int) -> int:
    """Samples of all classes, a panorama after a label map, and completions; returns the exit status."""
    usual = ["-r", str(stage_run(out, "transformer")), "--top_p", "0.95", "--seed", str(seed)]
    status = sample_fast.main([
        *usual, "-o", str(out / "samples"), "-n", "64", "--batch_size", "64",
        "--grid", str(out / "samples.png"),
    ])
    status = status or make_panorama.main([
        *usual, "-o", str(out / "panorama.png"), "--class", COAST_BY_DAY, "--stride", "4",
        "--guidance", "2.5",
        "--segmentation", str(ROOT / "configs" / "demo" / "panorama.png"),
    ])
    return status or complete(out, usual)


def complete(out: Path, usual: list[str]) -> int:
    """Unseen scenes without their lower halves, and below them what the transformer makes of these."""
    scenes = Landscapes(64, split="validation")
    rows: tuple[list[Tensor], list[Tensor]] = [], []
    for i in COMPLETED:
        original, completed = (out / "completions" / f"{i:02d}_{name}.png" for name in ("scene", "completed"))
        image = torch.from_numpy(scenes[i]["image"]).permute(2, 0, 1)  # (3, H, W)
        save_png(image, original)
        status = make_panorama.main([
            *usual, "-o", str(completed), "--complete", str(original), "--class", str(i),
        ])
        if status:
            return status
        image[:, image.shape[1] // 2 :] = 0.0  # gray
        rows[0].append(image)
        rows[1].append(torch.from_numpy(from_uint8(read_image(completed))).permute(2, 0, 1))
    save_png(image_grid(torch.stack(rows[0] + rows[1]), len(COMPLETED)), out / "completions.png")
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
    """Return the last image of a kind that a run wrote."""
    return max(folder.glob(f"{name}_*.png"), default=folder)


def idle_cores(seconds: float = 0.5) -> int:
    """Return how many of the cores that this process may use are idle just now, at least 1.

    More threads than that wait for each other at every layer: with one other job on two cores, two threads
    are several times slower than one.
    """
    if not hasattr(os, "sched_getaffinity") or not Path("/proc/stat").exists():  # not Linux
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return max(1, round((os.cpu_count() or 1) - load))
    before = core_times()
    time.sleep(seconds)
    after = core_times()
    spans = [[b - a for a, b in zip(before[core], after[core], strict=True)] for core in after]
    return max(1, round(sum((span[3] + span[4]) / max(1, sum(span)) for span in spans)))  # idle, iowait


def core_times() -> dict[int, list[int]]:
    """Return Linux's counters of each core that may be used here: user, nice, system, idle, iowait, ..."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    times = {name: [*map(int, numbers)] for name, *numbers in lines if name.startswith("cpu")}
    return {core: times[f"cpu{core}"] for core in os.sched_getaffinity(0) if f"cpu{core}" in times}


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(idle_cores())
    sys.exit(main())
