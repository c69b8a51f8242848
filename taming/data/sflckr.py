"""S-FLCKR, and any other list of images with label maps in a folder of the same structure."""

import os
from typing import Any

from taming.data.files.lists import read_lines
from taming.data.segmented import SegmentedImages, with_extension
from taming.data.transforms.joint import Size

Path = str | os.PathLike


class SegmentationBase(SegmentedImages):
    """The images of a list, with label maps: items "image", "segmentation" (see SegmentedImages), and paths.

    The paths are "relative_file_path_", "file_path_" and "segmentation_path_". The label map of `a/b.jpg` is
    `a/b.png` below `segmentation_root`.

    Args:
        data_csv: text file with one path a line, relative to `data_root`.
        data_root: folder of the images.
        segmentation_root: folder of the label maps.
        size, random_crop, interpolation: see FaultTolerantDataset.
        n_labels: number of labels; 182 as in COCO-Stuff.
        shift_segmentation: add 1 to the ids of the files; 255, unlabeled, becomes 0.
        options: see SegmentedImages and FaultTolerantDataset.

    Raises:
        FileNotFoundError: the list does not exist, or none of the files that it names.
    """

    def __init__(
        self,
        data_csv: Path,
        data_root: Path,
        segmentation_root: Path,
        size: Size = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        n_labels: int = 182,
        shift_segmentation: bool = False,
        **options: Any,
    ) -> None:
        self.data_csv, self.data_root, self.segmentation_root = data_csv, data_root, segmentation_root
        names = self.image_paths = read_lines(data_csv, "image list")
        super().__init__(
            {
                "relative_file_path_": names,
                "file_path_": [os.path.join(data_root, name) for name in names],
                "segmentation_path_": [
                    os.path.join(segmentation_root, name) for name in with_extension(names)
                ],
            },
            size, random_crop, interpolation=interpolation,
            n_labels=n_labels, shift_segmentation=shift_segmentation, source=data_csv, **options,
        )


class Examples(SegmentationBase):
    """The S-FLCKR examples, 182 labels of COCO-Stuff; see SegmentationBase.

    By default they are in `data/sflckr_examples.txt`, `data/sflckr_images` and `data/sflckr_segmentations`.
    """

    NAME = "sflckr"
    N_LABELS = 182
    SHIFT_SEGMENTATION = False

    def __init__(
        self,
        size: Size = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        *,
        data_csv: Path | None = None,
        data_root: Path | None = None,
        segmentation_root: Path | None = None,
        **options: Any,
    ) -> None:
        prefix = f"data/{self.NAME}_"
        labels = {"n_labels": self.N_LABELS, "shift_segmentation": self.SHIFT_SEGMENTATION}
        super().__init__(
            data_csv or f"{prefix}examples.txt", data_root or f"{prefix}images",
            segmentation_root or f"{prefix}segmentations", size, random_crop, interpolation,
            **labels | options,
        )
