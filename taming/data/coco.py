"""COCO: the examples with stuff and things, and the images with captions and segmentations."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from taming.data.files.errors import BadSample, file_errors
from taming.data.files.images import read_transformed
from taming.data.files.label_maps import check_same_size
from taming.data.segmented import SegmentedImages
from taming.data.sflckr import SegmentationBase
from taming.data.transforms.joint import JointParams, JointTransform, Size
from taming.images import from_uint8

N_LABELS = 183  # 0 is unlabeled; 1 to 182 are things and stuff, as in the label list of COCO-Stuff


class Examples(SegmentationBase):
    """The COCO-Stuff examples: files hold 0 to 181 and 255, items 0 (unlabeled) to 182."""

    def __init__(
        self,
        size: Size = 256,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        *,
        data_csv: str | os.PathLike = "data/coco_examples.txt",
        data_root: str | os.PathLike = "data/coco_images",
        segmentation_root: str | os.PathLike = "data/coco_segmentations",
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            data_csv, data_root, segmentation_root, size, random_crop, interpolation, N_LABELS, True,
            segmentation_ids=segmentation_ids, max_bad_fraction=max_bad_fraction,
        )


class CocoBase(SegmentedImages):
    """Images with a caption and a segmentation.

    Items hold "image" (H, W, 3) float32 in [-1, 1]; "caption", a list of one string, drawn from those of the
    image by numpy's global generator; "segmentation", see below; "img_path", "seg_path" and "filename_".
    Training crops anywhere, validation in the centre.

    Args:
        size: smallest side in pixels after resizing.
        dataroot: folder of the images.
        datajson: captions_train2017.json or captions_val2017.json.
        onehot_segmentation: "segmentation" is (H, W, 183) float32, one-hot; needs `use_stuffthing`. Otherwise
            it is the picture of the segmentation, (H, W, 3) float32 in [-1, 1].
        use_stuffthing: things and stuff, else stuff only.
        crop_size: pixels; `size` by default.
        force_no_crop: resize only.
        given_files: names of segmentation files (`000000000139.png`) to which the images are restricted.
        segmentation_root: folder of the segmentations; by default `data/cocostuffthings/val2017` with
            `use_stuffthing`, else `data/coco/annotations/stuff_val2017_pixelmaps`, or those for train2017.
        segmentation_ids: with `onehot_segmentation`, give ids (H, W) uint8 instead of one-hot vectors.
        max_bad_fraction: share of bad samples that is tolerated.

    Raises:
        FileNotFoundError: the captions, or all of the images, do not exist.
        ValueError: the captions are broken, or arguments do not go together.
    """

    image_key, mask_key = "img_path", "seg_path"

    def __init__(
        self,
        size: Size = None,
        dataroot: str | os.PathLike = "",
        datajson: str | os.PathLike = "",
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: Size = None,
        force_no_crop: bool = False,
        given_files: Collection[str] | None = None,
        *,
        segmentation_root: str | os.PathLike | None = None,
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if onehot_segmentation and not use_stuffthing:
            raise ValueError(
                "onehot_segmentation needs use_stuffthing: true, since the maps of stuff alone are pictures"
            )
        if segmentation_ids and not onehot_segmentation:
            raise ValueError("segmentation_ids stands for one-hot vectors: set onehot_segmentation as well")
        self.split = self.get_split()
        self.onehot, self.stuffthing = onehot_segmentation, use_stuffthing
        if segmentation_root is None:
            year = "val2017" if self.split == "validation" else "train2017"
            segmentation_root = (
                f"data/cocostuffthings/{year}" if use_stuffthing
                else f"data/coco/annotations/stuff_{year}_pixelmaps"
            )
        files, self.img_id_to_captions = _read_captions(datajson)
        masks = {number: os.path.splitext(name)[0] + ".png" for number, name in files.items()}
        allowed = set(masks.values() if given_files is None else given_files)
        numbers = [number for number in files if masks[number] in allowed]
        if not numbers:
            raise ValueError(f"given_files names none of the {len(files)} images of {datajson}")
        self._numbers = numbers
        super().__init__(
            {
                "img_path": [os.path.join(dataroot, files[number]) for number in numbers],
                "seg_path": [os.path.join(segmentation_root, masks[number]) for number in numbers],
                "filename_": [os.path.basename(files[number]) for number in numbers],
            },
            JointTransform(
                size, crop_size, self.split != "validation", interpolation="bilinear", whole=force_no_crop
            ),
            n_labels=N_LABELS, shift_segmentation=True, segmentation_ids=segmentation_ids, source=datajson,
            max_bad_fraction=max_bad_fraction,
        )

    def get_split(self) -> str:
        """Return "train" or "validation"."""
        raise NotImplementedError("use CocoImagesAndCaptionsTrain or CocoImagesAndCaptionsValidation")

    def load_sample(self, index: int) -> dict[str, Any]:
        captions = self.img_id_to_captions[self._numbers[index]]
        if not captions:
            raise BadSample(f"image {self.labels['img_path'][index]} has no caption")
        caption = captions[np.random.randint(0, len(captions))]
        if self.onehot:
            return super().load_sample(index) | {"caption": [caption]}
        item = {key: values[index] for key, values in self.labels.items()}
        pixels, params = read_transformed(item["img_path"], self.transform)
        colours = _read_colours(item["seg_path"], params)
        return item | {"image": from_uint8(pixels), "segmentation": from_uint8(colours), "caption": [caption]}


class CocoImagesAndCaptionsTrain(CocoBase):
    """The training images of 2017; see CocoBase."""

    def __init__(
        self,
        size: Size,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: Size = None,
        force_no_crop: bool = False,
        *,
        dataroot: str | os.PathLike = "data/coco/train2017",
        datajson: str | os.PathLike = "data/coco/annotations/captions_train2017.json",
        segmentation_root: str | os.PathLike | None = None,
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, dataroot, datajson, onehot_segmentation, use_stuffthing, crop_size, force_no_crop,
            segmentation_root=segmentation_root, segmentation_ids=segmentation_ids,
            max_bad_fraction=max_bad_fraction,
        )

    def get_split(self) -> str:
        return "train"


class CocoImagesAndCaptionsValidation(CocoBase):
    """The validation images of 2017; see CocoBase."""

    def __init__(
        self,
        size: Size,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: Size = None,
        force_no_crop: bool = False,
        given_files: Collection[str] | None = None,
        *,
        dataroot: str | os.PathLike = "data/coco/val2017",
        datajson: str | os.PathLike = "data/coco/annotations/captions_val2017.json",
        segmentation_root: str | os.PathLike | None = None,
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, dataroot, datajson, onehot_segmentation, use_stuffthing, crop_size, force_no_crop,
            given_files, segmentation_root=segmentation_root, segmentation_ids=segmentation_ids,
            max_bad_fraction=max_bad_fraction,
        )

    def get_split(self) -> str:
        return "validation"


def _read_captions(datajson: str | os.PathLike) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Read an annotation file: file names, and captions, by image id."""
    if not os.path.isfile(datajson):
        raise FileNotFoundError(f"captions {datajson} do not exist (working directory: {os.getcwd()})")
    try:
        data = json.loads(Path(datajson).read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in data["images"]}
        captions: dict[int, list[str]] = {number: [] for number in files}
        for number, name in files.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"image {number} has the file_name {name!r}")
        for annotation in data["annotations"]:
            number, caption = annotation["image_id"], annotation["caption"]
            if number not in captions:
                raise ValueError(
                    f"annotation {annotation.get('id')} is of image {number}, which the file does not list"
                )
            captions[number].append(caption)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{datajson} cannot be used as COCO captions: {reason}; download it again, or correct that entry"
        ) from error
    if not files:
        raise ValueError(f"{datajson} names no images")
    return files, captions


def _read_colours(path: str, params: JointParams) -> np.ndarray:
    """Read a segmentation as a picture (H, W, 3) uint8, moved like its image; its colours are not mixed."""
    with file_errors(path, "segmentation", BadSample), Image.open(path) as image:
        colours = np.asarray(image.convert("RGB"))
    check_same_size("segmentation", path, colours, params)
    return params.mask(colours)
