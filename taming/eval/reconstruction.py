"""How well a tokenizer, or an autoencoder without codes, gives back images: the protocol `reconstruction`.

Images and reconstructions are compared as 8-bit pixels, as they would be saved. The Frechet distance is that
of the reconstructions from the same images, after the same resizing and crop: what the field calls rFID when
the network is FID's. B batch, C channels, H W pixels, N images.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taming.eval.distances import frechet
from taming.eval.parts import Measured, Parts, batches, joined
from taming.eval.results import VERSION, Result, environment
from taming.eval.sources import ImageSource, content_hash, hash_of_set, pixels_of
from taming.eval.statistics import Reference, measure_features, network_about
from taming.eval.subject import Judges, Subject, perceptual_about
from taming.images import from_uint8, image_grid
from taming.inference.distributed import rank_and_world_size
from taming.inference.provenance import save_image
from taming.metrics import CodebookUsage, FeatureStatistics, psnr, ssim
from taming.models.autoencoder import Autoencoder
from taming.models.tokenizer import Tokenizer, as_list

FirstStage = Tokenizer | Autoencoder  # the latter without codes
SHOWN = 4  # images of each kind on the sheet
MEANS = {"psnr": "PSNR", "ssim": "SSIM", "l1": "L1"}


def evaluate_reconstruction(
    subject: Subject, model: FirstStage, source: ImageSource, judges: Judges, *, batch_size: int = 16,
    reference: Reference | None = None,
) -> Result | None:
    """Measure reconstructions of all images of a source; return the result, in the first process alone.

    With a reference, the training set for instance, the distance from it is measured as well. Writes
    SUBJECT.folder/reconstruction.png: the images with the worst, median and best reconstructions.

    Raises:
        ValueError: images that the tokenizer cannot take, none that can be read, features that are not
            finite.
    """
    started, judges = time.time(), judges.to(subject.device)
    parts = Parts(
        subject.folder,
        {
            "protocol": "reconstruction",
            "version": VERSION,
            "images": source.identity(),
            "subject": subject.about,
            "networks": _networks(judges),
        },
        len(source),
    )
    parts.measure(lambda numbers: _measure(subject, model, source, judges, numbers, batch_size), "images")
    if rank_and_world_size()[0] != 0:
        return None
    measured = parts.collect()
    if "number" not in measured:
        raise ValueError(f"none of {len(source)} images can be read: {source.why_bad(0)}")
    result = Result(
        protocol={
            "name": "reconstruction", "version": VERSION, "rounding": "nearest 8-bit", **_networks(judges),
            "images": source.describe() | {
                "count": len(measured["number"]), "size": measured["size"][0].tolist(),
                "sha256": hash_of_set(measured["hash"]),
            },
        },
        metrics={}, subject=subject.about,
    )
    _add_means(result, measured, judges)
    notes: list[str] = []
    if judges.network is not None:
        name, sets = judges.network.distance_name, ("real.", "fake.")
        real, fake = (FeatureStatistics.of(measured[f"{each}features"]) for each in sets)
        result.metrics[f"r{name}"] = frechet(real, fake, notes)
        if reference is not None:
            result.metrics[f"r{name} from the reference"] = frechet(reference.statistics, fake, notes)
            result.protocol["reference"] = reference.about
        if "real.spatial" in measured:
            real, fake = (FeatureStatistics.of(measured[f"{each}spatial"]) for each in sets)
            result.metrics["rsFID"] = frechet(real, fake, notes)
    for key in measured:
        if key.startswith("codes"):
            result.metrics |= _usage(measured[key], key, model)
    result.more = environment(started, subject.device) | {
        "notes": notes, "unreadable": source.why_left_out(measured["bad"]),
    }
    by = "distance" if "distance" in measured else "psnr"
    sheet = _write_sheet(subject, model, source, measured[by] * (1 if by == "distance" else -1), measured)
    result.more["sheet"] = sheet.name
    parts.remove()
    return result


@torch.inference_mode()
def _measure(
    subject: Subject, model: FirstStage, source: ImageSource, judges: Judges, numbers: list[int], size: int
) -> Measured:
    found: list[Measured] = []
    for batch in batches(numbers, size):
        good, pixels = source.read(batch)  # uint8 (B, 3, H, W)
        found.append({"bad": torch.tensor(sorted(set(batch) - set(good)), dtype=torch.int64)})
        if not good:
            continue
        pixels = pixels.to(subject.device)
        again, grids = reconstruct(model, pixels, source.channels)
        x, y = from_uint8(pixels), from_uint8(again)
        measured = {
            "number": torch.tensor(good),
            "hash": content_hash(pixels),
            "psnr": psnr(x, y),
            "ssim": ssim(x, y),
            "l1": (x - y).abs().flatten(1).mean(1),
            "size": torch.tensor(x.shape[2:]).expand(len(x), 2),
        }
        measured |= {f"codes{level}": grid.flatten(1).int() for level, grid in enumerate(grids)}
        if judges.perceptual is not None:
            measured["distance"] = judges.perceptual(x, y)
        if judges.network is not None:
            measured |= measure_features(judges.network, pixels, "real.")
            measured |= measure_features(judges.network, again, "fake.")
        found.append(measured)
    return joined(found)


@torch.inference_mode()
def reconstruct(model: FirstStage, pixels: Tensor, channels: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Return the reconstructions of images, uint8 (B, 3, H, W) both, and the grids of codes, if any.

    Raises:
        ValueError: images of a size that the model cannot take.
    """
    model.check_size(pixels.shape[2], pixels.shape[3])
    x = from_uint8(pixels[:, :channels])
    if not isinstance(model, Tokenizer):
        return pixels_of(model.reconstruct(x)), []
    codes = model.encode_codes(x)
    return pixels_of(model.decode_codes(codes)), as_list(codes)


def _networks(judges: Judges) -> dict[str, Any]:
    network = None if judges.network is None else network_about(judges.network)
    return {"network": network, "perceptual": perceptual_about(judges.perceptual)}


def _add_means(result: Result, measured: Measured, judges: Judges) -> None:
    names = MEANS | ({} if judges.perceptual is None else {"distance": judges.perceptual.name})
    for key, name in names.items():
        values = measured[key].double()
        result.metrics[name] = float(values.mean())
        result.errors[name] = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _usage(codes: Tensor, name: str, model: Any) -> dict[str, float]:
    level = name.removeprefix("codes")
    usage = CodebookUsage(model.codebook_size)
    usage.update(codes)
    suffix = f" of level {level}" if level != "0" else ""
    return {f"{key}{suffix}": float(value) for key, value in usage.compute().items()} | {
        f"codes per image{suffix}": codes.shape[1]
    }


def _write_sheet(
    subject: Subject, model: FirstStage, source: ImageSource, badness: Tensor, measured: Measured
) -> Path:
    """Write pairs of an image and its reconstruction: a row of the worst, of the median and of the best."""
    order, count = badness.argsort(descending=True), len(badness)
    shown = min(SHOWN, count)
    middle = (count - shown) // 2
    chosen = torch.cat((order[:shown], order[middle : middle + shown], order[count - shown :]))
    pairs = []
    for number in measured["number"][chosen].tolist():
        pixels = source.read([number])[1].to(subject.device)
        pairs += [pixels[0], reconstruct(model, pixels, source.channels)[0][0]]
    grid = image_grid(from_uint8(torch.stack(pairs).cpu()), columns=2 * shown)
    return save_image(grid, subject.folder / "reconstruction.png")
