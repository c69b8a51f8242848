"""Poses: limbs lie where the joints are, tokens and joints are each other's inverse, bad input is named."""

import numpy as np
import pytest
import torch

from taming.data.pose import JOINTS, LIMBS, MIRRORED, PoseTokens, limb_map
from taming.data.transforms.joint import JointParams

SIZE = (64, 48)  # height, width


def person(seed: int = 0, size=SIZE) -> np.ndarray:
    """Seventeen joints anywhere in the frame."""
    rng = np.random.default_rng(seed)
    places = rng.random((17, 2)) * np.array(size[::-1])
    return np.concatenate([places, np.full((17, 1), 2)], 1).astype(np.float32)


def alone(*joints: tuple[int, float, float]) -> np.ndarray:
    """A person of whom only some joints are given, as (number, x, y)."""
    points = np.zeros((17, 3), np.float32)
    for number, x, y in joints:
        points[number] = x, y, 2
    return points


def test_the_joints_are_those_of_coco():
    assert len(JOINTS) == 17 and JOINTS[0] == "nose" and JOINTS[16] == "right_ankle"
    assert {joint for first, second, _ in LIMBS for joint in (first, second)} == set(range(17))
    assert len({colour for *_, colour in LIMBS}) == len(LIMBS)
    for joint, other in enumerate(MIRRORED):
        assert MIRRORED[other] == joint
        swapped = JOINTS[joint].replace("left", "x").replace("right", "left").replace("x", "right")
        assert JOINTS[other] == swapped


def test_a_limb_runs_from_joint_to_joint_in_its_colour():
    drawn = limb_map(alone((13, 10, 10), (15, 10, 50)), SIZE)
    assert drawn.shape == (64, 48, 3) and drawn.dtype == np.uint8
    colour = next(colour for first, second, colour in LIMBS if (first, second) == (13, 15))
    assert drawn[30].sum(0) == pytest.approx(1.5 * np.array(colour), rel=0.15)  # 1.5 pixels thick
    assert drawn[30, 9:11].sum() > 0.8 * drawn[30].sum()
    painted = np.argwhere(drawn.any(-1))
    assert painted.min(0).tolist() == pytest.approx([9, 9], abs=1)
    assert painted.max(0).tolist() == pytest.approx([50, 10], abs=1)


def test_a_limb_needs_both_joints_and_a_lone_joint_is_a_dot():
    lone = limb_map(alone((13, 10, 10)), SIZE)
    assert 0 < lone.any(-1).sum() <= 9 and not lone[20:].any()
    hidden = alone((13, 10, 10), (15, 10, 50))
    hidden[15, 2] = 1  # hidden by something, but known
    assert limb_map(hidden, SIZE)[30, 10].any()
    hidden[15, 2] = 0
    assert not limb_map(hidden, SIZE)[20:].any()


def test_nobody_is_black():
    assert not limb_map(np.zeros((17, 3)), SIZE).any()
    assert not limb_map(np.zeros((0, 17, 3)), SIZE).any()


def test_a_map_of_a_mirrored_pose_is_its_mirror_image_but_for_the_colours_of_the_sides():
    points = person()
    place = JointParams(SIZE, SIZE, (0, 0), SIZE, mirrored=True)
    mirrored = limb_map(place.points(points, MIRRORED), SIZE)
    drawn = limb_map(points, SIZE)[:, ::-1]
    assert ((mirrored.max(-1) > 128) != (drawn.max(-1) > 128)).mean() < 0.05
    assert ((drawn.max(-1) > 128) != (drawn[:, ::-1].max(-1) > 128)).mean() > 0.2


def test_joints_outside_the_frame_count_as_not_given():
    points = alone((13, 10, 10), (15, 10, 70))
    within = alone((13, 10, 10))
    assert np.array_equal(limb_map(points, SIZE), limb_map(within, SIZE))
    assert torch.equal(PoseTokens().build(points, SIZE), PoseTokens().build(within, SIZE))
    assert points[15, 2] == 2  # the caller's array is left alone


def test_all_shapes_of_coco_are_understood():
    points = person()
    assert np.array_equal(limb_map(points.ravel().tolist(), SIZE), limb_map(points[None], SIZE))


@pytest.mark.parametrize(("no_bins", "max_people"), [(64, 1), (7, 1), (1, 1), (32, 3)])
def test_tokens_and_joints_are_inverse(no_bins, max_people):
    poses = PoseTokens(no_bins, max_people)
    people = np.stack([person(seed) for seed in range(max_people)])
    people[:, 4] = 0
    tokens = poses.build(people, SIZE)
    assert tokens.shape == (poses.embedding_dim,) == (34 * max_people,) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() == poses.none == no_bins < poses.no_tokens
    back = poses.inverse_build(tokens, SIZE)
    assert back.shape == (max_people, 17, 3) and not back[:, 4].any()
    assert torch.equal(poses.build(back, SIZE), tokens)
    half = np.array(SIZE[::-1]) / no_bins / 2 + 1e-4
    away = np.abs(back[:, None, :, :2] - people[None, :, :, :2]).max(2)  # (found, given, 2)
    assert (away <= half).all(-1).any(1).all()


def test_the_place_of_a_token_is_that_of_its_joint():
    tokens = PoseTokens(8).build(alone((0, 47.9, 0), (16, 48, 64)), SIZE).view(17, 2)
    assert tokens[0].tolist() == [7, 0] and tokens[16].tolist() == [7, 7]
    assert (tokens[1:16] == 8).all()


def test_of_many_people_the_largest_are_taken_and_missing_ones_are_filled_up():
    small, large = person(1) * [0.1, 0.1, 1], person(2)
    assert torch.equal(PoseTokens().build(np.stack([small, large]), SIZE), PoseTokens().build(large, SIZE))
    two = PoseTokens(max_people=2).build(np.stack([np.zeros((17, 3)), large]), SIZE)
    assert torch.equal(two[:34], PoseTokens().build(large, SIZE)) and (two[34:] == 64).all()


def test_what_a_transformer_may_draw_can_be_plotted():
    poses = PoseTokens(1024)
    tokens = torch.randint(0, 2000, (2, 34), generator=torch.Generator().manual_seed(0))
    images = poses.plot_batch(tokens, (48, 64))
    assert images.shape == (2, 3, 64, 48) and images.dtype == torch.float32
    joined = poses.build(person(), SIZE)
    drawn = poses.plot(joined, (48, 64)).permute(1, 2, 0).numpy()
    assert np.abs((drawn + 1) * 127.5 - limb_map(person(), SIZE)).mean() < 2  # half a bin away


@pytest.mark.parametrize(("points", "message"), [
    (np.zeros((18, 3)), r"\(18, 3\).*COCO's 17 joints"),
    (np.zeros((2, 2, 17, 3)), r"must be \(17, 3\)"),
    (np.full((17, 3), np.nan), None),
    (np.array([[np.inf, 1, 2]] + [[0, 0, 0]] * 16), "not finite: give it the visibility 0"),
])
def test_bad_joints_are_named(points, message):
    if message is None:  # of joints that are not given the place does not matter
        assert not limb_map(points, SIZE).any()
        return
    with pytest.raises(ValueError, match=message):
        limb_map(points, SIZE)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="no_bins=0"):
        PoseTokens(0)
    with pytest.raises(ValueError, match="34 tokens here"):
        PoseTokens().inverse_build(torch.zeros(33, dtype=torch.long), SIZE)
