"""Label maps and masks that users give: files of ids, of the colours of a palette, or of black and white.

H W pixels, L labels, K colours.
"""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.colormap import label_colors
from taming.data.files.errors import file_errors
from taming.data.files.images import open_image, to_rgb, upright
from taming.data.files.label_maps import ID_MODES
from taming.images import to_uint8

NEAR = 24  # of 255: how far colours may be from those of the palette, each of them, or in the mean
MAX_PIXELS = 1 << 25  # of a label map or a mask; finding its colours takes 32 bytes per pixel
OPAQUE = 128  # alpha from which a pixel of a mask counts as painted
Size = tuple[int, int]  # height, width


class LabelStage(Protocol):
    """What is needed of a condition stage of label maps."""

    n_labels: int

    def one_hot(self, ids: Tensor) -> Tensor: ...
    def to_rgb(self, c: Tensor) -> Tensor: ...


def stage_colors(stage: LabelStage) -> np.ndarray:
    """Return the palette in which a condition stage shows its label maps: uint8 (L, 3)."""
    ids = torch.arange(stage.n_labels, device=getattr(stage, "device", "cpu")).view(1, 1, -1)
    return to_uint8(stage.to_rgb(stage.one_hot(ids)))[0, :, 0].T.cpu().numpy()


# ---- label maps


def read_labels(path: str | os.PathLike, stage: LabelStage, *, exact: bool = True) -> Tensor:
    """Read a label map for a condition stage: its ids, int64 (H, W).

    The file has one channel of ids, or the colours of `taming.colormap.label_colors`, or those that the stage
    itself shows; each pixel then counts as the label of the nearest colour. A file of indexed colours is read
    by its colours if these are the model's, and by its indices if none of them is.

    Args:
        path: the file.
        stage: of label maps.
        exact: every pixel must be near a colour of the palette; False allows images that are near in the
            mean, as compressed ones are (photographs are not). Indexed colours must be equal to the palette's
            in both cases.

    Raises:
        ValueError: no image, an id that is not a label, colours of neither palette, transparent pixels, or a
            file that can be read in two ways.
    """
    path = Path(path)
    with file_errors(path, "label map"), open_image(path) as image:
        mode, values = upright(image, MAX_PIXELS).mode, np.asarray(image)
        rgba = np.asarray(image.convert("RGBA"))
    if mode == "LA" and (values[..., 1] == 255).all():
        mode, values = "L", values[..., 0]
    indices = torch.from_numpy(values.astype(np.int64)) if mode in ID_MODES else None
    if indices is not None and mode != "P":
        if (highest := int(indices.max())) >= stage.n_labels:
            raise ValueError(f"{path.name} has the label {highest}, the model's are 0..{stage.n_labels - 1}")
        return indices
    colors, where, counts = _colors_of(rgba)
    palettes = label_colors(stage.n_labels), stage_colors(stage)
    found = [_nearest(colors[:, :3], palette) for palette in palettes]
    if indices is not None and int(indices.max()) < stage.n_labels:
        if _are_indices(colors, found, path.name):
            return indices
    if len(visible := np.unique(colors[:, 3])) > 1 or visible[0] < 255:
        raise ValueError(f"{path.name} has transparent pixels, which have no label: fill them with colours")
    means = [float((distance * counts).sum() / counts.sum()) for _, distance in found]
    if max(means) == 0 and (found[0][0] != found[1][0]).any():
        raise ValueError(
            f"{path.name} can be read in two ways: its colours are those of taming.colormap.label_colors and "
            "those that the model shows, for different labels. Give a PNG of one channel, whose pixels are "
            "the labels' numbers"
        )
    best = int(np.argmin(means))
    labels = found[best][0]
    off = np.abs(colors[:, :3].astype(np.int64) - palettes[best][labels]).max(-1)  # (K,)
    if (off.max() if exact else means[best]) > NEAR:
        worst = tuple(colors[off.argmax(), :3].tolist())
        raise ValueError(
            f"{path.name} has the colour {worst}, which is none of the palette of {stage.n_labels} labels: "
            "give a map painted with them, or a PNG of one channel, whose pixels are the labels' numbers"
        )
    return torch.from_numpy(labels)[where]


def _are_indices(colors: np.ndarray, found: list[tuple[np.ndarray, np.ndarray]], name: str) -> bool:
    """Say whether the indices of a file are its labels; if not, its colours are the model's.

    Grays do not count: a palette that nobody chose consists of them.

    Args:
        colors: the colours in use, (K, 4) RGBA.
        found: the nearest label and its distance, for each colour, in each palette.

    Raises:
        ValueError: only some of the colours are the model's, or grays alone.
    """
    opaque, gray = colors[:, 3] == 255, np.ptp(colors[:, :3], axis=1) == 0
    equal = [opaque & (distance == 0) for _, distance in found]
    if any(one.all() for one in equal) and not gray.all():
        return False
    most = max(int((one & ~gray).sum()) for one in equal)
    if any(one.all() for one in equal) or most * 4 >= max(1, len(colors)):  # fewer are equal by chance
        raise ValueError(
            f"{name} can be read in two ways: by its indices, which are all labels, or by its colours, "
            f"{most or len(colors)} of {len(colors)} are colours of the model. Give a PNG of one channel, "
            "whose pixels are the labels' numbers, or an RGB image in the model's colours"
        )
    return True


def _colors_of(rgba: np.ndarray) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Return the colours of (H, W, C) pixels: (K, C), the number of each pixel's (H, W), and counts (K,)."""
    height, width, channels = rgba.shape
    full = np.zeros((height, width, 4), np.uint8)
    full[..., :channels] = rgba
    packed, where, counts = np.unique(full.view(np.uint32)[..., 0], return_inverse=True, return_counts=True)
    colors = packed[:, None].view(np.uint8)[:, :channels]
    return colors, torch.from_numpy(where.reshape(height, width)), counts


def _nearest(colors: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the nearest of (L, 3) colours for each of (K, 3), int64, and its distance."""
    parts = torch.from_numpy(colors.astype(np.float32)).split(4096)
    table = torch.from_numpy(palette.astype(np.float32))
    exactly = "donot_use_mm_for_euclid_dist"  # equal colours have the distance 0
    nearest = [torch.cdist(part, table, compute_mode=exactly).min(1) for part in parts]
    return torch.cat([n.indices for n in nearest]).numpy(), torch.cat([n.values for n in nearest]).numpy()


def nearest_colors(pixels: np.ndarray, palette: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the number of the nearest of (L, 3) colours, int64 (H, W), and its distance, by pixel."""
    colors, where, _ = _colors_of(pixels)
    labels, distance = _nearest(colors, palette)
    return torch.from_numpy(labels)[where], torch.from_numpy(distance)[where]


def resized_labels(ids: Tensor, size: Size) -> Tensor:
    """Return label ids (H, W) at another size, by the nearest pixel."""
    return F.interpolate(ids[None, None].double(), size, mode="nearest-exact")[0, 0].long()


# ---- masks


def read_mask(path: str | os.PathLike) -> Tensor:
    """Read a mask: bool (H, W), True where it is white. A transparent pixel is black, whatever its colour is.

    Raises:
        ValueError: no image; nothing is white; or the file can be read in two ways, such as an image in which
            what is to be generated was erased.
    """
    with file_errors(path, "mask"), open_image(path) as image:
        transparent = upright(image, MAX_PIXELS).has_transparency_data
        rgba = np.asarray(image.convert("RGBA")) if transparent else None
        colors = rgba[..., :3] if rgba is not None else to_rgb(image)
    alpha = rgba[..., 3] if rgba is not None else np.full(colors.shape[:2], 255, np.uint8)
    painted, low, high = alpha >= OPAQUE, colors.min(-1), colors.max(-1)
    two_ways = f"mask {path} can be read in two ways: what is white is to be generated"
    remedy = "Give a black image, with white where images are to be generated"
    # neither black nor white beside transparent pixels; else coloured
    odd = painted & ((low < 192) & (high > 63) if transparent else high - low > 63)
    if odd.sum() > 0.05 * painted.sum():
        other = "what is transparent" if transparent else "all that is painted"
        raise ValueError(f"{two_ways}, or {other}, and it has other colours than black and white. {remedy}")
    white = colors.mean(-1) * alpha > 127.5 * 255
    if not white.any():
        if painted.any() and not painted.all():
            raise ValueError(f"{two_ways}, and nothing is white, or what is black. {remedy}")
        values = f"values are {low.min()} to {high.max()} of 255" if painted.any() else "it is transparent"
        raise ValueError(f"mask {path} leaves nothing to generate, {values}. {remedy}")
    return torch.from_numpy(white)
