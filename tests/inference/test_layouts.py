"""Which part of a layout a window reads, and that the transformer reads just that."""

import numpy as np
import pytest
import torch

from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.helper_types import Annotation
from taming.data.pose import PoseTokens
from taming.inference.layouts import crop_layout
from taming.modules.transformer.mingpt import GPT
from taming.sampling import image_generators, sample_window

LEFT_HALF, RIGHT_HALF = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)


def annotation(category, *bbox):
    return Annotation(area=0.1, image_id="0", bbox=bbox, category_no=category, category_id=str(category))


@pytest.mark.parametrize("encode_crop", [False, True])
def test_boxes_are_moved_and_cut_or_the_crop_is(encode_crop):
    builder = ObjectsBoundingBoxConditionalBuilder(10, 4, 121 + 10 * 11, encode_crop, False, False)
    layout = builder.build([annotation(3, 0.0, 0.0, 0.2, 0.4), annotation(7, 0.4, 0.2, 0.4, 0.4)])
    objects, crop = builder.inverse_build(crop_layout(builder, layout, RIGHT_HALF))
    step = 1 / (builder.no_sections - 1)
    assert [which for which, _ in objects] == [7]  # the other one lies outside
    expected = (0.4, 0.2, 0.4, 0.4) if encode_crop else (0.0, 0.2, 0.6, 0.4)
    assert objects[0][1] == pytest.approx(expected, abs=step)
    assert crop == (pytest.approx(RIGHT_HALF, abs=step) if encode_crop else None)
    assert len(builder.inverse_build(crop_layout(builder, layout, LEFT_HALF))[0]) == 2


def test_the_window_lies_in_the_crop_that_the_layout_has():
    builder = ObjectsBoundingBoxConditionalBuilder(10, 4, 41 * 41, True, False, False)
    layout = builder.build([annotation(3, 0.0, 0.0, 1.0, 1.0)], (0.2, 0.0, 0.8, 0.8))
    crop = builder.inverse_build(crop_layout(builder, layout, RIGHT_HALF))[1]
    assert crop == pytest.approx((0.6, 0.0, 0.4, 0.8), abs=0.03)


def test_points_and_joints_are_moved():
    points = ObjectsCenterPointsConditionalBuilder(10, 4, 41 * 41, False, False, False)
    layout = points.build([annotation(3, 0.1, 0.1, 0.2, 0.2), annotation(7, 0.7, 0.4, 0.1, 0.2)])
    objects, _ = points.inverse_build(crop_layout(points, layout, RIGHT_HALF))
    assert [which for which, _ in objects] == [7]
    assert objects[0][1] == pytest.approx((0.5, 0.5), abs=0.04)

    poses = PoseTokens(64)
    joints = np.zeros((17, 3), np.float32)
    joints[0], joints[5] = (25, 50, 2), (75, 50, 2)  # of 100 x 100 pixels
    seen = poses.inverse_build(crop_layout(poses, poses.build(joints, (100, 100)), RIGHT_HALF), (100, 100))[0]
    assert seen[0, 2] == 0 and seen[5, 2] > 0
    assert seen[5, :2] == pytest.approx((50, 50), abs=3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_same_layout_everywhere_is_plain_tokens(guidance):
    gpt = GPT(vocab_size=20, block_size=40, n_layer=1, n_head=2, n_embd=16).eval()
    for parameter in gpt.parameters():
        parameter.data.mul_(10.0)
    layouts = torch.randint(10, (2, 5))
    null = torch.full_like(layouts, 19)
    how = {"window": 4, "guidance": guidance, "shape": (5, 7), "stride": 2}
    how["null_condition"] = null
    ours = sample_window(gpt, lambda origin: layouts, generator=image_generators(0, [0, 1]), **how)
    plain = sample_window(gpt, layouts, generator=image_generators(0, [0, 1]), **how)
    assert torch.equal(ours, plain)


def test_each_window_is_asked_for():
    gpt = GPT(vocab_size=20, block_size=40, n_layer=1, n_head=2, n_embd=16).eval()
    asked = []

    def layouts_at(origin):
        asked.append(origin)
        return torch.zeros(1, 2, dtype=torch.int64)

    sample_window(gpt, layouts_at, shape=(2, 3), window=2, stride=1)
    assert asked == [(0, 0), (0, 1)]
