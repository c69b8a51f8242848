"""Label maps from files: PNGs of ids, or pictures in the colours of a palette. H W pixels, L labels."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from taming.colormap import label_colors
from taming.data.files.errors import file_errors
from taming.data.files.images import read_image
from taming.data.files.label_maps import ID_MODES, read_ids
from taming.images import to_uint8

NEAR = 24  # of 255: how far colours may be from their palette's, each of them, or in the mean
Size = tuple[int, int]  # height, width


def stage_colors(stage: nn.Module) -> np.ndarray:
    """The palette that a condition stage shows its label maps in: uint8 (L, 3)."""
    ids = torch.arange(stage.n_labels, device=getattr(stage, "device", "cpu")).view(1, 1, -1)
    return to_uint8(stage.to_rgb(stage.one_hot(ids)))[0, :, 0].T.cpu().numpy()


def read_labels(path: str | Path, stage: nn.Module, *, exact: bool = True) -> Tensor:
    """Read a label map for a condition stage: its ids, int64 (H, W).

    The file has one channel of ids, or the colours of `taming.colormap.label_colors`, or those that the stage
    itself shows; each pixel then counts as the label of the nearest colour.

    Args:
        path: the file.
        stage: of label maps.
        exact: every pixel must be near a colour of the palette; False takes pictures that are near in the
            mean, as compressed ones are (photographs are not).

    Raises:
        ValueError: no image, an id that is no label, or colours of neither palette.
    """
    path = Path(path)
    with file_errors(path), Image.open(path) as image:
        mode = image.mode
    if mode in ID_MODES:
        ids = torch.from_numpy(read_ids(path).astype(np.int64))
        if (highest := int(ids.max())) < stage.n_labels:
            return ids
        if mode != "P":  # of a palette picture the numbers may be those of colours alone
            raise ValueError(f"{path.name} has the label {highest}, the model's are 0..{stage.n_labels - 1}")
    pixels = read_image(path)
    palettes = label_colors(stage.n_labels), stage_colors(stage)
    tries = [(*nearest_colors(pixels, colors), colors) for colors in palettes]
    ids, distance, colors = min(tries, key=lambda found: float(found[1].mean()))
    off = np.abs(pixels.astype(np.int64) - colors[ids.numpy()]).max(-1)  # (H, W)
    if (off.max() if exact else distance.mean()) > NEAR:
        worst = tuple(pixels.reshape(-1, 3)[off.argmax()].tolist())
        raise ValueError(
            f"{path.name} has the colour {worst}, which is none of the palette of {stage.n_labels} labels: "
            "give a map painted with them, or a PNG of one channel, whose pixels are the labels' numbers"
        )
    return ids


def nearest_colors(pixels: np.ndarray, colors: np.ndarray) -> tuple[Tensor, Tensor]:
    """The number of the nearest of (L, 3) colours for each pixel (H, W, 3), int64, and how far it is."""
    found, where = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    parts, palette = torch.from_numpy(found).float().split(4096), torch.tensor(colors).float()
    nearest = [torch.cdist(part, palette).min(1) for part in parts]
    where = torch.from_numpy(where.reshape(pixels.shape[:2]))
    return torch.cat([n.indices for n in nearest])[where], torch.cat([n.values for n in nearest])[where]


def resized_labels(ids: Tensor, size: Size) -> Tensor:
    """Label ids (H, W) at another size, by the nearest pixel."""
    return F.interpolate(ids[None, None].double(), size, mode="nearest-exact")[0, 0].long()
