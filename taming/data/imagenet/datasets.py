"""ImageNet with depth, edges, or at two resolutions; RIN, its animals; and the D-RIN examples.

The images and their folders are those of `images.py`. Nothing is downloaded. H W pixels of the crop, h w
pixels of the whole image after resizing.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from taming.data.base import FaultTolerantDataset, merge_config
from taming.data.files.depth import read_depth
from taming.data.files.images import read_image, read_transformed
from taming.data.files.label_maps import check_same_size
from taming.data.files.lists import check_some_exist, read_lines
from taming.data.imagenet.images import ImageNetBase, ImageNetTrain, ImageNetValidation, Root
from taming.data.imagenet.synsets import RIN
from taming.data.segmented import with_extension
from taming.data.transforms.edges import canny, gray
from taming.data.transforms.joint import JointTransform, Size, check_size
from taming.data.transforms.scale import shrink
from taming.images import from_uint8


def get_preprocessor(
    size: Size = None,
    random_crop: bool = False,
    additional_targets: Mapping[str, str] | None = None,
    crop_size: Size = None,
) -> Callable[..., dict[str, np.ndarray]]:
    """Return a transform of an image and further arrays, all given by name; the function of 2021.

    With `size` the smallest side is resized and a square cropped, at random and mirrored with `random_crop`;
    with `crop_size` alone the image is cropped; without either nothing changes. `additional_targets` need
    not be declared.
    """
    size = check_size("size", size)
    return JointTransform(size, None if size else crop_size, random_crop, flip=random_crop and bool(size))


# ---- depth


class ImagesWithDepth(FaultTolerantDataset):
    """Images with depth maps: items hold "image" (H, W, 3) and "depth" (H, W), float32 in [-1, 1].

    The depth of the whole image spans [-1, 1]; its crop may span less. Depth maps are RGBA PNGs, see
    `taming.data.files.depth`. A map that is missing, of another size or of another mode makes a bad sample.
    """

    def load(self, image_path: str, depth_path: str) -> dict[str, Any]:
        """Read an image and its depth map into "image" and "depth", and "coord" if it is asked for."""
        pixels, params = read_transformed(image_path, self.transform)
        plane = read_depth(depth_path)
        check_same_size("depth", depth_path, plane, params)
        return self.image_item(pixels, params) | {"depth": params.plane(plane)}

    def preprocess_depth(self, path: str | os.PathLike) -> np.ndarray:
        """Read a whole depth map: (H, W) float32 in [-1, 1]."""
        return read_depth(path)


class BaseWithDepth(ImagesWithDepth):
    """A split with depth maps: items as ImageNetBase, and "depth"; see ImagesWithDepth.

    Args:
        config: any of size, random_crop and crop_size, which it overrides.
        size, random_crop, crop_size: see FaultTolerantDataset; with `size` and `random_crop`, images are
            mirrored at random. Images smaller than a `crop_size` without `size` are enlarged.
        root: folder of the depth maps, which has `train` and `val`; by default data/imagenet_depth.
        data_root: folder of the images, see `images.py`.
        options: see FaultTolerantDataset.
    """

    DEFAULT_DEPTH_ROOT = "data/imagenet_depth"
    SPLIT = ""  # folder below the root of the depth maps
    BASE: type[ImageNetBase]
    sub_indices: str | None = None  # take the images of these classes only

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool | None = None,
        crop_size: Size = None,
        root: Root = None,
        *,
        data_root: Root = None,
        **options: Any,
    ) -> None:
        super().__init__(
            **merge_config(self, config, size=size, random_crop=random_crop, crop_size=crop_size), **options
        )
        self.config, self.data_root = config, data_root
        self.transform.enlarge = True
        if options.get("flip") is None:
            self.transform.flip = self.random_crop and self.transform.size is not None
        self.DEFAULT_DEPTH_ROOT = os.fspath(root or self.DEFAULT_DEPTH_ROOT)
        self.base_dset = self.get_base_dset()
        some = range(0, len(self), max(1, len(self) // 64))
        depths = [self.get_depth_path(self.base_dset.data.labels_of(i)) for i in some]
        check_some_exist(depths, f"{type(self).__name__} with root {self.DEFAULT_DEPTH_ROOT}")

    def __len__(self) -> int:
        return len(self.base_dset)

    def get_base_dset(self) -> ImageNetBase:
        """Return the images without depth."""
        return self.BASE({"sub_indices": self.sub_indices}, data_root=self.data_root)

    def get_depth_path(self, e: Mapping[str, Any]) -> str:
        """Return the depth file of an item, by its "relpath"."""
        return os.path.join(self.DEFAULT_DEPTH_ROOT, self.SPLIT, *with_extension([e["relpath"]]))

    def load_sample(self, index: int) -> dict[str, Any]:
        item = self.base_dset.data.labels_of(index)
        return item | self.load(item["file_path_"], self.get_depth_path(item))


class ImageNetTrainWithDepth(BaseWithDepth):
    """The training images with depth, cropped at random by default; see BaseWithDepth.

    Args:
        random_crop: see FaultTolerantDataset.
        sub_indices: take the images of these classes only.
        options: see BaseWithDepth.
    """

    SPLIT, BASE = "train", ImageNetTrain
    RANDOM_CROP = True

    def __init__(self, random_crop: bool = True, sub_indices: str | None = None, **options: Any) -> None:
        self.sub_indices = sub_indices
        super().__init__(random_crop=random_crop, **options)


class ImageNetValidationWithDepth(BaseWithDepth):
    """The validation images with depth; see ImageNetTrainWithDepth."""

    SPLIT, BASE = "val", ImageNetValidation

    def __init__(self, sub_indices: str | None = None, **options: Any) -> None:
        self.sub_indices = sub_indices
        super().__init__(**options)


class RINTrainWithDepth(BaseWithDepth):
    """The training images of animals with depth, cropped at random by default; see BaseWithDepth."""

    SPLIT, BASE, sub_indices = "train", ImageNetTrain, RIN
    RANDOM_CROP = True


class RINValidationWithDepth(BaseWithDepth):
    """The validation images of animals with depth; see BaseWithDepth."""

    SPLIT, BASE, sub_indices = "val", ImageNetValidation, RIN


class DRINExamples(ImagesWithDepth):
    """Examples of RIN with depth: items as ImagesWithDepth, and "file_path_".

    Args:
        size: see FaultTolerantDataset.
        data_csv: text file with one path a line, relative to `data_root`.
        data_root: folder of the images.
        depth_root: folder of the depth maps.
        options: see FaultTolerantDataset.
    """

    def __init__(
        self,
        size: Size = 256,
        *,
        data_csv: str | os.PathLike = "data/drin_examples.txt",
        data_root: str | os.PathLike = "data/drin_images",
        depth_root: str | os.PathLike = "data/drin_depth",
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        names = read_lines(data_csv, "image list")
        self.image_paths = [os.path.join(data_root, name) for name in names]
        self.depth_paths = [os.path.join(depth_root, name) for name in with_extension(names)]
        for paths in (self.image_paths, self.depth_paths):
            check_some_exist(paths, data_csv)

    def __len__(self) -> int:
        return len(self.image_paths)

    def load_sample(self, index: int) -> dict[str, Any]:
        path = self.image_paths[index]
        return {"file_path_": path, **self.load(path, self.depth_paths[index])}

    def preprocess_image(self, image_path: str | os.PathLike) -> np.ndarray:
        """Read, resize and crop one image: (H, W, 3) float32 in [-1, 1]."""
        return from_uint8(read_transformed(image_path, self.transform)[0])


# ---- two resolutions, edges


class ImageNetScale(FaultTolerantDataset):
    """A split with low-resolution images: items as ImageNetBase, and with `up_factor` "lr" (H, W, 3).

    "lr" is the image made `up_factor` times smaller and enlarged again, float32 in [-1, 1].

    Args:
        size, crop_size, random_crop: see FaultTolerantDataset. Images smaller than a `crop_size` without
            `size` are enlarged.
        up_factor: see above; an integer.
        hr_factor: make images that many times smaller before anything else.
        keep_mode: how "lr" is enlarged: nearest, bilinear or bicubic.
        data_root: folder of the images, see `images.py`.
        options: see FaultTolerantDataset.
    """

    BASE: type[ImageNetBase]

    def __init__(
        self,
        size: Size = None,
        crop_size: Size = None,
        random_crop: bool | None = None,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
        *,
        data_root: Root = None,
        **options: Any,
    ) -> None:
        super().__init__(size, random_crop, crop_size=crop_size, **options)
        self.data_root = data_root
        self.base = self.get_base()
        self.up_factor, self.hr_factor, self.keep_mode = up_factor, hr_factor, keep_mode
        self.cropper = self.transform  # of the whole resized image
        self.rescaler = JointTransform(
            size, crop_size, interpolation=self.transform.interpolation, enlarge=True, whole=True
        )
        self.cropper.size = None

    def __len__(self) -> int:
        return len(self.base)

    def get_base(self) -> ImageNetBase:
        """Return the images."""
        return self.BASE(data_root=self.data_root)

    def load_sample(self, index: int) -> dict[str, Any]:
        item = self.base.data.labels_of(index)
        path = item["file_path_"]
        if self.hr_factor and self.hr_factor > 1:
            pixels = shrink(read_image(path), self.hr_factor)
            pixels = self.rescaler.get_params(pixels.shape[0], pixels.shape[1], path).image(pixels)
        else:
            pixels, _ = read_transformed(path, self.rescaler)
        params = self.cropper.get_params(pixels.shape[0], pixels.shape[1], path)
        item |= self.image_item(params.image(pixels), params)
        lr = self.low_resolution(pixels)
        return item if lr is None else item | {"lr": params.plane(lr)}

    def low_resolution(self, pixels: np.ndarray) -> np.ndarray | None:
        """Return "lr" (h, w, 3), float32, of a whole resized image (h, w, 3), uint8; None for no "lr"."""
        if self.up_factor is None:
            return None
        return from_uint8(shrink(pixels, self.up_factor, keepshapes=True, keepmode=self.keep_mode))


class ImageNetScaleTrain(ImageNetScale):
    """The training images, cropped at random by default; see ImageNetScale."""

    BASE = ImageNetTrain

    def __init__(self, random_crop: bool = True, **options: Any) -> None:
        super().__init__(random_crop=random_crop, **options)


class ImageNetScaleValidation(ImageNetScale):
    """The validation images; see ImageNetScale."""

    BASE = ImageNetValidation


class ImageNetEdges(ImageNetScale):
    """A split with Canny edges: items as ImageNetBase, and "lr" (H, W, 3) float32, 1 on edges, else 0.

    Edges are found in the whole image after resizing, before the crop.

    Args:
        up_factor: has no effect, as in 2021.
        options: see ImageNetScale.
    """

    def __init__(self, up_factor: int = 1, **options: Any) -> None:
        super().__init__(**options)

    def low_resolution(self, pixels: np.ndarray) -> np.ndarray:
        edges = canny(gray(from_uint8(pixels)), sigma=2)  # (h, w)
        return np.repeat(edges[..., None].astype(np.float32), 3, axis=-1)


class ImageNetEdgesTrain(ImageNetScaleTrain, ImageNetEdges):
    """The training images, cropped at random by default; see ImageNetEdges."""


class ImageNetEdgesValidation(ImageNetEdges):
    """The validation images; see ImageNetEdges."""

    BASE = ImageNetValidation
