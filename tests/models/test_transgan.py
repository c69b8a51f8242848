"""TransGAN: losses, the step of each network, schedules, running means, exact resume, bad input."""

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from taming.config import ConfigError, instantiate_from_config
from taming.models.transgan import TransGAN
from taming.modules.losses.adversarial import DISCRIMINATOR_LOSSES, generator_loss, gradient_penalty
from taming.modules.transgan.discriminator import ViTDiscriminator
from tests.ranks import main_on_ranks

GENERATOR = dict(resolution=16, dim=64, depths=[1, 1, 1], latent_dim=16)
CO_TRAINED = GENERATOR | dict(entry_stage=2)
DISCRIMINATOR = dict(resolution=16, dim=32, depth=2)


def gan(**params):
    torch.manual_seed(0)
    model = TransGAN(**{"generator": GENERATOR, "discriminator": DISCRIMINATOR, "augment": {}} | params)
    model.learning_rate = 1e-3
    return model


def images(n=4, size=16):
    return torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(n)) * 2 - 1


class Watch(pl.Callback):
    """Keep a copy of both networks before training and after each batch, and the radius of the batch."""

    def __init__(self):
        self.states, self.radii = [], []

    def on_train_start(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        self.radii.append(pl_module.radius())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        assert all(p.grad is None for p in pl_module.parameters()) or pl_module._accumulated

    def moved(self, batch, network):
        before, after = self.states[batch : batch + 2]
        return any(
            not torch.equal(before[name], after[name]) for name in before if name.startswith(f"{network}.")
        )


def fit(model, batches=5, epochs=1, ckpt_path=None, **arguments):
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[watch], num_sanity_val_steps=0,
    )
    for name, value in arguments.items():
        setattr(model, name, value)
    data = DataLoader([{"image": images(2 + i % 2)} for i in range(batches)], batch_size=None)
    trainer.fit(model.train(), data, data, ckpt_path=ckpt_path, weights_only=False)
    return trainer, watch


# ---- frozen parts


@pytest.mark.parametrize("name", ["discriminator.blocks", "generator.blocks.0"])
def test_frozen_parts_of_both_networks_stay(name):
    model = gan(n_critic=1)
    model.freeze_parts(name)
    _, watch = fit(model, batches=3)
    assert any(key.startswith(f"{name}.") for key in watch.states[0])
    assert not any(watch.moved(batch, name) for batch in range(3))
    assert watch.moved(0, "generator") and watch.moved(0, "discriminator")
    assert not any(p.requires_grad for p in model.get_submodule(name).parameters())


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_a_whole_network_cannot_be_frozen(name):
    with pytest.raises(ValueError, match=f"freeze: nothing of the {name} is left to train"):
        gan().freeze_parts([name])


# ---- losses


def test_penalty_of_a_linear_discriminator():
    w = torch.randn(3 * 16 * 16)
    for phi in (1.0, 750.0):
        penalty = gradient_penalty(
            lambda x, w=w: x.flatten(1) @ w, torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), phi
        )
        assert penalty.item() == pytest.approx(((w.norm().item() - phi) / phi) ** 2, rel=1e-5)


def test_the_penalty_has_a_gradient_that_is_right():
    """Against differences of the penalty itself, in float32: the second derivative of all layers."""
    torch.manual_seed(0)
    net = ViTDiscriminator(16, 32, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    real, fake = torch.randn(2, 4, 3, 16, 16)

    def penalty():
        torch.manual_seed(1)
        return gradient_penalty(net, real, fake)

    with torch.autocast("cpu", torch.bfloat16):
        penalty().backward()
    weight = net.blocks[0].attn.qkv.weight
    direction = weight.grad / weight.grad.norm()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    values = []
    for step in (2e-3, -2e-3):
        with torch.no_grad():
            weight.add_(step * direction)
            values.append(penalty().item())
            weight.sub_(step * direction)
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(weight.grad.norm().item(), rel=0.05)


def test_losses():
    real, fake = torch.tensor([[2.0], [-0.5]]), torch.tensor([[0.5], [-3.0]])
    values = {kind: loss(real, fake).item() for kind, loss in DISCRIMINATOR_LOSSES.items()}
    assert values["wgangp"] == pytest.approx(-1.25 - 0.75)
    assert values["hinge"] == pytest.approx(0.5 * (0.75 + 0.75))
    labels = torch.cat((torch.ones(2, 1), torch.zeros(2, 1)))
    logistic = F.binary_cross_entropy_with_logits(torch.cat((real, fake)), labels).item()
    assert values["logistic"] == pytest.approx(logistic)
    assert generator_loss("wgangp", fake) == generator_loss("hinge", fake) == 1.25
    want = F.binary_cross_entropy_with_logits(fake, torch.ones(2, 1))
    assert generator_loss("logistic", fake).item() == pytest.approx(want.item())


def test_the_loss_of_the_discriminator_is_the_sum_of_its_terms():
    model = gan(augment=None, gp_weight=7.0, drift_weight=3.0)
    log = model.discriminator_losses(images().permute(0, 3, 1, 2))
    real, fake = log["train/logits_real"], log["train/logits_fake"]
    want = fake - real + 7.0 * log["train/gp"] + 3.0 * real**2  # the square of the mean
    assert log["train/d_loss"].item() == pytest.approx(want.item(), rel=1e-5)


# ---- the step


@pytest.mark.parametrize("params", [
    {}, dict(augment=None), dict(loss="hinge", gp_weight=0.0), dict(loss="logistic", gp_weight=1.0),
    dict(generator=CO_TRAINED, sr_weight=50.0),
], ids=str)
def test_each_step_moves_its_network(params):
    model = gan(n_critic=3, **params)
    trainer, watch = fit(model, gradient_clip_val=5.0)
    assert [watch.moved(i, "discriminator") for i in range(5)] == [True] * 5
    for network in ("generator", "generator_ema"):
        assert [watch.moved(i, network) for i in range(5)] == [True, False, False, True, False]
    assert model.batches_seen == 5 and model.generator_steps == 2
    assert math.isfinite(trainer.callback_metrics["val/loss"])
    assert ("train/sr_mse" in trainer.callback_metrics) == ("sr_weight" in params)


def test_running_means():
    model = gan(n_critic=1, ema_decay=0.75)
    _, watch = fit(model, batches=3)
    key = "upsample_blocks.0.0.mlp.fc1.weight"
    mean = watch.states[0][f"generator.{key}"]
    for state in watch.states[1:]:
        mean = 0.75 * mean + 0.25 * state[f"generator.{key}"]
    torch.testing.assert_close(model.generator_ema.state_dict()[key], mean)
    generator = torch.Generator().manual_seed(3)
    samples = model.sample(2, generator)
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(samples, model.generator_ema(z)) and not torch.equal(samples, model.generator(z))
    assert samples.shape == (2, 3, 16, 16)


def test_windows_grow_by_epoch():
    model = gan(locality=[(1, 1), (3, 4)])
    _, watch = fit(model, batches=2, epochs=4)
    assert watch.radii == [1, 1, 4, 4, 4, 4, None, None]


def test_accumulated_batches_are_one_step():
    model = gan(n_critic=2)
    _, watch = fit(model, batches=6, accumulate_grad_batches=2)
    assert [watch.moved(i, "discriminator") for i in range(6)] == [False, True] * 3
    assert [watch.moved(i, "generator") for i in range(6)] == [False, True, False, False, False, True]
    assert model.batches_seen == 3 and model.generator_steps == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_is_exact(tmp_path, accumulate):
    params = dict(
        n_critic=2, generator=CO_TRAINED, sr_weight=50.0, locality=[(1, 2)], augment={"cutout_p": 0.5},
    )
    whole = gan(**params)
    fit(whole, batches=4, epochs=2, accumulate_grad_batches=accumulate)
    half = gan(**params)
    trainer, _ = fit(half, batches=4, accumulate_grad_batches=accumulate)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = gan(**params)
    fit(resumed, batches=4, epochs=2, ckpt_path=tmp_path / "half.ckpt", accumulate_grad_batches=accumulate)
    assert resumed.generator_steps == whole.generator_steps > half.generator_steps
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_super_resolution_learns():
    """Sixteen images, by the second task alone: the error falls to a fifth."""
    model = gan(generator=CO_TRAINED, sr_weight=50.0)
    ramp = torch.linspace(-1, 1, 16)
    x = torch.stack([torch.roll(ramp, k).expand(3, 16, 16) for k in range(16)])
    low = F.adaptive_avg_pool2d(x, 8)
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=5e-3)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = F.mse_loss(model.generator.super_resolve(low), x)
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 5


def test_log_images():
    shown = gan().log_images({"image": images(3)})
    assert {name: tuple(value.shape) for name, value in shown.items()} == {
        "inputs": (3, 3, 16, 16), "samples": (3, 3, 16, 16),
    }
    shown = gan(generator=CO_TRAINED, sr_weight=1.0).log_images({"image": images(3)})
    assert [*shown] == ["inputs", "super_resolution", "samples"]


@pytest.mark.slow
def test_processes_stay_alike(tmp_path):
    """Plain ddp: both backward passes of a batch, with accumulation, reach all processes."""
    networks = ["generator.dim=64", "generator.depths=[1,1,1]", "discriminator.dim=32", "n_critic=1"]
    main_on_ranks(
        2, "-b", "configs/transgan/transgan_landscapes.yaml", "-t", "-l", tmp_path / "logs", "--max_steps", 2,
        "--accumulate_grad_batches", 2, "data.params.batch_size=2",
        "data.params.train.params.length=32", "data.params.validation.params.length=4",
        *(f"model.params.{word}" for word in networks),
        "lightning.callbacks.record.target=tests.tiny.Record",
        f"lightning.callbacks.record.params.folder={tmp_path}",
    )
    one, two = (torch.load(tmp_path / f"weights_2_{rank}.pt", weights_only=True) for rank in range(2))
    assert any(key.startswith("generator_ema.") for key in one)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


# ---- bad input


def test_why_a_fused_kernel_is_not_possible_with_a_penalty():
    """The error is about something real: torch has no second derivative of its kernel."""
    fused = DISCRIMINATOR | dict(fused_attention=True)
    with pytest.raises(ValueError, match="differentiates the discriminator twice.* fused_attention: false"):
        gan(discriminator=fused)
    model = gan(discriminator=fused, loss="hinge", gp_weight=0.0, drift_weight=0.0)
    fit(model, batches=1)
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient_penalty(model.discriminator, x, -x).backward()


@pytest.mark.parametrize(("params", "message"), [
    (dict(loss="lsgan"), "loss: 'lsgan'"),
    (dict(gp_weight=0.0), "without a bound"),
    (dict(sr_weight=50.0), "sr_weight: 50.0 and generator.entry_stage: None do not go together"),
    (dict(generator=CO_TRAINED), "sr_weight: 0.0 and generator.entry_stage: 2 do not go together"),
    (dict(discriminator=DISCRIMINATOR | dict(resolution=32)), "set both to the size of the images"),
    (dict(locality=[(5, 4), (3, 6)]), "epochs rise and windows grow"),
    (dict(n_critic=0), "n_critic: 0; it must be a whole number of at least 1"),
    (dict(augment=dict(polcy="color")), "did you mean policy"),
    (dict(augment=dict(policy="colour")), "names 'colour'"),
    (dict(generator=GENERATOR | dict(depths=[])), "depths"),
    (dict(generator=GENERATOR | dict(resolution=18)), "not a multiple of 4"),
])
def test_bad_settings(params, message):
    config = {"generator": GENERATOR, "discriminator": DISCRIMINATOR} | params
    with pytest.raises((ConfigError, ValueError), match=message):
        instantiate_from_config({"target": "taming.models.transgan.TransGAN", "params": config})


def test_bad_images():
    model = gan()
    with pytest.raises(ValueError, match="images of 16x32 pixels .* made for 16x16"):
        model.check_batch({"image": torch.zeros(2, 16, 32, 3)})
    with pytest.raises(ValueError, match="3 channels, got 1"):
        model.check_batch({"image": torch.zeros(2, 16, 16, 1)})
    model.check_batch({"image": images()})


def test_the_networks_are_all_that_is_saved():
    assert {key.split(".")[0] for key in gan().state_dict()} == {
        "generator", "discriminator", "generator_ema",
    }
    keys = gan(generator=CO_TRAINED, sr_weight=1.0).state_dict()
    assert "generator.from_rgb.weight" in keys and "generator_ema.from_rgb.weight" not in keys
    assert isinstance(gan().augment, nn.Module)


# ---- other networks


def test_convolutional_networks_take_the_place_of_transformers():
    """With the size of images and latents that the settings of the transformers give."""
    home = "taming.modules.transgan.convolutional"
    model = gan(
        generator_config={"target": f"{home}.ConvGenerator", "params": {"channels": 64}},
        discriminator_config={"target": f"{home}.ConvDiscriminator", "params": {"channels": 4}},
    )
    assert model.latent_dim == 16 and model.image_size == (16, 16)
    trainer, watch = fit(model, batches=3, n_critic=2)
    assert all(watch.moved(batch, "discriminator") for batch in range(3))
    assert [watch.moved(batch, "generator") for batch in range(3)] == [True, False, True]
    assert model.sample(2).shape == (2, 3, 16, 16) and trainer.callback_metrics["val/loss"].isfinite()
    with pytest.raises(ValueError, match="need both|needs both"):
        gan(generator_config={"target": f"{home}.ConvGenerator", "params": {"channels": 64}}, sr_weight=50.0)
