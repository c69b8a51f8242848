"""Train both stages on the built-in landscapes and generate images: make demo.

Needs no GPU, no data and no download; some minutes on two cores. Start it again after an interruption: stages
that are complete are not trained again, and one that is not is resumed. All other words are options of
training, for both stages: --gpus 0, or model.params.n_embed=512.
"""

import csv
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from taming.checkpoint import read_checkpoint
from taming.cli import command
from taming.cli.options import add_outdir
from taming.cli.parser import Parser, exit_status
from taming.config import find_config
from taming.data.landscapes import Landscapes
from taming.images import image_grid, load_png
from taming.inference.provenance import save_image
from taming.training.command import main as train
from taming.util import number

COAST_BY_DAY = "13"  # of the 16 classes of taming.data.landscapes
COMPLETED = range(1, 16, 2)  # scenes of the validation set: each biome by day and at night


def build_parser(prog: str | None = None) -> Parser:
    """Return the parser of the options that are not those of training."""
    parser = Parser(__doc__, prog)
    add_outdir(parser, "folder for runs and images", default=Path("logs/demo"))
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the samples")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the demo; return its exit status."""
    options, words = build_parser(prog).parse_known_args(argv)
    return exit_status(run, options.outdir, options.seed, words)


def run(out: Path, seed: int, words: Sequence[str]) -> None:
    """Train, generate, and print where the images are; `words` are options of training."""
    start = time.monotonic()
    for name in ("vqgan", "transformer"):
        config = ["--base", str(find_config(f"demo/{name}"))]
        if name == "transformer":
            config.append(f"model.params.first_stage_config.params.ckpt_path={stage_run(out, 'vqgan')}")
        train_stage(out, name, [*config, *words])
    generate(out, seed)
    vqgan = last_metrics(stage_run(out, "vqgan"))
    transformer = last_metrics(stage_run(out, "transformer"))
    images = stage_run(out, "vqgan") / "images" / "val"
    print(f"""
stage 1  PSNR {vqgan["val/psnr"]:.1f} dB, SSIM {vqgan["val/ssim"]:.3f} on unseen scenes; \
{vqgan["val/codebook_usage_percent"]:.0f} % of the codes in use
stage 2  {transformer["val/loss"]:.3f} nats per code on unseen scenes
images   {out / "samples.png"}   64 samples, four of each biome and time of day
         {out / "panorama.png"}   after the label map demo/panorama.png, four times as wide as in training
         {out / "completions.png"}   upper halves of unseen scenes, completed below
         {newest(images, "sheet")}   unseen scenes, each beside its reconstruction
         {out / "samples"}   the samples one by one
{(time.monotonic() - start) / 60:.1f} minutes""")


def generate(out: Path, seed: int) -> None:
    """Generate samples of all classes, a panorama after a label map, and completions."""
    common = ["-r", str(stage_run(out, "transformer")), "--top-p", "0.95", "--seed", str(seed)]
    call(
        "sample", *common, "-o", out / "samples", "-n", 64, "--batch-size", 64, "--grid", out / "samples.png",
    )
    call(
        "panorama", *common, "-o", out / "panorama.png", "--classes", COAST_BY_DAY, "--stride", 4,
        "--guidance", 2.5, "--segmentation", find_config("demo/panorama.png"),
    )
    scenes = Landscapes(64, split="validation")
    above: list[Tensor] = []
    below: list[Tensor] = []
    for i in COMPLETED:
        original, completed = (out / "completions" / f"{i:02d}_{name}.png" for name in ("scene", "completed"))
        image = torch.from_numpy(scenes[i]["image"]).permute(2, 0, 1)  # (3, H, W)
        save_image(image, original)
        call("panorama", *common, "-o", completed, "--complete", original, "--classes", i)
        image[:, image.shape[1] // 2 :] = 0.0  # gray: what the transformer is to complete
        above.append(image)
        below.append(load_png(completed))
    save_image(image_grid(torch.stack(above + below), len(COMPLETED)), out / "completions.png")


def call(name: str, *words: object) -> None:
    """Run a command, and end the demo if it fails."""
    if status := command(name)([str(word) for word in words]):
        raise SystemExit(status)


def stage_run(out: Path, name: str) -> Path:
    """Return the newest run directory of a stage."""
    runs = sorted(out.glob(f"*_demo_{name}"))
    return runs[-1] if runs else out / f"*_demo_{name}"


def train_stage(out: Path, name: str, arguments: list[str]) -> None:
    """Train one stage, or resume it if its run is there and not complete."""
    words = [*arguments, "-l", str(out), "-n", f"demo_{name}"]
    last = stage_run(out, name) / "checkpoints" / "last.ckpt"
    if last.is_file():
        checkpoint = read_checkpoint(last, tensors=())
        if checkpoint["batches_seen"] >= checkpoint["config"]["lightning"]["trainer"]["max_steps"]:
            print(f"{last.parents[1]} is trained already")
            return
        words = ["-r", str(last.parents[1])]
    again = "make demo" if "MAKELEVEL" in os.environ else f"taming demo -o {shlex.quote(str(out))}"
    if status := train(["-t", "--no-test", *words], resume_with=again):
        raise SystemExit(status)


def last_metrics(run: Path) -> dict[str, float]:
    """Return the last value of each curve of a run."""
    with open(run / "metrics.csv", newline="") as file:
        rows = csv.DictReader(file)
        return {key: float(value) for row in rows for key, value in row.items() if value}


def newest(folder: Path, name: str) -> Path:
    """Return the last sheet of a kind that a run wrote."""
    return max(folder.glob(f"{name}_*.png"), default=folder)
