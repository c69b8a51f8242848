"""DeepFashion, people in shop clothes, with the joints of their pose.

H W pixels of the crop, K joints.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from taming.data.base import BadSample, Samples, check_some_exist, read_placed
from taming.data.paired import PairedTransform, Size
from taming.images import from_uint8

# the joint that takes each one's place in a mirrored picture: left for right
COCO_SWAP = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
OPENPOSE_SWAP = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
_SWAPS = {len(swap): swap for swap in (COCO_SWAP, OPENPOSE_SWAP)}
_FOLDERS = {"train": "train", "validation": "test"}  # as pose transfer has parted the set
_SLACK = 1.0  # pixels that a joint may lie outside of its picture: rounding


class DeepFashionBase(Samples):
    """People with joints: items "image" (H, W, 3) float32 in [-1, 1], "keypoints" (K, 3), "file_path_".

    Rows of "keypoints" are x and y as shares of the crop's width and height, and the visibility: 0 unknown
    or outside of the crop, 1 hidden, 2 seen. A joint outside of its own picture makes a bad sample, which
    is skipped.

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        root: folder of the images, or one that holds them in `images`, or in `train` and `test`.
        keypoints: COCO-style JSON with "images" and "annotations" (17 joints; of several people in a
            picture the largest counts), or the table of pose transfer, `name:keypoints_y:keypoints_x` a
            line (18 joints of OpenPose, -1 for unknown). By default `keypoints_train.json` or
            `keypoints_validation.json` in `root`, or else `fasion-resize-annotation-train.csv` or
            `-test.csv`.
        crop_size: pixels; `size` by default.
        random_crop: crop anywhere, else in the centre.
        flip: mirror every second picture, drawn at random; left joints become right ones.
        max_bad_fraction: share of bad samples that is tolerated.

    Raises:
        FileNotFoundError: the joints, or all of the images, do not exist.
        ValueError: the file of joints is broken.
    """

    SPLIT = "train"

    def __init__(
        self,
        size: Size = 256,
        *,
        root: str | os.PathLike = "data/deepfashion",
        keypoints: str | os.PathLike | None = None,
        crop_size: Size = None,
        random_crop: bool = False,
        flip: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction)
        self.transform = PairedTransform(size, crop_size, random_crop, flip=flip)
        file = self._keypoint_file(Path(root), keypoints)
        joints = read_keypoints(file)
        folders = [Path(root, name) for name in ("images", _FOLDERS[self.SPLIT])]
        folder = next((folder for folder in folders if folder.is_dir()), Path(root))
        self.paths = [os.path.join(folder, name) for name in joints]
        self.keypoints = np.stack(list(joints.values()))  # (N, K, 3), in pixels
        check_some_exist(self.paths, file)

    def __len__(self) -> int:
        return len(self.paths)

    def load_sample(self, index: int) -> dict[str, Any]:
        path, joints = self.paths[index], self.keypoints[index]
        pixels, placement = read_placed(path, self.transform)
        height, width = placement.source
        x, y = joints[joints[:, 2] > 0, :2].T
        outside = (x < -_SLACK) | (y < -_SLACK) | (x > width + _SLACK) | (y > height + _SLACK)
        if outside.any():
            raise BadSample(
                f"{path} is {height}x{width} pixels (height x width), but {outside.sum()} of its joints lie "
                f"outside, such as x={x[outside][0]:g}, y={y[outside][0]:g}: are they of another size?"
            )
        moved = placement.points(joints, _SWAPS.get(len(joints)))
        moved[:, :2] /= placement.shape[::-1]
        moved[moved[:, 2] == 0] = 0
        return {"image": from_uint8(pixels), "keypoints": moved, "file_path_": path}

    def _keypoint_file(self, root: Path, keypoints: str | os.PathLike | None) -> Path:
        usual = [
            root / f"keypoints_{self.SPLIT}.json",
            root / f"fasion-resize-annotation-{_FOLDERS[self.SPLIT]}.csv",
        ]
        candidates = usual if keypoints is None else [Path(keypoints)]
        for file in candidates:
            if file.is_file():
                return file
        missing = " and no ".join(map(str, candidates))
        raise FileNotFoundError(f"the joints of {type(self).__name__} are not here: there is no {missing}")


class DeepFashionTrain(DeepFashionBase):
    """The training images, cropped anywhere and mirrored by default; see DeepFashionBase."""

    def __init__(
        self,
        size: Size = 256,
        *,
        root: str | os.PathLike = "data/deepfashion",
        keypoints: str | os.PathLike | None = None,
        crop_size: Size = None,
        random_crop: bool = True,
        flip: bool = True,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, root=root, keypoints=keypoints, crop_size=crop_size, random_crop=random_crop, flip=flip,
            max_bad_fraction=max_bad_fraction,
        )


class DeepFashionValidation(DeepFashionBase):
    """The test images, cropped in the centre by default; see DeepFashionBase."""

    SPLIT = "validation"


def read_keypoints(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read joints (K, 3), rows of x, y in pixels and visibility 0 to 2, by image name; see DeepFashionBase.

    Raises:
        ValueError: the file is broken, has no joints, or not always as many.
    """
    try:
        joints = _from_json(file) if os.fspath(file).endswith(".json") else _from_table(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of joints: {type(error).__name__}: {error}") from error
    counts = {len(points) for points in joints.values()}
    if len(counts) != 1 or 0 in counts:
        found = ", ".join(map(str, sorted(counts))) or "no picture"
        raise ValueError(f"{file} must have the same number of joints in every picture, found {found}")
    return joints


def _from_json(file: str | os.PathLike) -> dict[str, np.ndarray]:
    data = json.loads(Path(file).read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in data["images"]}
    largest: dict[str, tuple[float, np.ndarray]] = {}
    for annotation in data["annotations"]:
        points = np.array(annotation["keypoints"], dtype=np.float32).reshape(-1, 3)
        seen = points[points[:, 2] > 0, :2]
        extent = float(np.ptp(seen, axis=0).sum()) if len(seen) else 0.0
        name = names[annotation["image_id"]]
        if name not in largest or extent > largest[name][0]:
            largest[name] = extent, points
    return {name: points for name, (_, points) in largest.items()}


def _from_table(file: str | os.PathLike) -> dict[str, np.ndarray]:
    with open(file, encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter=":"))
    joints = {}
    for row in rows:
        y, x = (np.array(json.loads(row[key]), dtype=np.float32) for key in ("keypoints_y", "keypoints_x"))
        known = (x >= 0) & (y >= 0)
        joints[row["name"].strip()] = np.stack([x, y, 2.0 * known], axis=1)
    return joints
