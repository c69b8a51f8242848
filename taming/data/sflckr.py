"""S-FLCKR, and any other list of images with label maps in a folder of the same structure."""

import os

from taming.data.files.lists import read_lines
from taming.data.segmented import SegmentedImages
from taming.data.transforms.joint import JointTransform, Size


class SegmentationBase(SegmentedImages):
    """The images of a list, with label maps: items "image", "segmentation" (see SegmentedImages), and paths.

    The paths are "relative_file_path_", "file_path_" and "segmentation_path_". The label map of `a/b.jpg` is
    `a/b.png` below `segmentation_root`.

    Args:
        data_csv: text file with one path a line, relative to `data_root`.
        data_root: folder of the images.
        segmentation_root: folder of the label maps.
        size: smallest side in pixels after resizing, of which a square is cropped; None for pictures as they
            are.
        random_crop: crop anywhere, else in the centre.
        interpolation: of the images: nearest, bilinear, bicubic, area or lanczos.
        n_labels: number of labels; 182 as in COCO-Stuff.
        shift_segmentation: add 1 to the ids of the files; 255, unlabeled, becomes 0.
        segmentation_ids: give ids (H, W) instead of one-hot vectors.
        max_bad_fraction: share of bad samples that is tolerated.

    Raises:
        FileNotFoundError: the list does not exist, or none of the files that it names.
    """

    def __init__(
        self,
        data_csv: str | os.PathLike,
        data_root: str | os.PathLike,
        segmentation_root: str | os.PathLike,
        size: Size = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        n_labels: int = 182,
        shift_segmentation: bool = False,
        *,
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        names = read_lines(data_csv, "image list")
        masks = [os.path.splitext(name)[0] + ".png" for name in names]
        super().__init__(
            {
                "relative_file_path_": names,
                "file_path_": [os.path.join(data_root, name) for name in names],
                "segmentation_path_": [os.path.join(segmentation_root, name) for name in masks],
            },
            JointTransform(size, None, random_crop, interpolation=interpolation),
            n_labels=n_labels, shift_segmentation=shift_segmentation, segmentation_ids=segmentation_ids,
            source=data_csv, max_bad_fraction=max_bad_fraction,
        )


class Examples(SegmentationBase):
    """The S-FLCKR examples, 182 labels of COCO-Stuff."""

    def __init__(
        self,
        size: Size = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        *,
        data_csv: str | os.PathLike = "data/sflckr_examples.txt",
        data_root: str | os.PathLike = "data/sflckr_images",
        segmentation_root: str | os.PathLike = "data/sflckr_segmentations",
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            data_csv, data_root, segmentation_root, size, random_crop, interpolation,
            segmentation_ids=segmentation_ids, max_bad_fraction=max_bad_fraction,
        )
