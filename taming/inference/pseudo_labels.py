"""Depth and label maps of a folder of images, by a model of the `transformers` library, as PNG files.

H W pixels, L labels. Maps have the relative paths of their images below the output folder.
Existing maps are kept, so that a command that was stopped can be started again.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from taming.data.files.depth import depth_to_rgba
from taming.data.files.errors import BadImage
from taming.data.files.images import read_image
from taming.data.files.lists import find_images
from taming.util import ProgressBar, atomic_write, read_text

Estimate = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) -> a map (H, W)
Model = tuple[Any, Any]  # what prepares images, and the network

LABELS = "labels.txt"
MAX_CONFIG = 1 << 24  # bytes of a model's config.json
MAX_VALUES = 1 << 26  # logits that are resized at a time, 256 MB as float32


def extract(
    names: Mapping[str, Path], estimate: Estimate, encode: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[str, str]]:
    """Write a map of every image; yield ("made", ""), ("kept", "") or ("bad", reason) for each.

    Args:
        names: where the map of each image goes, see map_names.
        estimate: computes a map.
        encode: turns it into the pixels of a PNG.
    """
    for path, target in names.items():
        if target.is_file():
            yield "kept", ""
            continue
        try:
            pixels = read_image(path)
        except BadImage as error:
            yield "bad", str(error)
            continue
        values = estimate(pixels)
        assert values.shape == pixels.shape[:2], (values.shape, pixels.shape)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as partial:
            Image.fromarray(encode(values)).save(partial, format="PNG")
        yield "made", ""


def extract_all(names: Mapping[str, Path], estimate: Estimate, encode: Callable) -> dict[str, int]:
    """Run `extract` with a progress bar, print bad images to stderr, and count the outcomes."""
    count = {"made": 0, "kept": 0, "bad": 0}
    with ProgressBar(total=len(names), unit="image") as bar:
        for outcome, reason in extract(names, estimate, encode):
            count[outcome] += 1
            bar.update()
            if reason:
                bar.write(f"skipped: {reason}", file=sys.stderr)
    return count


def map_names(folder: str | os.PathLike, outdir: str | os.PathLike) -> dict[str, Path]:
    """Return the path of the map of each image below a folder, by the path of the image.

    Raises:
        FileNotFoundError, ValueError: no such folder, no images, two whose maps would have one name, or maps
            that would lie among the images.
    """
    if Path(outdir).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{outdir} is in {folder}, where maps would be taken for images: choose another")
    names: dict[str, Path] = {}
    taken: dict[Path, str] = {}
    for path in find_images(folder):
        target = Path(outdir) / Path(path).relative_to(folder).with_suffix(".png")
        if target in taken:
            raise ValueError(f"{taken[target]} and {path} would have the same map {target}: rename one")
        taken[target], names[path] = path, target
    return names


# ---- depth


def depth_pixels(depth: np.ndarray) -> np.ndarray:
    """Turn depths (H, W) into the pixels of a PNG, (H, W, 4) uint8: see `taming.data.files.depth`."""
    return depth_to_rgba(depth.astype(np.float32))


def depth_estimate(model: Model, device: torch.device) -> Estimate:
    """Return a function that estimates depths in the model's own unit and direction.

    MiDaS and DPT give large values for what is near.
    """
    processor, network = model

    @torch.inference_mode()
    def estimate(pixels: np.ndarray) -> np.ndarray:
        depth = _run(processor, network, pixels, device).predicted_depth  # (1, h, w) or (1, 1, h, w)
        depth = depth.float().reshape(1, 1, *depth.shape[-2:])
        depth = F.interpolate(depth, size=pixels.shape[:2], mode="bicubic", align_corners=False)
        return depth[0, 0].cpu().numpy()

    return estimate


# ---- segmentation


def label_pixels(ids: np.ndarray) -> np.ndarray:
    """Turn ids (H, W) into the pixels of a PNG: 8-bit gray, or 16-bit where an id needs it.

    Raises:
        ValueError: an id that is negative or above 65535.
    """
    if ids.min() < 0 or ids.max() > 65535:
        raise ValueError(f"label ids from {ids.min()} to {ids.max()} do not fit a PNG (0 to 65535)")
    return ids.astype(np.uint8 if ids.max() < 256 else np.uint16)


def label_estimate(model: Model, device: torch.device) -> Estimate:
    """Return a function that finds the most likely label of each pixel, the model's own ids."""
    processor, network = model

    @torch.inference_mode()
    def estimate(pixels: np.ndarray) -> np.ndarray:
        output = _run(processor, network, pixels, device)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):  # MaskFormer and similar models: masks with labels
            ids = processor.post_process_semantic_segmentation(output, target_sizes=[pixels.shape[:2]])[0]
            return ids.cpu().numpy()
        return most_likely(logits[0].float(), *pixels.shape[:2]).cpu().numpy()

    return estimate


def most_likely(logits: Tensor, height: int, width: int) -> Tensor:
    """Return the label (H, W) with the largest of the logits (L, h, w), resized to H W; the first of equals.

    Few labels are resized at a time: all 150 of ADE20K are 7 GB for an image of 12 million pixels.
    """
    at_once = max(1, MAX_VALUES // (height * width))
    best = logits.new_full((height, width), -math.inf)
    labels = torch.zeros((height, width), dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), at_once):
        part = logits[None, first:first + at_once]
        part = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0]
        values, found = part.max(0)  # (H, W)
        larger = values > best
        best, labels = torch.where(larger, values, best), torch.where(larger, found + first, labels)
    return labels


def label_names(network: Any) -> list[str]:
    """Return the names of the labels in the order of their ids.

    Raises:
        ValueError: an id does not fit a PNG.
    """
    names = {int(number): str(name) for number, name in network.config.id2label.items()}
    if max(names, default=0) > 65535:
        raise ValueError(f"the model has the label id {max(names)}, which does not fit a PNG (0 to 65535)")
    return [names.get(number, str(number)) for number in range(max(names, default=-1) + 1)]


# ---- models


def load_depth_model(name: str, device: torch.device, *, offline: bool = False) -> Model:
    """Load a depth model from a folder or the hub; see `_load`."""
    return _load(name, ("AutoModelForDepthEstimation",), device, offline)


def load_label_model(name: str, device: torch.device, *, offline: bool = False) -> Model:
    """Load a model of semantic segmentation from a folder or the hub; see `_load`."""
    return _load(
        name, ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"), device, offline
    )


def _load(name: str, kinds: tuple[str, ...], device: torch.device, offline: bool) -> Model:
    """Load a model and its image processor; code that comes with a model is not run.

    Weights must be safetensors: other files could hold code.

    Raises:
        FileNotFoundError: neither a folder nor (unless `offline`) a name on the hub.
        ValueError: the package is missing, or the model is of another kind or damaged.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            'this needs the package transformers: pip install "taming[data]", or pip install transformers'
        ) from error
    local = offline or os.path.isdir(name)
    if os.path.isdir(name):
        _check_kind(Path(name))
    options = {"local_files_only": local, "trust_remote_code": False}
    reason: Exception | None = None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **options)
    except OSError as error:
        raise FileNotFoundError(_not_found(name, local, error)) from error
    for kind in kinds:
        try:
            network = getattr(transformers, kind).from_pretrained(name, use_safetensors=True, **options)
            return processor, network.eval().requires_grad_(False).to(device)
        except SafetensorError as error:
            raise ValueError(
                f"the weights (*.safetensors) of {name} are cut off or damaged: fetch them again ({error})"
            ) from error
        except ValueError as error:  # of another kind
            reason = reason or error
        except OSError as error:
            raise FileNotFoundError(_not_found(name, local, error)) from error
    first = str(reason).strip().splitlines()[0]
    wanted = kinds[0].removeprefix("AutoModelFor")
    raise ValueError(f"{name} is not a model for {wanted}: {first}") from reason


def _check_kind(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist: {folder} is not a folder of a transformers model")
    try:
        json.loads(read_text(config, "model configuration", max_bytes=MAX_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not JSON: {error}") from error


def _not_found(name: str, local: bool, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    where = "among local models" if local else "locally or on the hub"
    return f"the model {name} was not found {where}: {first}"


def _run(processor: Any, network: Any, pixels: np.ndarray, device: torch.device) -> Any:
    """Prepare one image (H, W, 3) uint8 as the model wants it, and run the model."""
    inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
    return network(**{key: value.to(device) for key, value in inputs.items()})
