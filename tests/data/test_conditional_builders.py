"""Layouts against the values of an independent implementation, back to boxes, and as images."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.data.conditional_builder import utils
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.helper_types import Annotation, MostFrequent

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "conditional_builders.safetensors")
FLAGS = ({}, {"is_group_of": True}, {"is_occluded": True, "is_inside": True})
BUILDERS = {"bbox": ObjectsBoundingBoxConditionalBuilder, "center": ObjectsCenterPointsConditionalBuilder}


def annotation(bbox, category_no=0, **flags):
    return Annotation(
        area=bbox[2] * bbox[3], image_id="i", bbox=bbox, category_no=category_no,
        category_id=str(category_no), **flags,
    )


def bbox_builder(**changes):
    arguments = dict(no_object_classes=10, no_max_objects=5, no_tokens=10_000, encode_crop=False,
                     use_group_parameter=True, use_additional_parameters=True)
    return ObjectsBoundingBoxConditionalBuilder(**arguments | changes)


def boxes(builder, annotations, *args):
    return [box for _, box in builder.inverse_build(builder.build(annotations, *args))[0]]


@pytest.mark.parametrize("key", [key for key in GOLDEN if key.startswith("out/")])
def test_tokens_are_those_of_2021(key, monkeypatch):
    monkeypatch.setattr(random, "shuffle", lambda items: None)
    kind, crop, flip = key.removeprefix("out/").split(".")
    builder = BUILDERS[kind](10, 5, 256, crop.endswith("True"), True, True)
    boxes, numbers = GOLDEN["in/bboxes"].tolist(), GOLDEN["in/categories"].tolist()
    annotations = [annotation(tuple(b), n, **f) for b, n, f in zip(boxes, numbers, FLAGS, strict=True)]
    tokens = builder.build(annotations, (0.05, 0.0, 0.8, 1.0), flip.endswith("True"))
    assert tokens.dtype == torch.int64 and len(tokens) == builder.embedding_dim
    assert tokens.tolist() == GOLDEN[key].tolist()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_layout_can_be_read_back(kind, flip):
    """Within half a step of the grid of 100 x 100."""
    builder = BUILDERS[kind](10, 5, 10_000, True, True, True)
    given = [annotation((0.1, 0.2, 0.3, 0.4), 3, is_group_of=True), annotation((0.5, 0.1, 0.4, 0.8), 7)]
    objects, crop = builder.inverse_build(builder.build(given, (0.1, 0.0, 0.5, 1.0), flip))
    assert crop == pytest.approx((0.4 if flip else 0.1, 0.0, 0.5, 1.0), abs=0.02)
    found = {builder.representation_to_annotation(which): where for which, where in objects}
    assert {(a.category_no, a.is_group_of) for a in found} == {(3, True), (7, False)}
    for which, where in found.items():
        x, y, w, h = next(a.bbox for a in given if a.category_no == which.category_no)
        x = 1 - x - w if flip else x
        wanted = (x, y, w, h) if kind == "bbox" else (x + w / 2, y + h / 2)
        assert where == pytest.approx(wanted, abs=0.011)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_box_is_cut_on_every_side_of_the_crop(axis, flip):
    box, crop = [0.2, 0.2, 0.6, 0.6], [0.0, 0.0, 1.0, 1.0]
    crop[axis], crop[axis + 2] = 0.4, 0.2  # the box reaches over both ends
    found = utils.rescale_annotations([annotation(tuple(box))], tuple(crop), flip)[0].bbox
    wanted = [0.2, 0.2, 0.6, 0.6]
    wanted[axis], wanted[axis + 2] = 0.0, 1.0
    assert found == pytest.approx(wanted)
    crop[axis], crop[axis + 2] = 0.5, 0.5  # its first half is cut off: 0.5 to 0.8 is left, of 0.5 to 1
    found = utils.rescale_annotations([annotation(tuple(box))], tuple(crop), False)[0].bbox
    assert (found[axis], found[axis + 2]) == pytest.approx((0.0, 0.6))


def test_objects_outside_the_crop_are_left_out():
    seen = boxes(bbox_builder(), [annotation((0.0, 0.0, 0.2, 0.2)), annotation((0.5, 0.5, 0.5, 0.5))],
                 (0.5, 0.5, 0.5, 0.5))
    assert seen == [pytest.approx((0.0, 0.0, 1.0, 1.0))]
    assert boxes(bbox_builder(), []) == []


def test_the_order_is_random_and_the_callers_list_is_not_touched():
    given = [annotation((0.1, 0.1, 0.5, 0.5), n) for n in range(5)]
    builder, kept = bbox_builder(), list(given)
    random.seed(3)
    first = [builder.build(given).tolist() for _ in range(8)]
    random.seed(3)
    assert [builder.build(given).tolist() for _ in range(8)] == first
    assert len({tuple(tokens) for tokens in first}) > 3 and given == kept


def test_too_many_objects_are_cut_with_one_warning(caplog):
    builder = bbox_builder(no_max_objects=2)
    given = [annotation((0.1, 0.1, 0.5, 0.5), n) for n in range(4)]
    assert [len(boxes(builder, given)) for _ in range(3)] == [2, 2, 2]
    assert [record.message[:46] for record in caplog.records] == \
        ["an image shows 4 objects, more than the 2 that"]


@pytest.mark.parametrize("group, more, flags, number", [
    (True, True, dict(is_group_of=True, is_inside=True), 4 + 10 * 9),
    (True, False, dict(is_group_of=1, is_inside=True), 4 + 10),
    (False, True, dict(is_group_of=True, is_occluded=True, is_depiction=True), 4 + 10 * 6),
    (False, False, dict(is_group_of=True, is_inside=True), 4),
])
def test_flags_change_the_token(group, more, flags, number):
    builder = bbox_builder(use_group_parameter=group, use_additional_parameters=more)
    given = annotation((0, 0, 1, 1), 4, **flags)
    assert builder.build([given])[0] == number
    back = builder.representation_to_annotation(number)
    assert (back.category_no, bool(back.is_group_of)) == (4, group and bool(given.is_group_of))
    assert bool(back.is_inside) == (more and bool(given.is_inside))


@pytest.mark.parametrize("group, more, needed", [
    (True, True, 161), (False, True, 151), (True, False, 21), (False, False, 11),
])
def test_the_vocabulary_must_hold_every_object(group, more, needed):
    arguments = dict(use_group_parameter=group, use_additional_parameters=more)
    assert bbox_builder(no_tokens=needed, **arguments).none == needed - 1
    with pytest.raises(ValueError, match=rf"no_tokens={needed - 1} is too small .* to at least {needed}"):
        bbox_builder(no_tokens=needed - 1, **arguments)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"category number 10 .*is outside 0\.\.9: raise no_object_classes"):
        bbox_builder().build([annotation((0, 0, 1, 1), 10)])
    with pytest.raises(ValueError, match="a layout has 15 tokens here, got 14"):
        bbox_builder().inverse_build(torch.zeros(14, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one category.*no_max_objects=0"):
        bbox_builder(no_max_objects=0)


def test_a_plot_shows_where_objects_are():
    builder = bbox_builder()
    tokens = builder.build([annotation((0.25, 0.5, 0.5, 0.25), 3)])
    names = []
    image = builder.plot(tokens, lambda no: names.append(no) or "", (200, 100), line_width=2)
    assert image.shape == (3, 100, 200) and image.dtype == torch.float32  # figure sizes are width, height
    drawn = (image < 1).any(dim=0).nonzero()
    assert names == [3] and image.max() == 1.0
    top, left = drawn.min(dim=0).values.tolist()
    bottom, right = drawn.max(dim=0).values.tolist()
    assert (left, top, right, bottom) == pytest.approx((50, 50, 150, 75), abs=2)


def test_points_labels_and_crops_are_drawn():
    builder = ObjectsCenterPointsConditionalBuilder(10, 5, 10_000, True, True, True)
    tokens = builder.build([annotation((0.4, 0.4, 0.2, 0.2))], (0.5, 0.0, 0.5, 1.0))
    plain, named = (builder.plot(tokens, lambda no, text=text: text, (256, 256)) for text in ("", "cat"))
    assert (plain[:, 128, 128] < 1).any() and (plain[:, 128, 60] == 1).all()
    assert plain[0, 200, 129] < 0 and plain[0, 200, 254] < 0  # the crop's edges, dark grey
    assert (named < -0.5).sum() > (plain < -0.5).sum() + 20


def test_a_batch_of_any_tokens_can_be_drawn():
    generator = torch.Generator().manual_seed(0)
    for kind in BUILDERS.values():
        builder = kind(10, 5, 200, True, True, True)
        tokens = torch.randint(200, (6, builder.embedding_dim), generator=generator)
        images = builder.plot_batch(tokens, str, (40, 24))
        assert images.shape == (6, 3, 24, 40)
        assert images.amin() >= -1 and images.amax() == 1 and (images.amin(dim=(1, 2, 3)) < 0).all()
        assert torch.equal(images[2], builder.plot(tokens[2], str, (40, 24)))


def test_flags_are_named():
    given = annotation((0, 0, 1, 1), is_group_of=True, is_inside=True)
    assert utils.additional_parameters_string(given) == "(g,i)"
    assert utils.additional_parameters_string(given, short=False) == "(group,inside)"
    assert utils.additional_parameters_string(annotation((0, 0, 1, 1))) == ""


def test_areas_are_shared_or_not():
    assert utils.intersection_area((0, 0, 0.5, 0.5), (0.25, 0.25, 0.5, 0.5)) == pytest.approx(0.0625)
    assert utils.intersection_area((0, 0, 0.2, 0.2), (0.5, 0.5, 0.2, 0.2)) == 0


def test_category_lists_come_from_files_or_from_the_package(tmp_path):
    (tmp_path / "names.txt").write_text("Cat,100\nDog\n\n")
    (tmp_path / "pairs.csv").write_text("/m/a,/m/b\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert utils.load_allow_list(str(tmp_path / "names.txt")) == {"Cat", "Dog"}
    assert utils.load_mapping(str(tmp_path / "pairs.csv")) == {"/m/a": "/m/b"}
    assert utils.load_allow_list("") is None and utils.load_mapping("") == {}
    helper = "taming.data.open_images_helper."
    assert utils.load_mapping(helper + "open_images_unify_categories_for_coco")["/m/04yx4"] == "/m/01g317"
    allowed = utils.load_allow_list(helper + "top_300_classes_plus_coco_compatibility")
    assert isinstance(allowed, MostFrequent) and allowed.number == 300
    assert len(allowed.plus) == len(set(allowed.plus)) == 80


@pytest.mark.parametrize("target, message", [
    ("nowhere.txt", "nowhere.txt does not exist"),
    ("taming.data.open_images_helper.top_9", "no category list taming.data.open_images_helper.top_9"),
    ("taming.data.nowhere.top_9", "no category list taming.data.nowhere.top_9"),
    ("taming.data.base.ImagePaths", "ImagePaths is not a function that returns a list"),
    ("os.environ", "os.environ"),
    ("taming.util.download", "taming.util.download"),
])
def test_other_targets_are_refused(target, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        utils.load_object_from_string(target)


def test_a_mapping_must_be_pairs(tmp_path):
    (tmp_path / "names.txt").write_text("Cat\n")
    with pytest.raises(ValueError, match="not a list of pairs: write one `from,to` a line"):
        utils.load_mapping(str(tmp_path / "names.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty.txt is empty"):
        utils.load_allow_list(str(tmp_path / "empty.txt"))
