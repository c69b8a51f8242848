"""The stage-1 models beside VQModel: each trains, validates, is saved and loaded, and decodes its codes."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from taming.colormap import random_colors
from taming.models.vqgan import EMAVQ, GumbelVQ, VQModel, VQNoDiscModel, VQSegmentationModel

DISC = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
DISC = {"target": DISC, "params": dict(disc_start=1, disc_num_layers=1, disc_ndf=8, perceptual_weight=0.0)}
PLAIN = {"target": "taming.modules.losses.vqperceptual.VQLPIPS", "params": {"perceptual_weight": 0.0}}
BCE = {"target": "taming.modules.losses.segmentation.BCELossWithQuant", "params": {"codebook_weight": 0.7}}
COSINE = "taming.lr_scheduler.LambdaWarmUpCosineScheduler"


def schedule(start, end, batches):
    params = dict(warm_up_steps=0, max_decay_steps=batches, lr_start=start, lr_max=start, lr_min=end)
    return {"target": COSINE, "params": params}


def ddconfig(channels=3):
    return dict(
        double_z=False, z_channels=8, resolution=16, in_channels=channels, out_ch=channels, ch=32,
        ch_mult=[1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0,
    )


def gumbel(**arguments):
    temperature = schedule(1.0, 0.1, 4)
    defaults = dict(n_embed=16, embed_dim=4, temperature_scheduler_config=temperature, kl_weight=0.01)
    return GumbelVQ(ddconfig(), DISC, **defaults | arguments)


BUILD = {
    "EMAVQ": lambda **more: EMAVQ(ddconfig(), DISC, 16, 4, **more),
    "GumbelVQ": gumbel,
    "VQNoDiscModel": lambda **more: VQNoDiscModel(ddconfig(), PLAIN, 16, 4, **more),
    "VQSegmentationModel": lambda **more: VQSegmentationModel(
        5, ddconfig(5), BCE, 16, 4, image_key="segmentation", **more
    ),
}


def batches(count):
    labels = torch.randint(5, (count, 2, 16, 16))
    maps = torch.nn.functional.one_hot(labels, 5).float()
    return [{"image": torch.rand(2, 16, 16, 3) * 2 - 1, "segmentation": m} for m in maps]


def fit(model, data, **arguments):
    model.learning_rate = 1e-3
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **{"max_epochs": 1, **arguments},
    )
    loader = DataLoader(data, batch_size=None)
    trainer.fit(model, loader, loader)
    return trainer


@pytest.mark.parametrize("name", BUILD)
def test_it_trains_validates_and_its_codes_decode_to_what_decode_gives(name, tmp_path):
    model = BUILD[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = fit(model, batches(3))
    assert model.batches_seen == 3
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    for part in ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."):
        assert any(key.startswith(part) for key in changed), f"{part} has not learnt"
    assert math.isfinite(trainer.callback_metrics["val/total_loss"])
    assert 0 < trainer.callback_metrics["val/codebook_usage_percent"] <= 100

    model.eval()
    x = model.get_input(batches(1)[0], model.image_key)
    with torch.no_grad():
        quant, _, (_, _, indices) = model.encode(x)
        again = model.encode(x)[2][2]
        decoded, want = model.decode_code(indices.view(2, 4, 4)), model.decode(quant)
    assert torch.equal(indices, again) and 0 <= indices.min() and indices.max() < 16
    torch.testing.assert_close(decoded, want, rtol=1e-4, atol=1e-4)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    copy = BUILD[name](ckpt_path=str(tmp_path / "last.ckpt"))
    with torch.no_grad():
        torch.testing.assert_close(copy.eval().encode(x)[0], quant)


@pytest.mark.parametrize("name", BUILD)
def test_its_pictures_are_images(name):
    model = BUILD[name]().eval()
    log = model.log_images(batches(1)[0])
    assert {key: value.shape for key, value in log.items()} == dict.fromkeys(
        ("inputs", "reconstructions"), (2, 3, 16, 16)
    )


def test_temperature_and_divergence_follow_their_schedules():
    model = gumbel(kl_scheduler_config=schedule(0.0, 1.0, 4))
    fit(model, batches(2))  # the last batch began after 1 of 4: a quarter of the cosine
    quarter = (1 + math.cos(math.pi / 4)) / 2
    assert model.quantize.temperature == pytest.approx(0.1 + 0.9 * quarter)
    assert model.quantize.kl_weight == pytest.approx(0.01 * (1 - quarter))


def test_gumbel_codes_have_their_own_width():
    model = gumbel(embed_dim=6).eval()  # z_channels: 8
    quant, _, (_, _, indices) = model.encode(torch.rand(2, 3, 16, 24))
    assert quant.shape == (2, 6, 4, 6) and indices.shape == (2, 4, 6)


def test_codes_do_not_change_under_autocast():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    for model in (VQModel(ddconfig(), DISC, 512, 4), gumbel(n_embed=512)):
        model.eval()
        with torch.no_grad():
            want = model.encode(x)[2][2]
            with torch.autocast("cpu", torch.bfloat16):
                got = model.encode(x)[2][2]
        assert torch.equal(got, want) and len(want.unique()) > 10


def test_training_makes_use_of_autocast():
    model, dtypes = BUILD["EMAVQ"](), []
    model.quant_conv.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    fit(model, batches(1), precision="bf16-mixed", limit_val_batches=0)
    assert dtypes == [torch.bfloat16]


def test_a_palette_is_the_same_in_every_run():
    first, second = BUILD["VQSegmentationModel"](), BUILD["VQSegmentationModel"]()
    assert torch.equal(first.colorize, second.colorize) and torch.equal(first.colorize, random_colors(5))
    assert len(random_colors(182).flatten(1).T.unique(dim=0)) == 182


def test_label_maps_come_back_in_the_colours_of_their_labels():
    model = BUILD["VQSegmentationModel"]().eval()
    model.decode = lambda quant: model.truth * 9.0 - 4.0  # logits of a perfect reconstruction
    batch = batches(1)[0]
    model.truth = model.get_input(batch, "segmentation")
    log = model.log_images(batch)
    torch.testing.assert_close(log["reconstructions"], log["inputs"])
    assert len(log["inputs"].permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)) == 5


def test_the_number_of_labels_must_be_that_of_the_channels():
    with pytest.raises(ValueError, match="n_labels: 7.*in_channels: 5"):
        VQSegmentationModel(7, ddconfig(5), BCE, 16, 4)


def test_ids_become_one_hot_on_the_device():
    model, batch = BUILD["VQSegmentationModel"](), batches(1)[0]
    ids = {"segmentation": batch["segmentation"].argmax(-1).to(torch.uint8)}
    assert torch.equal(model.get_input(ids, "segmentation"), model.get_input(batch, "segmentation"))
    fit(model, [ids, ids])
    assert model.batches_seen == 2
    with pytest.raises(ValueError, match="label id 9 is outside 0..4"):
        model.get_input({"segmentation": torch.tensor([[[0, 9]]])}, "segmentation")
