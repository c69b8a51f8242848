"""DeepFashion, people in shop clothes, with the joints of their pose.

H W pixels of the crop, K = 17 joints of COCO (see `taming.data.pose`).
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from taming.data.base import FaultTolerantDataset
from taming.data.files.errors import BadSample
from taming.data.files.images import read_transformed
from taming.data.files.lists import check_some_exist
from taming.data.pose import JOINTS, MIRRORED, PoseTokens, limb_map
from taming.data.transforms.joint import Size
from taming.images import from_uint8
from taming.util import read_text

OPENPOSE = 18  # joints; the second is the neck
# where OpenPose has each joint of COCO
_COCO_OF_OPENPOSE = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
_FOLDERS = {"train": "train", "validation": "test"}  # the split of pose transfer
_SLACK = 1.0  # pixels that a joint may lie outside its image: rounding


class DeepFashionBase(FaultTolerantDataset):
    """People with their poses.

    Items hold
        image: (H, W, 3) float32 in [-1, 1].
        keypoints: (K, 3) float32: x and y in pixels of the crop, and the visibility: 0 unknown or outside the
            crop, 1 hidden, 2 visible.
        pose: (H, W, 3) float32 in [-1, 1], the limbs, as `taming.data.pose.limb_map` draws them.
        pose_tokens: (2 K,) int64, the positions of the joints, of `PoseTokens`.
        file_path_: str.

    A joint outside its own image makes a bad sample.

    Args:
        size: see FaultTolerantDataset.
        root: folder of the images, or one that holds them in `images`, or in `train` and `test`.
        keypoints: COCO-style JSON with "images" and "annotations" (of several people in an image the largest
            counts), or the table of pose transfer, `name:keypoints_y:keypoints_x` a line (-1 for unknown).
            The 18 joints of OpenPose become COCO's 17, without the neck. By default `keypoints_train.json` or
            `keypoints_validation.json` in `root`, or else `fasion-resize-annotation-train.csv` or
            `-test.csv`.
        pose_bins: positions along a side that the tokens distinguish.
        options: see FaultTolerantDataset; in mirrored images left joints become right ones.

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
        pose_bins: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        file = self._keypoint_file(Path(root), keypoints)
        joints = read_keypoints(file)
        folders = [Path(root, name) for name in ("images", _FOLDERS[self.SPLIT])]
        folder = next((folder for folder in folders if folder.is_dir()), Path(root))
        self.paths = [os.path.join(folder, name) for name in joints]
        self.keypoints = np.stack(list(joints.values()))  # (N, K, 3), in pixels
        self.conditional_builders = {"pose_tokens": PoseTokens(pose_bins)}
        check_some_exist(self.paths, file)

    def __len__(self) -> int:
        return len(self.paths)

    def load_sample(self, index: int) -> dict[str, Any]:
        path, joints = self.paths[index], self.keypoints[index]
        pixels, params = read_transformed(path, self.transform)
        height, width = params.source
        x, y = joints[joints[:, 2] > 0, :2].T
        outside = (x < -_SLACK) | (y < -_SLACK) | (x > width + _SLACK) | (y > height + _SLACK)
        if outside.any():
            raise BadSample(
                f"{path} is {height}x{width} pixels (height x width), but {outside.sum()} of its joints lie "
                f"outside, such as x={x[outside][0]:g}, y={y[outside][0]:g}: are they of another size?"
            )
        moved = params.points(joints, MIRRORED)
        moved[moved[:, 2] == 0] = 0
        return self.image_item(pixels, params) | {
            "keypoints": moved,
            "pose": from_uint8(limb_map(moved, params.shape)),
            "pose_tokens": self.conditional_builders["pose_tokens"].build(moved, params.shape),
            "file_path_": path,
        }

    def plot_conditionals(self, key: str, tokens: Tensor, figure_size: tuple[int, int]) -> Tensor:
        """Draw "pose_tokens" (B, 2 K) as limb maps (B, 3, height, width) in [-1, 1]."""
        return self.conditional_builders[key].plot_batch(tokens, figure_size)

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
    """The training images, cropped at random and mirrored by default; see DeepFashionBase."""

    RANDOM_CROP = FLIP = True


class DeepFashionValidation(DeepFashionBase):
    """The test images, cropped in the centre by default; see DeepFashionBase."""

    SPLIT = "validation"


def read_keypoints(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read joints (K, 3), rows of x, y in pixels and visibility 0 to 2, by image name; see DeepFashionBase.

    Raises:
        ValueError: the file is broken, or has joints that are neither COCO's nor OpenPose's.
    """
    try:
        joints = _from_json(file) if os.fspath(file).endswith(".json") else _from_table(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        message = f"{file} is not a file of joints: {reason}; repair it, or create it again"
        raise ValueError(message) from error
    counts = {len(points) for points in joints.values()}
    if counts == {OPENPOSE}:
        return {name: points[list(_COCO_OF_OPENPOSE)] for name, points in joints.items()}
    if counts != {len(JOINTS)}:
        found = ", ".join(map(str, sorted(counts))) or "no image"
        raise ValueError(
            f"{file} must have the {len(JOINTS)} joints of COCO, or the {OPENPOSE} of OpenPose, of every "
            f"person, found {found}"
        )
    return joints


def _from_json(file: str | os.PathLike) -> dict[str, np.ndarray]:
    data = json.loads(read_text(file, "joints", max_bytes=1 << 31))
    names = {image["id"]: image["file_name"] for image in data["images"]}
    largest: dict[str, tuple[float, np.ndarray]] = {}
    for number, annotation in enumerate(data["annotations"]):
        if missing := {"image_id", "keypoints"} - set(annotation):
            raise ValueError(f"annotation {number} has no {' and no '.join(sorted(missing))}")
        if annotation["image_id"] not in names:
            raise ValueError(
                f"annotation {number} is of the image {annotation['image_id']}, which 'images' does not list"
            )
        points = np.array(annotation["keypoints"], dtype=np.float32).reshape(-1, 3)
        seen = points[points[:, 2] > 0, :2]
        extent = float(np.ptp(seen, axis=0).sum()) if len(seen) else 0.0
        name = names[annotation["image_id"]]
        if name not in largest or extent > largest[name][0]:
            largest[name] = extent, points
    return {name: points for name, (_, points) in largest.items()}


def _from_table(file: str | os.PathLike) -> dict[str, np.ndarray]:
    lines = read_text(file, "joints", max_bytes=1 << 31).splitlines(keepends=True)
    rows = list(csv.DictReader(lines, delimiter=":"))
    joints = {}
    for row in rows:
        y, x = (np.array(json.loads(row[key]), dtype=np.float32) for key in ("keypoints_y", "keypoints_x"))
        known = (x >= 0) & (y >= 0)
        joints[row["name"].strip()] = np.stack([x, y, 2.0 * known], axis=1)
    return joints
