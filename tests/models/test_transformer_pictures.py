"""Net2NetTransformer: pictures of codes and of conditions, and drawing them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.datamodule import WrappedDataset
from taming.images import text_pictures
from taming.sampling import Cancelled, image_generators, sample_window
from tests.models.test_cond_transformer import (
    CLASSES,
    COORD,
    DDCONFIG,
    DUMMY,
    SPIRAL,
    UNCONDITIONAL,
    batches,
    close,
    fit,
    gpt_config,
    make,
)

KEY = "objects_center_points"


@torch.no_grad()
def test_permuted_codes_decode_to_the_same_picture():
    model = make(permuter_config=SPIRAL).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    quant, codes = model.encode_to_z(x)
    raster = model.first_stage_model.encode(x)[2][2].view(2, 16)
    assert torch.equal(model.permuter(codes, reverse=True), raster) and not torch.equal(codes, raster)
    close(model.decode_to_img(codes, quant.shape), model.first_stage_model(x)[0])


@torch.no_grad()
def test_other_shapes_than_the_training_size():
    model = make().eval()
    x = torch.rand(1, 3, 8, 20)
    quant, codes = model.encode_to_z(x)
    assert codes.shape == (1, 10)
    close(model.decode_to_img(codes, quant.shape), model.first_stage_model(x)[0])


def test_sample_continues_codes_under_a_condition():
    model = make(CLASSES, cond_stage_key="class_label").eval()
    given, condition, seen = torch.randint(24, (2, 5)), torch.tensor([[3], [29]]), []
    codes = model.sample(given, condition, steps=11, callback=seen.append)
    assert codes.shape == (2, 16) and torch.equal(codes[:, :5], given) and seen == list(range(11))
    with torch.no_grad():
        logits = model.transformer(torch.cat((condition, codes), 1)[:, :-1])[0]
    assert torch.equal(logits[:, 5:, :24].argmax(-1), codes[:, 5:])  # greedy by default, among the codes
    drawn = model.sample(given, condition, 11, sample=True, top_k=20, generator=image_generators(0, [4, 5]))
    other = model.sample(given[1:], condition[1:], 11, 1.0, True, 20, generator=image_generators(0, [5]))
    assert torch.equal(drawn[1:], other) and not torch.equal(drawn, codes)


def test_tokens_that_are_no_codes_are_never_drawn():
    model = make(CLASSES, cond_stage_key="class_label").eval()  # 30 tokens, 24 codes
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.head.weight[24:] = 5.0  # it prefers the class labels
    images = model.generate(torch.tensor([[1], [2]]), generator=image_generators(0, range(2)))
    assert images.shape == (2, 3, 16, 16) and images.abs().max() <= 1.0
    assert model.sample(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[1], [2]]), 16).max() < 24


def test_top_k_logits_of_2021():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert make().top_k_logits(logits, 2).tolist() == [[-torch.inf, 3.0, 2.0]]


def test_log_images_of_each_condition():
    batch = batches(1)[0]
    for cond, key in ((UNCONDITIONAL, "image"), (CLASSES, "class_label"), (COORD, "coord")):
        model = make(cond, cond_stage_key=key).eval()
        pictures = model.log_images(batch, max_images=2)
        want = {"inputs", "reconstructions", "samples_half", "samples"}
        assert set(pictures) == (want if key == "image" else want | {"conditioning"})
        assert all(picture.shape[0] == 2 and picture.shape[2:] == (16, 16) for picture in pictures.values())
        close(pictures["reconstructions"], model.first_stage_model(pictures["inputs"])[0])
    assert model.latent_shape() == (4, 4) and model.latent_shape(8, 20) == (2, 5)


def test_layouts_are_drawn_by_the_data_set_that_made_them():
    class Layouts:
        """What the model uses of AnnotatedObjectsDataset."""

        conditional_builders = {KEY: ObjectsCenterPointsConditionalBuilder(3, 2, 30, False, False, False)}

        def plot_conditionals(self, key, tokens, size):
            return self.conditional_builders[key].plot_batch(tokens, str, size)

    stage = {"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": KEY}}
    model = make(stage, cond_stage_key=KEY).eval()
    layouts = torch.tensor([[1, 7, 2, 20], [0, 3, 0, 29], [1, 1, 1, 1]])
    batch = batches(1)[0] | {KEY: layouts}
    assert "conditioning" not in model.log_images(batch, max_images=2)  # nobody there who could draw
    for dataset in (Layouts(), WrappedDataset(Layouts())):
        datasets = {"train": [], "validation": dataset}
        model._trainer = SimpleNamespace(datamodule=SimpleNamespace(datasets=datasets))
        drawn = model.log_images(batch, max_images=2)["conditioning"]
        assert drawn.shape == (2, 3, 16, 16) and not torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn, Layouts().plot_conditionals(KEY, layouts[:2], (16, 16)))


def test_larger_pictures_come_through_the_window():
    model = make(CLASSES, cond_stage_key="class_label").eval()
    c = torch.tensor([[1], [2]])
    images = model.generate(c, size=(16, 40), stride=2, generator=image_generators(0, range(2)))
    codes = sample_window(
        model.transformer, c, shape=(4, 10), window=(4, 4), stride=2, codebook_size=24,
        generator=image_generators(0, range(2)),
    )
    close(images, model.first_stage_model.decode_code(codes).clamp(-1, 1))
    plain = model.generate(c, generator=image_generators(0, range(2)))
    assert torch.equal(model.generate(c, size=(16, 16), generator=image_generators(0, range(2))), plain)
    spatial = make(COORD, cond_stage_key="coord").eval()
    assert spatial.generate(torch.randint(24, (1, 5, 7)), size=(20, 28)).shape == (1, 3, 20, 28)
    with pytest.raises(ValueError, match="order of SpiralOut"):
        make(permuter_config=SPIRAL).generate(c, size=(16, 40))


def test_a_segmentation_may_come_as_ids():
    ddconfig = {**DDCONFIG, "in_channels": 5, "out_ch": 5}
    params = dict(n_labels=5, ddconfig=ddconfig, lossconfig=DUMMY, n_embed=24, embed_dim=4)
    stage = {"target": "taming.models.vqgan.VQSegmentationModel", "params": params}
    model = make(stage, cond_stage_key="segmentation").eval()
    ids = torch.randint(5, (3, 16, 16), dtype=torch.uint8)
    batch = batches(1)[0]
    pictures = [
        model.log_images(batch | {"segmentation": maps})["conditioning"]
        for maps in (ids, F.one_hot(ids.long(), 5).float())
    ]
    assert torch.equal(*pictures) and pictures[0].shape == (3, 3, 16, 16)
    assert fit(model, [batch | {"segmentation": ids}]).batches_seen == 1


def test_pictures_may_be_guided():
    model = make(CLASSES, gpt=gpt_config(vocab_size=31), cond_stage_key="class_label", null_token=30).eval()
    c, null = torch.tensor([[1], [2]]), torch.tensor([[30]])
    for size, shape in (((16, 16), (4, 4)), ((20, 24), (5, 6))):
        images = model.generate(c, size=size, guidance=3.0, generator=image_generators(0, range(2)))
        codes = sample_window(
            model.transformer, c, shape=shape, window=4, codebook_size=24, guidance=3.0, null_condition=null,
            generator=image_generators(0, range(2)),
        )
        close(images, model.first_stage_model.decode_code(codes).clamp(-1, 1))
        plain = model.generate(c, size=size, generator=image_generators(0, range(2)))
        assert (images - plain).abs().max() > 0.01
    spatial = make(COORD, cond_stage_key="coord", null_token=29).eval()
    for shape in ((4, 4), (4, 6)):
        codes, size = torch.randint(24, (1, *shape)), (4 * shape[0], 4 * shape[1])
        assert spatial.generate(codes, size=size, guidance=2.0).shape == (1, 3, *size)
    with pytest.raises(ValueError, match="guidance of 3 needs null tokens"):
        make(CLASSES, cond_stage_key="class_label").eval().generate(c, guidance=3.0)
    with pytest.raises(Cancelled):
        model.generate(c, callback=lambda step, codes: False)


def test_a_class_is_written():
    model = make(CLASSES, cond_stage_key="class_label").eval()
    x, c = torch.zeros(2, 3, 64, 64), torch.tensor([3, 29])
    numbers = model.show_conditions(c, x)["class_label"]
    assert numbers.shape == (2, 1, 64, 64) and torch.equal(numbers, text_pictures(["3", "29"], (64, 64)))
    assert not torch.equal(numbers[0], numbers[1])
    names = [f"name of {number}" for number in range(30)]
    named = model.show_conditions(c, x, [SimpleNamespace(class_names=names)])["class_label"]
    assert torch.equal(named, text_pictures(["3 name of 3", "29 name of 29"], (64, 64)))
    others = [SimpleNamespace(class_names=["a"])]
    assert torch.equal(model.show_conditions(c, x, others)["class_label"], numbers)
