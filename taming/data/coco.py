"""COCO: the examples with stuff and things, and the images with captions and segmentations."""

import json
import os
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from taming.data import sflckr
from taming.data.files.errors import BadSample, file_errors
from taming.data.files.label_maps import check_same_size
from taming.data.segmented import SegmentedImages, with_extension
from taming.data.transforms.joint import JointParams, Size
from taming.images import from_uint8
from taming.util import read_text

N_LABELS = 183  # 0 is unlabeled; 1 to 182 are things and stuff, as in the label list of COCO-Stuff


class Examples(sflckr.Examples):
    """The COCO-Stuff examples, by default in `data/coco_*`; see SegmentationBase.

    Files hold 0 to 181 and 255, items 0 (unlabeled) to 182.
    """

    NAME = "coco"
    N_LABELS = N_LABELS
    SHIFT_SEGMENTATION = True

    def __init__(self, size: Size = 256, *args: Any, **options: Any) -> None:
        super().__init__(size, *args, **options)


class CocoBase(SegmentedImages):
    """Images with a caption and a segmentation.

    Items hold "image" (H, W, 3) float32 in [-1, 1]; "caption", a list of one string, chosen from those of the
    image by numpy's global generator; "segmentation", see below; "img_path", "seg_path" and "filename_".
    Training crops at random, validation in the centre, by default.

    Args:
        size: see FaultTolerantDataset.
        dataroot: folder of the images.
        datajson: captions_train2017.json or captions_val2017.json.
        onehot_segmentation: "segmentation" is (H, W, 183) float32, one-hot; needs `use_stuffthing`. Otherwise
            it is the segmentation in colors, (H, W, 3) float32 in [-1, 1].
        use_stuffthing: things and stuff, else stuff only.
        crop_size: see FaultTolerantDataset.
        force_no_crop: resize only.
        given_files: names of segmentation files (`000000000139.png`) to which the images are restricted.
        segmentation_root: folder of the segmentations; by default `data/cocostuffthings/val2017` with
            `use_stuffthing`, else `data/coco/annotations/stuff_val2017_pixelmaps`, or those for train2017.
        segmentation_ids: with `onehot_segmentation`, return ids (H, W) uint8 instead of one-hot vectors.
        options: see FaultTolerantDataset.

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
        **options: Any,
    ) -> None:
        if onehot_segmentation and not use_stuffthing:
            raise ValueError(
                "onehot_segmentation needs use_stuffthing: true, since the maps of stuff alone are in colors"
            )
        if segmentation_ids and not onehot_segmentation:
            raise ValueError("segmentation_ids replaces one-hot vectors: set onehot_segmentation as well")
        self.split = self.get_split()
        self.onehot, self.stuffthing = onehot_segmentation, use_stuffthing
        year = "val2017" if self.split == "validation" else "train2017"
        usual = "data/cocostuffthings/{}" if use_stuffthing else "data/coco/annotations/stuff_{}_pixelmaps"
        self.segmentation_prefix = os.fspath(segmentation_root or usual.format(year))
        files, self.img_id_to_captions = _read_captions(datajson)
        masks = dict(zip(files, with_extension(list(files.values())), strict=True))
        self.img_id_to_filepath = {number: os.path.join(dataroot, name) for number, name in files.items()}
        self.img_id_to_segmentation_filepath = {
            number: os.path.join(self.segmentation_prefix, name) for number, name in masks.items()
        }
        allowed = set(masks.values() if given_files is None else given_files)
        numbers = self._numbers = [number for number in files if masks[number] in allowed]
        if not numbers:
            raise ValueError(f"given_files names none of the {len(files)} images of {datajson}")
        super().__init__(
            {
                "img_path": [self.img_id_to_filepath[number] for number in numbers],
                "seg_path": [self.img_id_to_segmentation_filepath[number] for number in numbers],
                "filename_": [os.path.basename(files[number]) for number in numbers],
            },
            size, crop_size=crop_size, n_labels=N_LABELS, shift_segmentation=True,
            segmentation_ids=segmentation_ids, source=datajson, **{"interpolation": "bilinear", **options},
        )
        self.transform.whole = force_no_crop

    def get_split(self) -> str:
        """Return "train" or "validation"."""
        raise NotImplementedError("use CocoImagesAndCaptionsTrain or CocoImagesAndCaptionsValidation")

    def load_sample(self, index: int) -> dict[str, Any]:
        captions = self.img_id_to_captions[self._numbers[index]]
        if not captions:
            raise BadSample(f"image {self.labels['img_path'][index]} has no caption")
        caption = captions[np.random.randint(0, len(captions))]
        return super().load_sample(index) | {"caption": [caption]}

    def read_segmentation(self, path: str, params: JointParams) -> np.ndarray:
        if self.onehot:
            return super().read_segmentation(path, params)
        with file_errors(path, "segmentation", BadSample), Image.open(path) as image:
            colors = np.asarray(image.convert("RGB"))
        check_same_size("segmentation", path, colors, params)
        return from_uint8(params.mask(colors))  # (H, W, 3); nearest neighbour: colors are not mixed


class _CocoImagesAndCaptions(CocoBase):
    """A split of 2017 in its usual folders, unless others are given."""

    YEAR = ""

    def __init__(
        self, size: Size, onehot_segmentation: bool = False, use_stuffthing: bool = False, *args: Any,
        dataroot: str | os.PathLike | None = None, datajson: str | os.PathLike | None = None, **options: Any,
    ) -> None:
        dataroot = dataroot or f"data/coco/{self.YEAR}"
        datajson = datajson or f"data/coco/annotations/captions_{self.YEAR}.json"
        super().__init__(size, dataroot, datajson, onehot_segmentation, use_stuffthing, *args, **options)


class CocoImagesAndCaptionsTrain(_CocoImagesAndCaptions):
    """The training images of 2017; see CocoBase."""

    YEAR = "train2017"
    RANDOM_CROP = True

    def get_split(self) -> str:
        return "train"


class CocoImagesAndCaptionsValidation(_CocoImagesAndCaptions):
    """The validation images of 2017; see CocoBase."""

    YEAR = "val2017"

    def get_split(self) -> str:
        return "validation"


def _read_captions(datajson: str | os.PathLike) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Read an annotation file: file names, and captions, by image id."""
    if not os.path.isfile(datajson):
        raise FileNotFoundError(f"captions {datajson} do not exist (working directory: {os.getcwd()})")
    try:
        data = json.loads(read_text(datajson, "captions", max_bytes=1 << 31))
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
