"""Several conditions at once, left out ones, and conditions of another size than the image."""

import pytest
import torch
from torch import nn

from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators

DUMMY = {"target": "taming.modules.losses.DummyLoss"}
DDCONFIG = dict(
    double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0,
)
VQ = {
    "target": "taming.models.vqgan.VQModel",
    "params": dict(ddconfig=DDCONFIG, lossconfig=DUMMY, n_embed=24, embed_dim=4),
}
CLASSES = {"target": "taming.modules.util.Labelator", "params": dict(n_classes=7)}
LABELS = {
    "target": "taming.modules.conditioners.label_grid.LabelGrid", "params": dict(n_labels=5, down_factor=8),
}
KEYS = ["class_label", "segmentation"]
NULL = 29


def make(cond=(CLASSES, LABELS), keys=KEYS, block_size=20, **arguments):
    """A tiny model over 4x4 codes: one class token, 2x2 label tokens, 16 codes."""
    gpt = dict(vocab_size=30, block_size=block_size, n_layer=2, n_head=2, n_embd=16)
    config = {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt}
    cond = cond if isinstance(cond, str | dict) else list(cond)
    model = Net2NetTransformer(config, VQ, cond, cond_stage_key=keys, **arguments)
    nn.init.normal_(model.first_stage_model.quantize.embedding.weight, std=0.5)
    nn.init.normal_(model.transformer.head.weight, std=0.5)
    return model


def batch(size=3, height=16, width=16):
    return {
        "image": torch.rand(size, height, width, 3) * 2 - 1,
        "class_label": torch.randint(7, (size,)),
        "segmentation": torch.randint(5, (size, height, width)),
    }


def inputs_of(model):
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    return seen


def test_tokens_stand_one_after_the_other():
    model = make().eval()
    x, c = model.get_xc(batch())
    parts = model.encode_conditions(c)
    assert [part.shape for part in parts] == [(3, 1), (3, 2, 2)]
    quants, tokens = model.encode_to_c(c)
    assert len(quants) == 2 and torch.equal(tokens, torch.cat([part.flatten(1) for part in parts], dim=1))
    seen = inputs_of(model)
    logits, target = model(x, c)
    assert torch.equal(seen[0], torch.cat((tokens, target), dim=1)[:, :-1])
    assert logits.shape == (3, 16, 30)
    assert list(model.log_images(batch())) == [
        "inputs", "reconstructions", "conditioning_class_label", "conditioning_segmentation", "samples_half",
        "samples",
    ]


def test_each_condition_is_dropped_on_its_own():
    model = make(cond_dropout=[0.25, 0.75], null_token=NULL).train()
    x, c = model.get_xc(batch(200))
    seen = inputs_of(model)
    with torch.no_grad():
        model(x, c)
    label, maps = seen[0][:, :1] == NULL, seen[0][:, 1:5] == NULL
    assert torch.equal(maps.any(1), maps.all(1))  # all of a condition, or nothing
    assert 0.1 < label.float().mean() < 0.4 and 0.6 < maps.float().mean() < 0.9
    both = (label[:, 0] & maps[:, 0]).float().mean()
    assert 0.08 < both < 0.32  # 0.1875 if they are independent; all of a class's 0.25 if they are not


def test_what_is_left_out_becomes_null_tokens():
    model = make(cond_dropout=[0.0, 0.3], null_token=NULL).eval()
    label = torch.tensor([3, 4])
    parts = model.encode_conditions((label, None), size=(16, 48))
    assert parts[0].tolist() == [[3], [4]]
    assert parts[1].shape == (2, 2, 6) and (parts[1] == NULL).all()
    maps = torch.nn.functional.one_hot(torch.randint(5, (2, 16, 16)), 5).permute(0, 3, 1, 2).float()
    assert model.encode_conditions((None, maps))[0].tolist() == [[NULL], [NULL]]
    with pytest.raises(ValueError, match="0 conditions are given, but the model has 2"):
        model.encode_conditions((None, None))
    with pytest.raises(ValueError, match="LabelGrid. is missing, and the model has no token for none"):
        make().encode_conditions((label, None))


def test_a_coarser_grid_slides_with_the_window():
    """Every step of a panorama reads the class, then the 2x2 labels of its window, then its codes."""
    model = make(cond_dropout=0.1, null_token=NULL).eval()
    x, c = model.get_xc(batch(2, 16, 32))
    parts = model.encode_conditions(c)
    assert parts[1].shape == (2, 2, 4)
    seen = inputs_of(model)
    codes = model.sample_codes(
        parts, size=(16, 32), wavefront=True, generator=image_generators(0, range(2))
    )
    prefixes = {tuple(row[1:5].tolist()) for tokens in seen for row in tokens}
    windows = {tuple(part[:, left : left + 2].flatten().tolist()) for part in parts[1] for left in range(3)}
    assert prefixes == windows
    in_turn = model.sample_codes(parts, size=(16, 32), generator=image_generators(0, range(2)))
    assert torch.equal(codes, in_turn)
    guided = model.generate(parts, size=(16, 32), guidance=2.0, stride=2)
    assert guided.shape == (2, 3, 16, 32)
    with pytest.raises(ValueError, match="2x4 codes, but shape is 4x4; a window of 4x4 sees 2x2"):
        model.sample_codes(parts, known=torch.zeros(2, 4, 4).long(), mask=torch.eye(4))


def test_guidance_leaves_alone_what_training_never_dropped():
    model = make(cond_dropout=[0.0, 0.3], null_token=NULL).eval()
    parts = model.encode_conditions(model.get_xc(batch(2))[1])
    seen = inputs_of(model)
    for size in (None, (16, 32)):
        wide = [parts[0], parts[1].repeat(1, 1, 2 if size else 1)]
        model.sample_codes(wide, size=size, guidance=2.0, wavefront=True)
    for tokens in seen:
        given, null = tokens.chunk(2)
        assert torch.equal(given[:, 0], null[:, 0]) and (given[:, 0] < 7).all()
        assert (null[:, 1:5] == NULL).all() and (given[:, 1:5] < 5).all()


def test_known_codes_stay():
    model = make().eval()
    parts = model.encode_conditions(model.get_xc(batch(2))[1])
    known, mask = torch.randint(24, (2, 4, 4)), torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    codes = model.sample_codes(parts, known=known, mask=mask)
    assert torch.equal(codes[:, :2], known[:, :2]) and not torch.equal(codes[:, 2:], known[:, 2:])
    plain = model.sample_codes(parts, generator=image_generators(1, range(2)))
    nothing_known = torch.zeros_like(mask)
    drawn = model.sample_codes(
        parts, known=known, mask=nothing_known, generator=image_generators(1, range(2))
    )
    assert torch.equal(drawn, plain)


def test_a_condition_may_be_smaller_than_the_image():
    model = make("__is_first_stage__", "upper_half", block_size=23, cond_size=[8, 16]).eval()
    half = model.encode_conditions(torch.rand(2, 3, 8, 16) * 2 - 1)
    assert half[0].shape == (2, 2, 4)
    assert model.generate(half).shape == (2, 3, 16, 16)
    wide = model.encode_conditions(torch.rand(1, 3, 8, 32) * 2 - 1)
    assert model.generate(wide, size=(16, 32), stride=4).shape == (1, 3, 16, 32)
    with pytest.raises(ValueError, match="block_size: 23 .* 16 condition tokens and 16 image codes"):
        make("__is_first_stage__", "upper_half", block_size=23)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(keys=["segmentation"]), "but 2 condition stages: a list of stages needs a list of as many keys"),
    (dict(keys="segmentation"), "needs a list of as many keys"),
    (dict(cond=LABELS), "but 1 condition stages"),
    (dict(cond_dropout=[0.1], null_token=NULL), "cond_dropout names 1 numbers, but there are 2 conditions"),
    (dict(cond_dropout=[0.1, 1.5], null_token=NULL), "cond_dropout: 1.5 is not a probability"),
    (dict(cond_size=[8, 8, 8]), "cond_size names 3 sizes, but there are 2 conditions"),
    (dict(block_size=19), "block_size: 19 .* 5 condition tokens and 16 image codes"),
])
def test_what_does_not_fit_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
