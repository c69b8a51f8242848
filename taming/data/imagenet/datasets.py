"""ImageNet with labels, depth, edges, or at two resolutions; RIN, its animals; and the D-RIN examples.

The images and their folders are those of `imagenet_images.py`. Nothing is downloaded. H W pixels of the crop,
h w pixels of the whole picture after resizing.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from taming.data.base import FaultTolerantDataset, merge_config
from taming.data.files.depth import read_depth, rgba_to_depth
from taming.data.files.images import read_image, read_transformed
from taming.data.files.label_maps import check_same_size
from taming.data.files.lists import check_some_exist, read_lines
from taming.data.imagenet.images import (
    ImageNetBase,
    ImageNetTrain,
    ImageNetValidation,
    RINTrain,
    RINValidation,
    Root,
)
from taming.data.imagenet.synsets import RIN, give_synsets_from_indices, str_to_indices
from taming.data.transforms.edges import canny, gray
from taming.data.transforms.joint import JointTransform, Size, check_size
from taming.data.transforms.scale import imscale, shrink
from taming.images import from_uint8

__all__ = [
    "BaseWithDepth", "DRINExamples", "ImageNetBase", "ImageNetEdges", "ImageNetEdgesTrain",
    "ImageNetEdgesValidation", "ImageNetScale", "ImageNetScaleTrain", "ImageNetScaleValidation",
    "ImageNetTrain", "ImageNetTrainWithDepth", "ImageNetValidation", "ImageNetValidationWithDepth",
    "RINTrain", "RINTrainWithDepth", "RINValidation", "RINValidationWithDepth",
    "give_synsets_from_indices", "imscale", "rgba_to_depth", "str_to_indices",
]


# ---- depth


class BaseWithDepth(FaultTolerantDataset):
    """A split with depth maps: items as ImageNetBase, and "depth" (H, W) float32 in [-1, 1].

    The depth of the whole picture spans [-1, 1]; its crop may span less. Depth maps are RGBA PNGs, see
    `depth.py`. A map that is missing, of another size or of another mode makes a bad sample, which is
    skipped.

    Args:
        config: any of size, random_crop and crop_size, which it overrides.
        size: smallest side in pixels after resizing; with `random_crop`, every second picture is mirrored.
        random_crop: crop anywhere, else in the centre.
        crop_size: pixels; `size` by default. Without `size` pictures keep their resolution, but smaller
            ones are enlarged.
        root: folder of the depth maps, which has `train` and `val`; by default data/imagenet_depth.
        data_root: folder of the images, see above.
        max_bad_fraction: share of bad samples that is tolerated.
    """

    DEFAULT_DEPTH_ROOT = "data/imagenet_depth"
    SPLIT = ""  # folder below the root of the depth maps

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool = False,
        crop_size: Size = None,
        root: Root = None,
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction)
        settings = merge_config(self, config, size=size, random_crop=random_crop, crop_size=crop_size)
        self.data_root = data_root
        self.DEFAULT_DEPTH_ROOT = os.fspath(root or self.DEFAULT_DEPTH_ROOT)
        self.base_dset = self.get_base_dset()
        flip = settings["random_crop"] and check_size("size", settings["size"]) is not None
        self.transform = JointTransform(**settings, flip=flip, enlarge=True)
        some = range(0, len(self), max(1, len(self) // 64))
        depths = [self.get_depth_path(self.base_dset.data.labels_of(i)) for i in some]
        check_some_exist(depths, f"{type(self).__name__} with root {self.DEFAULT_DEPTH_ROOT}")

    def __len__(self) -> int:
        return len(self.base_dset)

    def get_base_dset(self) -> ImageNetBase:
        """Return the images without depth."""
        raise NotImplementedError("use ImageNetTrainWithDepth or ImageNetValidationWithDepth")

    def get_depth_path(self, e: Mapping[str, Any]) -> str:
        """Return the depth file of an item, of which "relpath" matters."""
        return os.path.join(self.DEFAULT_DEPTH_ROOT, self.SPLIT, os.path.splitext(e["relpath"])[0] + ".png")

    def preprocess_depth(self, path: str | os.PathLike) -> np.ndarray:
        """Read a whole depth map: (H, W) float32 in [-1, 1]."""
        return read_depth(path)

    def load_sample(self, index: int) -> dict[str, Any]:
        item = self.base_dset.data.labels_of(index)
        return item | _with_depth(item["file_path_"], self.get_depth_path(item), self.transform)


class ImageNetTrainWithDepth(BaseWithDepth):
    """The training images with depth, if given of the classes `sub_indices` only; see BaseWithDepth."""

    SPLIT = "train"
    BASE = ImageNetTrain

    def __init__(
        self,
        random_crop: bool = True,
        sub_indices: str | None = None,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        crop_size: Size = None,
        root: Root = None,
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.sub_indices = sub_indices
        super().__init__(
            config, size, random_crop, crop_size, root, data_root=data_root, max_bad_fraction=max_bad_fraction
        )

    def get_base_dset(self) -> ImageNetBase:
        return self.BASE({"sub_indices": self.sub_indices}, data_root=self.data_root)


class ImageNetValidationWithDepth(ImageNetTrainWithDepth):
    """The validation images with depth; see ImageNetTrainWithDepth."""

    SPLIT = "val"
    BASE = ImageNetValidation

    def __init__(
        self,
        sub_indices: str | None = None,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool = False,
        crop_size: Size = None,
        root: Root = None,
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            random_crop, sub_indices, config, size, crop_size, root, data_root=data_root,
            max_bad_fraction=max_bad_fraction,
        )


class RINTrainWithDepth(ImageNetTrainWithDepth):
    """The animals of ImageNetTrainWithDepth."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool = True,
        crop_size: Size = None,
        *,
        root: Root = None,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            random_crop, RIN, config, size, crop_size, root, data_root=data_root,
            max_bad_fraction=max_bad_fraction,
        )


class RINValidationWithDepth(ImageNetValidationWithDepth):
    """The animals of ImageNetValidationWithDepth."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool = False,
        crop_size: Size = None,
        *,
        root: Root = None,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            RIN, config, size, random_crop, crop_size, root, data_root=data_root,
            max_bad_fraction=max_bad_fraction,
        )


class DRINExamples(FaultTolerantDataset):
    """Examples of RIN with depth: "image" (H, W, 3), "depth" (H, W), both in [-1, 1], and "file_path_".

    Args:
        size: smallest side in pixels, of which a square is cropped in the centre.
        data_csv: text file with one path a line, relative to `data_root`.
        data_root: folder of the images.
        depth_root: folder of the depth maps.
        max_bad_fraction: share of bad samples that is tolerated.
    """

    def __init__(
        self,
        size: Size = 256,
        *,
        data_csv: str | os.PathLike = "data/drin_examples.txt",
        data_root: str | os.PathLike = "data/drin_images",
        depth_root: str | os.PathLike = "data/drin_depth",
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction)
        names = read_lines(data_csv, "image list")
        self.transform = JointTransform(size)
        self.image_paths = [os.path.join(data_root, name) for name in names]
        self.depth_paths = [os.path.join(depth_root, os.path.splitext(name)[0] + ".png") for name in names]
        for paths in (self.image_paths, self.depth_paths):
            check_some_exist(paths, data_csv)

    def __len__(self) -> int:
        return len(self.image_paths)

    def load_sample(self, index: int) -> dict[str, Any]:
        path = self.image_paths[index]
        return {"file_path_": path, **_with_depth(path, self.depth_paths[index], self.transform)}


def _with_depth(image: str, depth: str, transform: JointTransform) -> dict[str, np.ndarray]:
    """Read a picture and its depth map, resized and cropped alike."""
    pixels, params = read_transformed(image, transform)
    plane = read_depth(depth)
    check_same_size("depth", depth, plane, params)
    return {"image": from_uint8(pixels), "depth": params.plane(plane)}


# ---- two resolutions, edges


class ImageNetScale(FaultTolerantDataset):
    """A split with low-resolution pictures: items as ImageNetBase, and with `up_factor` "lr" (H, W, 3).

    "lr" is the picture made `up_factor` times smaller and enlarged again, float32 in [-1, 1].

    Args:
        size: smallest side in pixels after resizing.
        crop_size: pixels; `size` by default. Without `size` pictures keep their resolution, but smaller
            ones are enlarged.
        random_crop: crop anywhere, else in the centre.
        up_factor: see above; a whole number.
        hr_factor: make pictures that many times smaller before all else.
        keep_mode: how "lr" is enlarged: nearest, bilinear or bicubic.
        data_root: folder of the images, see above.
        max_bad_fraction: share of bad samples that is tolerated.
    """

    def __init__(
        self,
        size: Size = None,
        crop_size: Size = None,
        random_crop: bool = False,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction)
        self.data_root = data_root
        self.base = self.get_base()
        self.up_factor, self.hr_factor, self.keep_mode = up_factor, hr_factor, keep_mode
        self.rescaler = JointTransform(size, crop_size, enlarge=True, whole=True)
        self.cropper = JointTransform(None, self.rescaler.crop_size, random_crop)

    def __len__(self) -> int:
        return len(self.base)

    def get_base(self) -> ImageNetBase:
        """Return the images."""
        raise NotImplementedError("use a class of one split, such as ImageNetScaleTrain")

    def load_sample(self, index: int) -> dict[str, Any]:
        item = self.base.data.labels_of(index)
        if (self.hr_factor or 1) > 1:
            pixels = shrink(read_image(item["file_path_"]), self.hr_factor)
            pixels = self.rescaler.get_params(*pixels.shape[:2], item["file_path_"]).image(pixels)
        else:
            pixels, _ = read_transformed(item["file_path_"], self.rescaler)
        params = self.cropper.get_params(*pixels.shape[:2], item["file_path_"])
        item["image"] = from_uint8(params.image(pixels))
        lr = self.low_resolution(pixels)
        return item if lr is None else item | {"lr": params.plane(lr)}

    def low_resolution(self, pixels: np.ndarray) -> np.ndarray | None:
        """Make "lr" (h, w, 3), float32, of a whole resized picture (h, w, 3), uint8; None for no "lr"."""
        if self.up_factor is None:
            return None
        return from_uint8(shrink(pixels, self.up_factor, keepshapes=True, keepmode=self.keep_mode))


class ImageNetScaleTrain(ImageNetScale):
    """The training images, cropped anywhere by default; see ImageNetScale."""

    def __init__(
        self,
        random_crop: bool = True,
        size: Size = None,
        crop_size: Size = None,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, crop_size, random_crop, up_factor, hr_factor, keep_mode, data_root=data_root,
            max_bad_fraction=max_bad_fraction,
        )

    def get_base(self) -> ImageNetBase:
        return ImageNetTrain(data_root=self.data_root)


class ImageNetScaleValidation(ImageNetScale):
    """The validation images; see ImageNetScale."""

    def get_base(self) -> ImageNetBase:
        return ImageNetValidation(data_root=self.data_root)


class ImageNetEdges(ImageNetScale):
    """A split with Canny edges: items as ImageNetBase, and "lr" (H, W, 3) float32, 1 on edges, else 0.

    Edges are found in the whole picture after resizing, before the crop.

    Args:
        up_factor: without effect, as in 2021; the others are those of ImageNetScale.
    """

    def __init__(
        self,
        up_factor: int = 1,
        size: Size = None,
        crop_size: Size = None,
        random_crop: bool = False,
        hr_factor: int | None = None,
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, crop_size, random_crop, None, hr_factor, data_root=data_root,
            max_bad_fraction=max_bad_fraction,
        )

    def low_resolution(self, pixels: np.ndarray) -> np.ndarray:
        edges = canny(gray(from_uint8(pixels)), sigma=2)  # (h, w)
        return np.repeat(edges[..., None].astype(np.float32), 3, axis=-1)


class ImageNetEdgesTrain(ImageNetEdges):
    """The training images, cropped anywhere by default; see ImageNetEdges."""

    def __init__(
        self,
        random_crop: bool = True,
        up_factor: int = 1,
        size: Size = None,
        crop_size: Size = None,
        hr_factor: int | None = None,
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            up_factor, size, crop_size, random_crop, hr_factor, data_root=data_root,
            max_bad_fraction=max_bad_fraction,
        )

    def get_base(self) -> ImageNetBase:
        return ImageNetTrain(data_root=self.data_root)


class ImageNetEdgesValidation(ImageNetEdges):
    """The validation images; see ImageNetEdges."""

    def get_base(self) -> ImageNetBase:
        return ImageNetValidation(data_root=self.data_root)
