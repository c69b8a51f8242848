"""VQModel: images to codes and back, its keys, one training step by hand, validation over a whole set."""

import hashlib
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from taming.metrics import psnr, ssim
from taming.models.vqgan import VQModel

LOSS = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
DUMMY = "taming.modules.losses.DummyLoss"
DDCONFIG = dict(
    double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0,
)
PUBLISHED = dict(
    double_z=False, z_channels=256, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 1, 2, 2, 4],
    num_res_blocks=2, attn_resolutions=[16], dropout=0.0,
)


def make(loss=None, **arguments):
    """A tiny VQGAN (f = 4) whose codes are about as large as its latents."""
    params = dict(disc_start=0, disc_num_layers=1, disc_ndf=8, perceptual_weight=0.0) | (loss or {})
    arguments = dict(n_embed=32, embed_dim=4, legacy=False) | arguments
    model = VQModel(DDCONFIG, {"target": LOSS, "params": params}, **arguments)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    model.learning_rate = 1e-3
    return model


def batches(count, size=2, height=16, width=24):
    return [{"image": torch.rand(size, height, width, 3) * 2 - 1} for _ in range(count)]


def trainer(**arguments):
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 1, "num_sanity_val_steps": 0, **arguments},
    )


def fit(model, data, **arguments):
    trainer(**arguments).fit(model, DataLoader(data, batch_size=None))
    return model


def close(got, want):
    """Equal but for the rounding of z + (z_q - z), and of sums in another order."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# ---- images <-> codes


@torch.no_grad()
def test_encode_and_decode_any_multiple_of_f():
    model = make().eval()
    x = torch.rand(2, 3, 8, 20) * 2 - 1
    quant, loss, (_, _, indices) = model.encode(x)
    assert quant.shape == (2, 4, 2, 5) and indices.shape == (20,) and loss.ndim == 0
    images = model.decode(quant)
    assert images.shape == x.shape
    close(model.decode_code(indices.view(2, 2, 5)), images)
    close(model(x)[0], images)


@torch.no_grad()
def test_codes_of_a_square_grid_may_be_flat():
    model = make().eval()
    quant, _, (_, _, indices) = model.encode(torch.rand(2, 3, 16, 16))
    close(model.decode_code(indices.view(2, 16)), model.decode(quant))
    with pytest.raises(ValueError, match="10 indices form no square grid.*(B, h, w)"):
        model.decode_code(torch.zeros(2, 10, dtype=torch.int64))


@pytest.mark.parametrize(("size", "crop"), [((18, 23), "16x20"), ((16, 3), "16x4")])
def test_other_sizes_are_not_allowed_and_the_message_names_a_crop(size, crop):
    message = f"{size[0]}x{size[1]} pixels are not a multiple of f = 4: crop to {crop}"
    with pytest.raises(ValueError, match=message):
        make().encode_codes(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=message):
        make().get_images({"image": torch.zeros(1, *size, 3)})


@torch.no_grad()
def test_direct_calls_round_other_sizes_down_as_in_2021():
    model = make().eval()
    quant, _, _ = model.encode(torch.rand(1, 3, 18, 23))
    assert quant.shape[2:] == (4, 5)
    assert model(torch.rand(1, 3, 18, 23))[0].shape == (1, 3, 16, 20)


@torch.no_grad()
def test_codes_and_images_are_inverse_and_have_the_contracts_shapes():
    model = make().eval()
    x = torch.rand(2, 3, 16, 24)
    codes = model.encode_codes(x)
    assert codes.shape == (2, *model.code_shape(16, 24)) == (2, 4, 6) and codes.dtype == torch.int64
    close(model.decode_codes(codes), model.decode(model.encode(x)[0]))
    assert model.quantize.indices_to_codes(codes).shape == (2, model.quantize.code_dim, 4, 6)
    assert (model.pixel_range, model.image_size, model.codebook_size) == ((-1.0, 1.0), (16, 16), 32)


@torch.no_grad()
def test_remapped_model_round_trip(tmp_path):
    np.save(tmp_path / "used.npy", np.arange(32)[::-1].copy())
    model, plain = make(remap=str(tmp_path / "used.npy"), sane_index_shape=True).eval(), make().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "quantize.used"})
    x = torch.rand(2, 3, 8, 12)
    quant, _, (_, _, indices) = model.encode(x)
    assert torch.equal(31 - indices.flatten(), plain.encode(x)[2][2])
    close(model.decode_code(indices), model.decode(quant))
    assert (model.codebook_size, model.val_codes.codebook_size) == (32, 32)


def test_numbers_that_stage_two_asks_for():
    model = make()
    assert (model.factor, model.resolution, model.codebook_size, model.num_codes(16, 24)) == (4, 16, 32, 24)


def test_what_cannot_work_is_refused_when_built():
    with pytest.raises(ValueError, match="double_z must be False"):
        VQModel({**DDCONFIG, "double_z": True}, {"target": "taming.modules.losses.DummyLoss"}, 8, 4)
    with pytest.raises(ValueError, match="disc_conditional must be False"):
        make({"disc_conditional": True})


def test_a_model_that_is_only_used_cannot_be_trained():
    model = VQModel(DDCONFIG, {"target": "taming.modules.losses.DummyLoss"}, 8, 4)
    model.learning_rate = 1.0
    with pytest.raises(ValueError, match="DummyLoss, which has nothing to train"):
        model.configure_optimizers()


# ---- keys


def test_keys_and_shapes_are_those_of_the_published_checkpoint():
    """Of vqgan_imagenet_f16_1024, without the perceptual network, which is kept out of checkpoints now."""
    params = dict(disc_in_channels=3, disc_start=0, disc_weight=0.75, disc_num_layers=2)
    with torch.device("meta"):
        model = VQModel(PUBLISHED, {"target": LOSS, "params": params}, n_embed=1024, embed_dim=256)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert state["quantize.embedding.weight"] == (1024, 256)
    assert state["encoder.down.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert state["decoder.up.4.upsample.conv.weight"] == (512, 512, 3, 3)
    assert state["loss.discriminator.main.8.weight"] == (1, 256, 4, 4)
    lines = "\n".join(sorted(f"{key} {shape}" for key, shape in state.items()))
    assert len(state) == 359
    assert (
        hashlib.sha256(lines.encode()).hexdigest()
        == "97941ecda60ca1b83edd4139db14868e00c1ffbd5685cf1ec1080cee07e3641f"
    )


def test_old_arguments_have_their_old_places():
    dummy = {"target": "taming.modules.losses.DummyLoss"}
    model = VQModel(DDCONFIG, dummy, 8, 4, None, [], "segmentation", 5, "val/rec_loss", None, True)
    assert (model.image_key, model.monitor) == ("segmentation", "val/rec_loss")
    assert model.quantize.sane_index_shape
    assert model.state_dict()["colorize"].shape == (3, 5, 1, 1)
    assert model.quantize.legacy and model.quantize.beta == 0.25 and model.betas == (0.5, 0.9)


# ---- training


def test_a_training_step_is_two_adam_steps_from_one_forward():
    data = batches(1)
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    fit(model, data)
    assert (len(calls), model.batches_seen) == (1, 1)

    twin.train()
    x = data[0]["image"].permute(0, 3, 1, 2)
    rec, codebook_loss = twin(x)
    generator = [*twin.generator_parameters()]
    discriminator = [*twin.loss.discriminator.parameters()]
    optimizers = [torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.9)) for p in (generator, discriminator)]
    loss, _ = twin.loss(codebook_loss, x, rec, 0, 0, last_layer=twin.decoder.conv_out.weight)
    disc_loss, _ = twin.loss(codebook_loss, x, rec, 1, 0)
    loss.backward()
    disc_loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=2e-5, msg=key)
    assert len({id(p) for p in generator + discriminator}) == len([*twin.parameters()])


def test_the_discriminator_waits_for_its_start():
    model = make({"disc_start": 2})
    before = state_of(model)
    fit(model, batches(2))
    discriminator = [key for key in before if key.startswith("loss.")]
    assert len(discriminator) > 3
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in discriminator)
    assert not torch.equal(model.state_dict()["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    fit(model, batches(1))  # the third batch
    assert not torch.equal(model.state_dict()[discriminator[0]], before[discriminator[0]])


def test_two_accumulated_batches_are_one_of_double_size():
    data = batches(2)
    model, twin = make({"disc_start": 100}), make({"disc_start": 100})
    twin.load_state_dict(model.state_dict())
    start = state_of(model)
    model.accumulate_grad_batches = 2
    fit(model, data)
    fit(twin, [{"image": torch.cat([batch["image"] for batch in data])}])
    assert model.batches_seen == twin.batches_seen == 1
    for key in ("decoder.conv_out.weight", "encoder.conv_in.weight", "quant_conv.weight"):
        moved, wanted = (m.state_dict()[key] - start[key] for m in (model, twin))
        assert (moved - wanted).norm() < 0.02 * wanted.norm() and wanted.norm() > 0


def test_clipping_bounds_the_norm_of_what_is_stepped_with():
    norms = []
    for limit in (None, 1e-3):
        model = make()
        model.gradient_clip_val = limit
        optimizers = [torch.optim.SGD(p, lr=1.0) for p in (
            [*model.generator_parameters()], [*model.loss.discriminator.parameters()]
        )]
        model.learning_rate, model.configure_optimizers = 1.0, lambda given=optimizers: given
        before = state_of(model)
        fit(model, batches(1))
        parts = ([], [])
        for name, parameter in model.named_parameters():
            parts[name.startswith("loss.")].append((parameter.detach() - before[name]).flatten())
        norms.append([float(torch.cat(part).norm()) for part in parts])
    assert min(norms[0]) > 2e-3
    assert norms[1] == pytest.approx([1e-3, 1e-3], rel=0.01)  # each network by itself


def test_schedule_follows_the_batches_seen():
    params = dict(warm_up_steps=4, max_decay_steps=10, lr_start=0.0, lr_max=1.0, lr_min=0.1)
    target = "taming.lr_scheduler.LambdaWarmUpCosineScheduler"
    model = make(scheduler_config={"target": target, "params": params})
    model.batches_seen = 2
    fit(model, batches(1))
    rates = [group["lr"] for optimizer in model.optimizers() for group in optimizer.param_groups]
    assert rates == pytest.approx([5e-4, 5e-4])
    still = make(scheduler_config={"target": target, "params": params})
    before = state_of(still)
    fit(still, batches(1))  # at batch 0 the factor is 0
    assert torch.equal(still.decoder.conv_out.weight, before["decoder.conv_out.weight"])


# ---- validation


def test_validation_measures_the_whole_set():
    model = make({"disc_start": 5})
    data = [*batches(2), *batches(1, size=1)]  # the last batch is smaller
    (metrics,) = trainer().validate(model, DataLoader(data, batch_size=None), verbose=False)
    model.eval()
    x = torch.cat([batch["image"] for batch in data]).permute(0, 3, 1, 2)
    with torch.no_grad():
        quant, codebook_loss, (_, _, indices) = model.encode(x)
        rec = model.decode(quant)
    assert metrics["val/rec_loss"] == pytest.approx(float((x - rec).abs().mean()), rel=1e-4)
    assert metrics["val/quant_loss"] == pytest.approx(float(codebook_loss), rel=1e-4)
    assert metrics["val/psnr"] == pytest.approx(float(psnr(x, rec).mean()), rel=1e-4)
    assert metrics["val/ssim"] == pytest.approx(float(ssim(x, rec).mean()), rel=1e-3)
    counts = indices.bincount(minlength=32).double()
    p = counts[counts > 0] / counts.sum()
    assert metrics["val/codebook_usage_percent"] == pytest.approx(100 * len(p) / 32)
    perplexity = math.exp(-float((p * p.log()).sum()))
    assert metrics["val/codebook_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert "val/disc_loss" not in metrics


def test_training_goes_on_after_validation():
    model = make()
    loader = DataLoader(batches(2), batch_size=None)
    trainer(num_sanity_val_steps=1, max_epochs=2).fit(model, loader, loader)
    assert model.batches_seen == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_pictures():
    model = make().eval()
    batch = batches(1)[0]
    pictures = model.log_images(batch)
    assert list(pictures) == ["inputs", "reconstructions"]
    assert torch.equal(pictures["inputs"], batch["image"].permute(0, 3, 1, 2))
    close(pictures["reconstructions"], model(pictures["inputs"])[0])
    labels = torch.arange(6).view(1, 2, 3)
    colored = model.to_rgb(torch.nn.functional.one_hot(labels).permute(0, 3, 1, 2))
    assert colored.shape == (1, 3, 2, 3) and (colored.min(), colored.max()) == (-1.0, 1.0)
    assert len({tuple(color) for color in colored[0].flatten(1).t().tolist()}) == 6  # one for each label


def test_networks_of_another_pixel_range_take_and_give_images_in_ours():
    """The same weights see [0, 1] inside; outside, images are in [-1, 1] for both, tiled as well."""
    unit = make().eval()
    ddconfig = {**DDCONFIG, "pixel_range": [0.0, 1.0]}
    ranged = VQModel(ddconfig, {"target": DUMMY}, n_embed=32, embed_dim=4).eval()
    ranged.load_state_dict(unit.state_dict(), strict=False)
    assert ranged.pixel_range == (0.0, 1.0)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(ranged.encode_to_prequant(x), unit.encode_to_prequant((x + 1) / 2))
    codes = ranged.encode_codes(x)
    want = unit.decode_codes(codes) * 2 - 1
    close(ranged.decode_codes(codes), want)
    ranged.decode_memory = 0
    close(ranged.decode_codes(codes), want)


def test_other_networks_take_the_arguments_of_ddconfig_and_their_own():
    larger = make(decoder_config={"params": {"num_res_blocks": 3}})
    assert (larger.encoder.num_res_blocks, larger.decoder.num_res_blocks) == (1, 3)
    named = make(encoder_config={"target": "taming.modules.diffusionmodules.model.Encoder"})
    assert named.state_dict().keys() == make().state_dict().keys()


def test_convolutions_between_networks_and_codes():
    plain, wide = make(quant_conv_kernel=0, embed_dim=8), make(quant_conv_kernel=3)
    names = make().state_dict().keys()
    assert plain.state_dict().keys() == {name for name in names if "quant_conv" not in name}
    assert wide.quant_conv.weight.shape == (4, 8, 3, 3) and wide.post_quant_conv.weight.shape == (8, 4, 3, 3)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for model in (plain, wide):
        assert model.eval().decode_codes(model.encode_codes(x)).shape == x.shape
    with pytest.raises(ValueError, match="z_channels and embed_dim differ \\(8 and 4\\)"):
        make(quant_conv_kernel=0)
    with pytest.raises(ValueError, match="quant_conv_kernel: 2 is even"):
        make(quant_conv_kernel=2)
