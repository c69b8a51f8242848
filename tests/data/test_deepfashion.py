"""DeepFashion: joints from both kinds of files move with their image, and bad ones are skipped."""

import json

import numpy as np
import pytest
from PIL import Image

from taming.data import deepfashion
from taming.data.pose import JOINTS, MIRRORED, PoseTokens, limb_map
from taming.data.preview import describe_item
from taming.images import to_uint8

HEIGHT, WIDTH = 60, 40


def draw(path, joints: np.ndarray):
    """Save a black image with a 5 x 5 spot at each known joint; joint k has the green 10 + 13 k."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for k, (x, y, seen) in enumerate(joints):
        if seen:
            pixels[int(y) - 2:int(y) + 3, int(x) - 2:int(x) + 3] = (255, 10 + 13 * k, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pose(count: int) -> np.ndarray:
    """Joints on a grid; number 3 is unknown."""
    joints = np.array([(4.5 + 8 * (k % 4), 4.5 + 10 * (k // 4), 2) for k in range(count)], np.float32)
    joints[3] = 0
    return joints


@pytest.fixture
def coco(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    small = pose(17) * np.array([0.1, 0.1, 1])
    annotations = [{"image_id": i, "keypoints": pose(17).ravel().tolist()} for i in range(3)]
    annotations.insert(0, {"image_id": 0, "keypoints": small.ravel().tolist()})  # someone far away
    for name in names:
        draw(tmp_path / "images" / name, pose(17))
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    (tmp_path / "keypoints_train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def spots_agree(item, swap=None):
    """Check each joint that is seen well inside the crop: the spot of its number, or of its counterpart."""
    height, width, _ = item["image"].shape
    checked = 0
    for k, (x, y, seen) in enumerate(item["keypoints"]):
        column, row = int(x), int(y)
        if seen and 1 <= column < width - 1 and 1 <= row < height - 1:
            green = round(float((item["image"][row, column, 1] + 1) * 127.5))
            source = k if swap is None else swap[k]
            checked += 1
            if green != 10 + 13 * source:
                return False
    return checked > 3


def test_joints_stay_on_their_spots(coco):
    data = deepfashion.DeepFashionTrain(WIDTH, root=coco)  # no resize: a crop, and every second one mirrored
    plain = mirrored = 0
    for _ in range(20):
        item = data[0]
        assert item["image"].shape == (WIDTH, WIDTH, 3) and item["keypoints"].shape == (17, 3)
        assert item["keypoints"].dtype == np.float32
        as_is, turned = spots_agree(item), spots_agree(item, MIRRORED)
        assert as_is != turned
        plain, mirrored = plain + as_is, mirrored + turned
        unknown = item["keypoints"][4 if turned else 3]
        assert unknown.tolist() == [0, 0, 0]
        inside = item["keypoints"][item["keypoints"][:, 2] > 0, :2]
        assert inside.min() >= 0 and 1 < inside.max() <= WIDTH
    assert plain > 3 and mirrored > 3


def test_poses_are_drawn_and_told_in_tokens(coco):
    data = deepfashion.DeepFashionTrain(48, root=coco, crop_size=40, pose_bins=20)
    for _ in range(5):
        item = data[0]
        assert np.array_equal(to_uint8(item["pose"]), limb_map(item["keypoints"], (40, 40)))
        assert item["pose"].min() == -1 and item["pose"].max() > 0.5
        tokens = item["pose_tokens"]
        assert tokens.tolist() == PoseTokens(20).build(item["keypoints"], (40, 40)).tolist()
        assert 0 <= tokens.min() and tokens.max() == 20  # the joint that is not known
    pictures, _ = describe_item(item, data)
    lit = np.asarray(pictures["pose_tokens"]).max(-1) > 0
    assert pictures["pose_tokens"].size == (40, 40) and 0.05 < lit.mean() < 0.9
    assert {"image", "keypoints", "pose"} <= set(pictures)


def test_the_table_of_pose_transfer(tmp_path):
    """Its joints are OpenPose's: the neck is dropped, and the others come in the order of COCO."""
    joints = pose(18)
    draw(tmp_path / "test" / "x.jpg.png", joints)
    known = joints[:, 2] > 0
    x, y = np.where(known, joints[:, 0], -1).tolist(), np.where(known, joints[:, 1], -1).tolist()
    table = tmp_path / "fasion-resize-annotation-test.csv"
    table.write_text(f"name:keypoints_y:keypoints_x\nx.jpg.png: {y}: {x}\n")
    data = deepfashion.DeepFashionValidation([HEIGHT, WIDTH], root=tmp_path)
    item = data[0]
    assert len(data) == 1 and item["keypoints"].shape == (17, 3)
    openpose = [  # from its paper, as the drawing of it counts
        "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow",
        "left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
        "right_eye", "left_eye", "right_ear", "left_ear",
    ]
    for name, joint in zip(JOINTS, item["keypoints"], strict=True):
        assert np.allclose(joint, joints[openpose.index(name)]), name


def test_a_joint_outside_of_the_frame_makes_a_bad_sample(coco):
    file = coco / "keypoints_train.json"
    found = json.loads(file.read_text())
    found["annotations"][2]["keypoints"][:2] = [400, 10]
    file.write_text(json.dumps(found))
    data = deepfashion.DeepFashionTrain(32, root=coco)
    with pytest.raises(ValueError, match=r"b\.png is 60x40 .* 1 of its joints lie outside, such as x=400"):
        data.load_sample(1)
    assert data[1]["file_path_"].endswith("c.png")


@pytest.mark.parametrize("text, message", [
    ("{", "is not a file of joints: JSONDecodeError"),
    ('{"images": []}', "is not a file of joints: KeyError: 'annotations'"),
    ('{"images": [], "annotations": []}', "must have the 17 joints of COCO, .* found no image"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "keypoints": [1, 2]}]}',
     "is not a file of joints: cannot reshape"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "keypoints": [1, 2, 2]}]}',
     "17 joints of COCO, or the 18 of OpenPose, of every person, found 1"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 7, "keypoints": []}]}',
     "annotation 0 is of the image 7, which 'images' does not list"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}',
     "annotation 0 has no keypoints; repair it, or create it again"),
])
def test_a_broken_index_ends_the_run(coco, text, message):
    (coco / "keypoints_train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        deepfashion.DeepFashionTrain(root=coco)


def test_missing_files(coco):
    with pytest.raises(FileNotFoundError, match=r"no .*keypoints_validation\.json and no .*-test\.csv"):
        deepfashion.DeepFashionValidation(root=coco)
    for path in (coco / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of 3 files"):
        deepfashion.DeepFashionTrain(root=coco)
