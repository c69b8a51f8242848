#!/usr/bin/env python
"""How well samples follow their condition, on the built-in landscapes: benchmarks/conditions.py logs/RUN ...

Each run of configs/landscapes draws pictures for unseen scenes, and a figure of its kind says how well they
agree with their conditions; beside it the same figure against the conditions of other scenes (chance), and of
the reconstructions of the very scenes (what the first stage lets through). README.md in this folder says what
the numbers mean.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.parts import machine
from taming.checkpoint import load_model
from taming.cli.parser import exit_status
from taming.data.landscapes import Landscapes
from taming.data.landscapes.objects import CATEGORIES
from taming.data.transforms.edges import canny, gray
from taming.images import image_grid, save_png
from taming.metrics import psnr
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators
from taming.training.callbacks import plain
from taming.util import ProgressBar

TRUTH = ("image", "class_label", "segmentation", "depth", "objects")
LABELS = {  # of the judge, for the sky, and for each category of objects
    "sky": (0,), "sun": (1,), "moon": (1,), "spruce": (6,), "cactus": (6,), "palm": (6,), "person": (10,),
    "mountains": (3, 4), "water": (5,), "sand": (8,),
}
SHIFT = 5  # scenes between a picture and the condition of another that it is held against; classes differ


class Judge(nn.Module):
    """Sees labels, depth and class in pictures (B, 3, 64, 64): a small U-Net, trained on such scenes."""

    def __init__(self, channels: int = 24, n_labels: int = 11, n_classes: int = 16):
        super().__init__()
        sides = [channels, 2 * channels, 4 * channels]
        blocks = zip([3, *sides], [*sides, sides[-1]], strict=True)
        self.down = nn.ModuleList(self._block(inputs, outputs) for inputs, outputs in blocks)
        blocks = zip([sides[2], sides[2], sides[1]], reversed(sides), strict=True)
        self.up = nn.ModuleList(self._block(below + beside, beside) for below, beside in blocks)
        self.pixels, self.kind = nn.Conv2d(channels, n_labels + 1, 1), nn.Linear(2 * sides[-1], n_classes)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU(),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of labels (B, 11, H, W), depth (B, H, W), logits of classes (B, 16)."""
        kept = []
        for block in self.down[:-1]:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.down[-1](x)
        kind = self.kind(torch.cat((x.mean((2, 3)), x.amax((2, 3))), dim=1))
        for block, beside in zip(self.up, reversed(kept), strict=True):
            x = block(torch.cat((F.interpolate(x, scale_factor=2.0), beside), dim=1))
        pixels = self.pixels(x)
        return pixels[:, :-1], pixels[:, -1], kind


def train_judge(steps: int) -> Judge:
    """A judge that has seen scenes of the training split, half of them with a person."""
    torch.manual_seed(0)
    keys = "image", "class_label", "segmentation", "depth"
    data = Landscapes(64, 2000, keys=keys, figures=0.5, cache=True)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    weight = torch.tensor([1.0] * 10 + [4.0])  # few pixels show a person
    bar = ProgressBar(total=steps, desc="judge", unit="batch")
    while bar.n < steps:
        for batch in DataLoader(data, batch_size=16, shuffle=True, drop_last=True):
            if bar.n == steps:
                break
            x = batch["image"].permute(0, 3, 1, 2)
            x[::2] = F.interpolate(F.avg_pool2d(x[::2], 2), scale_factor=2.0, mode="bilinear")  # a blur
            x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
            labels, depth, kind = judge(x)
            loss = F.cross_entropy(labels, batch["segmentation"].argmax(-1), weight)
            loss = loss + F.l1_loss(depth, batch["depth"][..., 0])
            loss = loss + 0.3 * F.cross_entropy(kind, batch["class_label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return judge.eval()


class Seen:
    """What the judge sees in pictures (B, 3, H, W)."""

    def __init__(self, judge: Judge, images: Tensor):
        labels, self.depth, kind = judge(images)
        self.images, self.labels, self.kind = images, labels.argmax(1), kind.argmax(1)


# ---- figures: what is seen, and the truth of as many items, to a number; higher is better


def class_accuracy(seen: Seen, truth: dict) -> float:
    return (seen.kind == truth["class_label"]).float().mean().item()


def label_iou(seen: Seen, truth: dict) -> float:
    """Mean over labels of intersection over union, over all pictures."""
    ids = truth["segmentation"].argmax(-1)
    scores = []
    for label in ids.unique():
        ours, theirs = seen.labels == label, ids == label
        scores.append(((ours & theirs).sum() / (ours | theirs).sum()).item())
    return float(np.mean(scores))


def depth_order(seen: Seen, truth: dict) -> float:
    """Share of pairs of pixels in a row, clearly apart in depth, that are seen in their order.

    In a row, since what is higher is farther in nearly every landscape.
    """
    generator = torch.Generator().manual_seed(0)
    depth = truth["depth"][..., 0]  # (B, H, W)
    rows, first, second = torch.randint(depth.shape[1], (3, 4000), generator=generator)  # H = W
    want, got = (x[:, rows, first] - x[:, rows, second] for x in (depth, seen.depth))
    apart = want.abs() > 0.2
    return (want.sign() == got.sign())[apart].float().mean().item()


def grown(mask: Tensor) -> Tensor:
    """A mask (B, 1, H, W) and the pixels next to it."""
    return F.max_pool2d(mask, 3, 1, 1)


def edge_f1(seen: Seen, truth: dict) -> float:
    """F1 of Canny edges, with a pixel of tolerance."""
    found = [canny(gray(image.permute(1, 2, 0).numpy()), sigma=1.0) for image in seen.images]
    ours = torch.from_numpy(np.stack(found)).float()[:, None]
    theirs = (truth["edges"][..., 0] > 0).float()[:, None]
    precision = ((ours * grown(theirs)).sum() / ours.sum()).item()
    recall = ((theirs * grown(ours)).sum() / theirs.sum()).item()
    return 2 * precision * recall / max(precision + recall, 1e-9)


def joints_on_person(seen: Seen, truth: dict) -> float:
    """Share of the visible joints where a person is seen, within a pixel."""
    person = grown((seen.labels == LABELS["person"][0]).float()[:, None])[:, 0]
    hits = []
    for picture, joints in zip(person, truth["keypoints"], strict=True):
        for x, y, visible in joints.tolist():
            if visible and 0 <= x < 64 and 0 <= y < 64:
                hits.append(picture[int(y), int(x)].item())
    return float(np.mean(hits))


def boxes_filled(seen: Seen, truth: dict) -> float:
    """Mean over boxes of the share of rows and columns where their category is seen."""
    scores = []
    for labels, objects in zip(seen.labels, truth["objects"], strict=True):
        for one in objects:
            x, y, w, h = (round(64 * side) for side in one.bbox)
            inside = labels[y : max(y + h, y + 1), x : max(x + w, x + 1)]
            shown = torch.isin(inside, torch.tensor(LABELS[CATEGORIES[one.category_no]]))
            scores.append((shown.any(0).float().mean() + shown.any(1).float().mean()).item() / 2)
    return float(np.mean(scores))


def place_of_sky(seen: Seen, truth: dict) -> float:
    """Correlation, over pictures, of how low in its scene a crop lies and how little sky is seen in it."""
    sky = (seen.labels == LABELS["sky"][0]).float().mean((1, 2))
    low = truth["coord"].flatten(1).mean(1)
    return -torch.corrcoef(torch.stack((sky, low)))[0, 1].item()


def small_psnr(seen: Seen, truth: dict) -> float:
    """Of the shrunk pictures against the small ones, in dB."""
    small = truth["lr_image"].permute(0, 3, 1, 2)
    return psnr(F.interpolate(seen.images, small.shape[2:], mode="area"), small).mean().item()


def upper_psnr(seen: Seen, truth: dict) -> float:
    """Of the upper halves, in dB."""
    half = truth["upper_half"].permute(0, 3, 1, 2)
    return psnr(seen.images[:, :, : half.shape[2]], half).mean().item()


Figure = Callable[[Seen, dict], float]
FIGURES: dict[str, Figure] = {
    "class_label": class_accuracy, "segmentation": label_iou, "depth": depth_order, "edges": edge_f1,
    "pose": joints_on_person, "pose_tokens": joints_on_person, "objects_bbox": boxes_filled,
    "objects_center_points": boxes_filled, "lr_image": small_psnr, "upper_half": upper_psnr,
    "coord": place_of_sky,
}


def fitted(rows: Tensor, size: torch.Size) -> Tensor:
    """Pictures (B, C, h, w) as RGB of `size` (H, W): as large as fits, with white below or beside."""
    factor = min(side / own for side, own in zip(size, rows.shape[2:], strict=True))
    rows = F.interpolate(rows.expand(-1, 3, -1, -1), scale_factor=factor)
    height, width = (side - own for side, own in zip(size, rows.shape[2:], strict=True))
    return F.pad(rows, (0, width, 0, height), value=1.0)


def load_run(run: Path) -> tuple[str, Net2NetTransformer, DictConfig]:
    """Name, model and configuration of a run of a transformer on landscapes."""
    model, config, _ = load_model(run)
    if not isinstance(model, Net2NetTransformer) or not set(model.cond_keys) <= set(FIGURES):
        known = ", ".join(FIGURES)
        raise ValueError(f"{run} is a {type(model).__name__}: give transformers, conditioned on {known}")
    return run.name, model, config


@torch.no_grad()
def measure(
    name: str, model: Net2NetTransformer, config: DictConfig, judge: Judge, options: argparse.Namespace
) -> list[dict]:
    """The figures of a run, one for each of its conditions; guided where it has a null token."""
    count, guidance = options.count, 1.0 if model.null_token is None else options.guidance
    params = plain(config.data)["params"]["validation"]["params"]
    extra = ["keypoints"] if {"pose", "pose_tokens"} & set(model.cond_keys) else []
    keys = [*dict.fromkeys((*TRUTH, *params["keys"], *extra))]
    data = Landscapes(**params | {"keys": keys, "length": count})
    torch.manual_seed(0)  # of random crops
    truth = data.collate_fn([data[i] for i in range(count)])
    other = data.collate_fn([data[(i + SHIFT) % count] for i in range(count)])
    x, c = model.get_xc(truth)
    parts = model.encode_conditions(c)
    generators = image_generators(0, range(count))
    codes = model.sample_codes(parts, top_p=0.95, guidance=guidance, generator=generators)
    pictures = {"sample": codes, "reconstruction": model.encode_to_z(x)[1].view_as(codes)}
    decode = model.first_stage_model.decode_code
    seen = {name: Seen(judge, decode(codes).clamp(-1, 1)) for name, codes in pictures.items()}
    if options.out:
        drawn = [fitted(row[:8], x.shape[2:]) for row in model.show_conditions(c, x, [data]).values()]
        sheet = torch.cat((x[:8], *drawn, seen["sample"].images[:8]))
        save_png(image_grid(sheet, 8), options.out / f"{name}.png")
    nll = [model.shared_step(batch | {"image": truth["image"]}).item() for batch in (truth, other)]
    rows = []
    for key in model.cond_keys:
        figure = FIGURES[key]
        rows.append({
            "run": name, "condition": key, "figure": figure.__name__, "guidance": guidance,
            "sample": figure(seen["sample"], truth), "other_condition": figure(seen["sample"], other),
            "reconstruction": figure(seen["reconstruction"], truth), "nll": nll[0],
            "nll_other_condition": nll[1],
        })
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train the judge, measure the runs, print a line each."""
    argv = sys.argv[1:] if argv is None else argv
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of transformers")
    parser.add_argument("-n", "--count", type=int, default=64, help="pictures of each; default: 64")
    parser.add_argument("--guidance", type=float, default=1.0, help="of models with a null token; default: 1")
    parser.add_argument("--judge-steps", type=int, default=400, help="batches of 16; default: 400")
    parser.add_argument("--out", type=Path, help="folder for the JSON file, and for a sheet of each run")
    return exit_status(run_all, parser.parse_args(argv), shlex.join(["benchmarks/conditions.py", *argv]))


def run_all(options: argparse.Namespace, command: str) -> None:
    """Load every run, before the judge takes its minutes, and measure them one after the other."""
    runs, rows = [load_run(run) for run in options.runs], []
    judge = train_judge(options.judge_steps)
    names = "guidance", "sample", "other", "recon.", "nll", "other"
    print(f"{'condition':24s}{'figure':20s}" + "".join(f"{name:>10s}" for name in names))
    for run in runs:
        for row in measure(*run, judge, options):
            rows.append(row)
            numbers = "".join(f"{value:10.3f}" for value in row.values() if isinstance(value, float))
            print(f"{row['condition']:24s}{row['figure']:20s}{numbers}", flush=True)
    if options.out:
        date = time.strftime("%Y-%m-%d %H:%M")
        results = {"command": f"python {command}", "date": date, "machine": machine(), "runs": rows}
        (options.out / "conditions.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
