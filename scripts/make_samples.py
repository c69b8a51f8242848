#!/usr/bin/env python
"""Draw pictures for the conditions of a data set: python scripts/make_samples.py -r logs/RUN -o out -n 16

Writes originals, reconstructions, conditions (where they are pictures) and samples, one PNG of each per item.
The data set is that of the run; other YAML files (-b) and key.sub=value words are merged over it, and
--ignore_base_data leaves the run's out. Sample i of a seed is the same picture in any batch.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from taming.checkpoint import find_checkpoint, load_model
from taming.config import instantiate_from_config, load_config
from taming.data.sampler import SeededDataset
from taming.images import save_png
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators, sample_window
from taming.util import exit_status, pick_device


def parse(argv: list[str] | None) -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("-r", "--resume", required=True, help="run directory, checkpoint or exported folder of a transformer")
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="files that are merged over its config")
    add("--ignore_base_data", action="store_true", help="leave out the run's own `data` section")
    add("-o", "--outdir", type=Path, required=True, help="folder for the pictures")
    add("--split", default="validation", help="of the data: train, validation, test; default: validation")
    add("-n", "--num_samples", type=int, help="how many items, from the first; default: all")
    add("--batch_size", type=int, default=4, help="how many at once; changes the speed alone; default: 4")
    add("--scale", type=float, default=1.0, help="enlarge picture and condition by this factor; default: 1")
    add("--known", type=float, default=0.0, metavar="SHARE", help="share of the rows, from the top, that is "
        "taken from the original; the rest is completed; default: 0")
    add("--stride", type=int, default=1, help="codes drawn before the window moves; more is faster")
    add("-k", "--top_k", type=int, help="draw among the k likeliest codes; default: all")
    add("-t", "--temperature", type=float, default=1.0, help="below 1 for likelier pictures; default: 1.0")
    add("-p", "--top_p", type=float, help="draw among the likeliest codes of total probability p; default: 1")
    add("--seed", type=int, default=0, help="another seed, other pictures; default: 0")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add("overrides", nargs="*", metavar="key.sub=value", help="set on top of the files")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load the model and its data, draw what is missing, save."""
    if not 0 <= options.known < 1:
        raise ValueError(f"--known {options.known} is outside [0, 1)")
    file = find_checkpoint(options.resume)
    model, config, step = load_model(file, device=pick_device(options.device))
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{file} is a {type(model).__name__}: give a run of stage 2, a transformer")
    dataset = build_dataset(config, options)
    count = min(options.num_samples or len(dataset), len(dataset))
    names = ("seed", "top_k", "top_p", "temperature", "stride", "scale", "known", "split")
    note = {name: str(getattr(options, name)) for name in names} | {"step": str(step)}
    todo = [i for i in range(count) if not (options.outdir / "samples" / f"{i:06d}.png").exists()]
    print(f"{count} items of {options.split} in {options.outdir}, {count - len(todo)} of them there already")
    with tqdm(total=len(todo), unit="picture") as bar:
        for start in range(0, len(todo), options.batch_size):
            numbers = todo[start : start + options.batch_size]
            collate = getattr(dataset.dataset, "collate_fn", None) or default_collate
            for kind, images in draw(model, collate([dataset[i] for i in numbers]), numbers, options).items():
                for i, image in zip(numbers, images, strict=True):
                    save_png(image, options.outdir / kind / f"{i:06d}.png", text=note)
            bar.update(len(numbers))


def build_dataset(config: DictConfig, options: argparse.Namespace) -> Dataset:
    """The split of the data that config and options name, with random numbers of its own for each item."""
    if options.ignore_base_data:
        config.pop("data", None)
    config = OmegaConf.merge(config, load_config(options.base, options.overrides))
    if not OmegaConf.is_dict(config.get("data")):
        raise ValueError("there is no section `data`: name a YAML with -b, or give data='{target: ..., ...}'")
    module = instantiate_from_config(config.data)
    module.setup()
    if options.split not in module.datasets:
        raise ValueError(f"--split {options.split}: the data has {', '.join(module.datasets) or 'no split'}")
    return SeededDataset(module.datasets[options.split], options.seed)


@torch.no_grad()
def draw(
    model: Net2NetTransformer, batch: dict, numbers: list[int], options: argparse.Namespace
) -> dict[str, Tensor]:
    """Pictures (B, C, H, W) of each kind for a batch of items."""
    x, c = (enlarged(t.to(model.device), options.scale, model) for t in model.get_xc(batch))
    quant, z = model.encode_to_z(x)
    _, condition = model.encode_to_c(c)
    h, w = quant.shape[2:]
    if c.ndim == 4 and not model.be_unconditional and condition.shape[1] == h * w:
        condition = condition.view(-1, h, w)
    known = model.permuter(z, reverse=True).view(-1, h, w)
    rows = int(options.known * h)
    codes = sample_window(
        model.transformer, condition, shape=(h, w), window=model.latent_shape(), stride=options.stride,
        known=known if rows else None, start=(rows, 0) if rows else None, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, generator=image_generators(options.seed, numbers),
        n_codes=model.n_codes,
    )
    decode = model.first_stage_model.decode_code
    pictures = {"originals": x, "reconstructions": decode(known), "samples": decode(codes)}
    if c.ndim == 4 and model.cond_stage_key != model.first_stage_key:
        pictures["conditions"] = c if c.shape[1] in (1, 3) else model.cond_stage_model.to_rgb(c)
    return {kind: images.clamp(-1.0, 1.0).cpu() for kind, images in pictures.items()}


def enlarged(x: Tensor, scale: float, model: Net2NetTransformer) -> Tensor:
    """Images (B, C, H, W) at another scale, to the next multiple of f; labels keep their values."""
    if x.ndim != 4 or scale == 1.0:
        return x
    f = model.first_stage_model.factor
    size = [max(1, round(side * scale / f)) * f for side in x.shape[2:]]
    if x.shape[1] in (1, 3):
        return F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0)
    return F.interpolate(x, size, mode="nearest-exact")


if __name__ == "__main__":
    sys.exit(main())
