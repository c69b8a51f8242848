"""The work behind the page, without a page: the images of the model itself, progress, cancelling, errors."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from taming.checkpoint import load_model, save_exported
from taming.config import instantiate_from_config
from taming.data.sampler import SeededDataset
from taming.images import to_pil
from taming.modules.misc.coord import CoordStage
from taming.sampling import Cancelled, SamplingOptions, image_generators
from taming.web.conditions import layout_image
from taming.web.painting import paint_labels
from taming.web.progress import Job, Progress, Watch, preview, side_by_side
from taming.web.request import Request
from taming.web.session import Session
from tests.web.tiny_runs import NULL, SIDE, export

SIZE = (SIDE, SIDE)


def data_of(config):
    module = instantiate_from_config(config.data)
    module.setup()
    return SeededDataset(module.datasets["validation"], 0)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for key in ("class_label", "segmentation", "depth", "objects_bbox", "objects_center_points",
                "pose_tokens", "coord", "image"):
        export(folder / key, key)
    export(folder / "two", "class_label", "segmentation")
    return Session([folder], tmp_path_factory.mktemp("images"), device="cpu", data_of=data_of)


OPTIONS = {field.name for field in dataclasses.fields(SamplingOptions)}


def generated(session, *arguments, **settings):
    """The finished images, their settings, and the progress before."""
    how = {name: settings.pop(name) for name in [*settings] if name in OPTIONS}
    options = SamplingOptions(seed=0).replace(**how)
    *reports, last = session.generate(Request(*arguments, **settings, options=options), Job())
    assert all(isinstance(news, Progress) for news in reports)
    return [Image.open(one.path) for one in last], [one.settings for one in last], reports


def refusal(session, *arguments, **settings):
    with pytest.raises(ValueError) as caught:
        generated(session, *arguments, **settings)
    return str(caught.value)


def same(picture, image):
    return (np.asarray(picture) == np.asarray(to_pil(image[0]))).all()


def test_images_are_those_of_the_model(session):
    model = load_model(session.places[0] / "class_label")[0]
    settings = dict(temperature=0.9, top_k=8, top_p=0.9, min_p=0.01)
    values = {"class_label": 3}
    pictures, notes, _ = generated(session, "class_label", SIZE, values, seed=5, count=2, **settings)
    for number, picture in enumerate(pictures):
        generator = image_generators(5, [number])
        assert same(picture, model.generate(torch.tensor([[3]]), generator=generator, **settings))
        assert picture.info == notes[number] | {"Software": "taming"}
        assert notes[number]["number"] == str(number)
    assert notes[0]["class_label"] == "3 (mountains at night)" and notes[0]["seed"] == "5"
    sheet = np.asarray(side_by_side([picture.filename for picture in pictures]))
    assert (sheet[2:-2, 2 : 2 + SIDE] == np.asarray(pictures[0])).all()
    assert (sheet[2:-2, 4 + SIDE : -2] == np.asarray(pictures[1])).all()


def test_larger_ones_too(session):
    model = load_model(session.places[0] / "coord")[0]
    (picture,), notes, _ = generated(session, "coord", (SIDE, 64), stride=2)
    c = model.encode_conditions(CoordStage(8, 1).default((SIDE, 64)), (SIDE, 64))
    image = model.generate(c, size=(SIDE, 64), stride=2, generator=image_generators(0, [0]))
    assert picture.size == (64, SIDE) and same(picture, image) and notes[0]["size"] == "32x64"


@pytest.mark.parametrize("key", [
    "class_label", "segmentation", "depth", "objects_bbox", "objects_center_points", "pose_tokens",
])
def test_an_item_of_the_data_set_gives_the_tokens_that_it_has(session, key):
    """What the page shows of an item becomes what the model would have read of it."""
    loaded = session.load(key)
    value = session.item(key, 4, key)
    parts = session._condition(loaded, Request(key, SIZE, {key: value}))
    batch = {name: torch.as_tensor(np.asarray(entry))[None] for name, entry in loaded.dataset[4].items()}
    expected = loaded.model.encode_conditions(loaded.model.get_xc(batch)[1], SIZE)
    assert len(parts) == len(expected) == 1
    if key.startswith("objects"):  # the order of objects is random
        length = loaded.conditions[0].builder.object_descriptor_length
        assert sorted(parts[0].view(-1, length).tolist()) == sorted(expected[0].view(-1, length).tolist())
    else:
        assert parts[0].equal(expected[0])


def test_the_image_of_an_item(session):
    assert session.item("class_label", 2).size == (SIDE, SIDE)
    for number in (-1, 6):
        with pytest.raises(ValueError, match=f"no item {number}: the data set has 0 to 5"):
            session.item("class_label", number)


def test_without_a_data_set(session, tmp_path):
    plain = Session(session.places, tmp_path, device="cpu")
    assert plain.load("class_label").conditions[0].names[0] == "0"
    with pytest.raises(ValueError, match="no items to choose from: no data set was asked for"):
        plain.item("class_label", 0)

    def broken(config):
        raise OSError("the disk is elsewhere")

    broken = Session(session.places, tmp_path, device="cpu", data_of=broken)
    assert broken.load("class_label").no_data == "no data set: the disk is elsewhere"
    assert len(generated(broken, "class_label", SIZE, {"class_label": 0})[0]) == 1


def test_completion_keeps_what_is_not_brushed(session):
    model = load_model(session.places[0] / "image")[0]
    original = session.item("image", 0)
    layer = Image.new("RGBA", (512, 512))
    ImageDraw.Draw(layer).rectangle((0, 260, 511, 511), fill="red")  # of 4 rows of codes the lower 2
    loaded = session.load("image")
    _, known, keep = session._known(loaded, Request("image", SIZE, original=original, mask=[layer]))
    assert keep[:2].all() and not keep[2:].any()
    *_, found = session.generate(Request("image", SIZE, original=original, mask=[layer], count=2), Job())
    parts = model.encode_conditions(torch.zeros(2, 1))
    codes = model.sample_codes(
        parts, known=known.expand(2, -1, -1), mask=keep, generator=image_generators(0, range(2)),
    )
    assert (codes[:, :2] == known[:, :2]).all()
    images = model.first_stage_model.decode_code(codes).clamp(-1, 1)
    for one, image in zip(found, images, strict=True):
        pixels, decoded = np.asarray(Image.open(one.path)), np.asarray(to_pil(image))
        assert (pixels[:12] == np.asarray(original)[:12]).all()  # 2 rows of codes, less half a code
        assert (pixels[16:] == decoded[16:]).all() and (pixels[:12] != decoded[:12]).any()
    assert found[0].settings["completion"] == "50% of an original was brushed over"


def test_conditions_that_are_left_out_are_null_tokens(session):
    loaded = session.load("two")
    value = session.item("two", 1, "segmentation")
    parts = session._condition(loaded, Request("two", SIZE, {"class_label": None, "segmentation": value}))
    assert parts[0].tolist() == [[NULL]] and parts[1].shape == (1, 4, 4) and parts[1].max() < 10
    request = Request("two", SIZE, {"class_label": 2, "segmentation": value}, count=3)
    both = session._condition(loaded, request)
    assert both[0].tolist() == [[2]] * 3 and both[1].shape == (3, 4, 4)
    nothing = {"class_label": None, "segmentation": None}
    assert "leave at least one in" in refusal(session, "two", SIZE, nothing)
    _, notes, _ = generated(session, "two", SIZE, {"class_label": 2, "segmentation": None}, guidance=2.0)
    assert notes[0]["segmentation"] == "left out" and notes[0]["guidance"] == "2.0"


def test_progress_can_be_seen(session, monkeypatch):
    monkeypatch.setattr("taming.web.progress.INTERVAL", 0.0)
    monkeypatch.setattr("taming.web.progress.PREVIEW_SHARE", 1e9)
    for size in (SIZE, (SIDE, 64)):
        _, _, reports = generated(session, "class_label", size, {"class_label": 0})
        shown = [news for news in reports if news.image is not None]
        total = size[0] * size[1] // 64
        assert [news.message.split(" codes")[0] for news in shown] == [
            f"{done} of {total}" for done in range(1, total + 1)
        ]
        gray = [(np.asarray(news.image) == 217).all(-1).mean() for news in shown]
        assert gray[0] > 0.9 and gray[-1] < 0.1 and sorted(gray, reverse=True) == gray


def test_codes_that_a_masked_prior_has_not_decided_are_gray(session):
    model = session.load("class_label").model
    codes = torch.ones(2, 16, dtype=torch.int64)
    codes[0, 4:], codes[1, 12:] = -1, -1  # a quarter is there in both
    keep = torch.zeros(4, 4, dtype=torch.bool)
    for shown in (codes, codes.view(2, 4, 4)):
        gray = (np.asarray(preview(model, (4, 4), keep, 3, shown))[2 : 2 + SIDE, 2 : 2 + SIDE] == 217).all(-1)
        assert gray[SIDE // 4 :].all() and not gray[: SIDE // 4].all()
    assert preview(model, (4, 4), keep, 0, torch.full_like(codes, -1)) is None


def test_several_images_are_side_by_side_meanwhile(session):
    model = session.load("class_label").model
    keep = torch.zeros(4, 4, dtype=torch.bool)
    picture = preview(model, (4, 4), keep, 7, torch.ones(2, 8, dtype=torch.int64))
    assert picture.size == (2 * SIDE + 6, SIDE + 4)
    lower = np.asarray(picture)[2 + SIDE // 2 : 2 + SIDE, 2 : 2 + SIDE]
    assert (lower == 217).all() and not (np.asarray(picture)[2:18, 2:34] == 217).all()


def test_cancel_before_and_while_generating(session, monkeypatch):
    monkeypatch.setattr("taming.web.progress.INTERVAL", 0.0)
    job, steps = Job(), 0
    with pytest.raises(Cancelled):
        for news in session.generate(Request("class_label", (256, 256), {"class_label": 0}), job):
            steps += 1
            if "of 1024 codes" in news.message:
                job.cancel()
    assert steps < 100
    with pytest.raises(Cancelled):
        next(session.generate(Request("class_label", SIZE, {"class_label": 0}), job))
    assert len(generated(session, "class_label", SIZE, {"class_label": 0})[0]) == 1


def test_a_job_whose_progress_nobody_reads_stops(session):
    job = Job()
    stream = session.generate(Request("class_label", (512, 512), {"class_label": 0}), job)
    while "of 4096 codes" not in next(stream).message:
        pass
    stream.close()
    assert job.cancelled and "generation" not in [thread.name for thread in threading.enumerate()]


def test_one_at_a_time(session):
    first = session.generate(Request("class_label", SIZE, {"class_label": 0}), Job())
    next(first)
    second = session.generate(Request("class_label", SIZE, {"class_label": 1}), Job())
    done = []
    thread = threading.Thread(target=lambda: done.extend(second))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not done
    assert list(first)
    thread.join(20)
    assert done[-1][0].settings["class_label"].startswith("1 ")


def test_two_models_are_kept(session):
    for name in ("coord", "image", "coord", "depth"):
        session.load(name)
    assert list(session._models) == ["coord", "depth"]


SKETCH = paint_labels(np.zeros((64, 64), int), 10)


@pytest.mark.parametrize("arguments, settings, message", [
    (("class_label", (24, 32)), {}, "at least 32x32, as in training; the nearest is 32x32"),
    (("class_label", (32, 60)), {}, "must be multiples of f = 8, at least 32x32"),
    (("class_label", (32, 60)), {}, "the nearest is 32x64"),
    (("class_label", (2048, 2048)), {}, "4.19 million pixels; at most 4 million"),
    (("class_label", SIZE), {"count": 17}, "17 images: give 1 to 16"),
    (("class_label", SIZE), {"top_k": 17}, "top_k is 17: give 1 to 16"),
    (("class_label", SIZE), {"top_k": -1}, "top_k is -1"),
    (("class_label", SIZE), {"top_p": 0.0}, "top_p is 0: give above 0, up to 1"),
    (("class_label", SIZE), {"min_p": 1.5}, "min_p is 1.5"),
    (("class_label", SIZE), {"temperature": 0.0}, "temperature is 0: give a number above 0"),
    (("class_label", SIZE), {"guidance": 2.0}, "the model has no null token"),
    (("class_label", SIZE), {"seed": -1}, "seed is -1"),
    (("class_label", SIZE), {"stride": 5}, "stride is 5: give 1 to 4, the width of the window"),
    (("class_label", SIZE), {"original": SKETCH}, "nothing of the original is brushed over"),
    (("class_label", SIZE), {"original": SKETCH.resize((80, 64))}, "the original is 64x80 (height x width)"),
    (("segmentation", (32, 64), {"segmentation": SKETCH}), {}, "segmentation is 64x64 (height x width)"),
    (("segmentation", SIZE), {}, "segmentation is missing: paint it"),
    (("depth", SIZE), {}, "depth is missing: upload one, or take one of the data set"),
    (("gone", SIZE), {}, "there is no run 'gone': choose another one"),
])
def test_bad_input(session, arguments, settings, message):
    values = {} if len(arguments) > 2 or arguments[0] != "class_label" else {"conditions": {"class_label": 0}}
    assert message in refusal(session, *arguments, **values, **settings)


def test_boxes(session):
    condition = session.load("objects_bbox").conditions[0]
    boxes = [(2, 0.1, 0.5, 0.3, 0.9)]
    picture = np.asarray(layout_image(condition, boxes, (64, 64)))
    assert (picture[2:28, 30:60] == 255).all() and (picture[30:60, 5:22] != 255).any()
    for wrong, message in (
        ([(2, 0.5, 0.5, 0.5, 0.9)], "box 1 has no area within the image"),
        ([(2, 1.5, 0.1, 1.9, 0.9)], "box 1 has no area within the image"),
        ([(99, 0.1, 0.1, 0.2, 0.2)], "box 1 is of category 99, but there are 9"),
        (boxes * 13, "there are 13 boxes, but the model has room for 12"),
    ):
        assert message in refusal(session, "objects_bbox", SIZE, {"objects_bbox": wrong})


def test_runs_that_cannot_be_used(session, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    other = Session([tmp_path, *session.places], tmp_path / "out", device="cpu")
    assert "has no checkpoint yet" in refusal(other, "new", SIZE)
    model, config, _ = load_model(session.places[0] / "class_label")
    first = {"model": config.model.params.first_stage_config}
    save_exported(model.first_stage_model, first, tmp_path / "stage1")
    only = Session([tmp_path / "stage1"], tmp_path / "out", device="cpu")
    assert "stage1 is a VQModel: choose a run of stage 2" in refusal(only, "stage1", SIZE)


def test_the_rate_is_that_of_all_images(session):
    reports = []
    model = session.load("class_label").model
    watch = Watch(model, (4, 4), None, Job(), reports.append)
    watch.start -= 1.0
    watch.reported -= 1.0
    assert watch(7, torch.zeros(2, 8, dtype=torch.int64)) is True
    assert reports[0].message == "8 of 16 codes, 16 a second, 1 s left"
