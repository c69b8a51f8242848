"""Adversarial losses beside those of 2021: LeCam, R1, non-saturating, blur, augmentation, named networks."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from taming.models.autoencoder import build_loss
from taming.modules.diffusionmodules.model import Decoder
from taming.modules.discriminator.blur import gaussian_blur
from taming.modules.discriminator.stylegan import StyleGANDiscriminator
from taming.modules.losses.adversarial import generator_loss, r1_penalty
from taming.modules.losses.lecam import LeCam
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, hinge_d_loss, vanilla_d_loss
from tests.ranks import on_two_ranks

GOLDEN = Path(__file__).parents[1] / "golden"
TARGET = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"


def make(**arguments):
    return VQLPIPSWithDiscriminator(**{
        "disc_start": 0, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0,
        "disc_adaptive": False, **arguments,
    })


def images(count=2, side=16):
    return [torch.rand(count, 3, side, side) * 2 - 1 for _ in range(2)]


def run(loss, optimizer_idx, x, rec, step=0):
    return loss(torch.zeros(()), x, rec, optimizer_idx, step)


# ---- the numbers of SEED-Voken


@pytest.mark.parametrize("case", ["ibq", "open_magvit2"])
def test_golden(case):
    """Losses of one batch in training: the generator's with a fixed weight, the discriminator's with LeCam.

    Neither depends on the order, since no step lies between them.
    """
    tensors = load_file(GOLDEN / f"{case}_losses.safetensors")
    loss = VQLPIPSWithDiscriminator(
        0, disc_num_layers=2, disc_ndf=8, disc_weight=0.1, disc_adaptive=False, lecam_weight=0.05,
        perceptual_weight=0.0, gen_loss="non_saturating",
    ).train()
    prefix = "state/loss.discriminator."
    loss.discriminator.load_state_dict({
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    })
    x, rec = tensors["in/x"], tensors["out/decoded"].requires_grad_()
    want = {key.removeprefix("out/"): value for key, value in tensors.items() if key.startswith("out/")}
    if case == "ibq":
        codebook_loss = want["quant_loss"] + 0.05 * want["entropy_loss"]
    else:
        codebook_loss = 0.1 * want["train.entropy_aux_loss"] + 0.25 * want["train.commitment"]
    disc_loss, disc_log = loss(codebook_loss, x, rec, 1, 0)
    gen_loss, log = loss(codebook_loss, x, rec, 0, 0)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(disc_loss.detach(), want["train.disc_loss"])
    close(gen_loss.detach(), want["train.gen_loss"])
    close(disc_log["train/lecam_loss"], want["log_d.lecam_loss"])
    close(disc_log["train/logits_real"], want["log_d.logits_real"])
    close(disc_log["train/logits_fake"], want["log_d.logits_fake"])
    close(log["train/nll_loss"], want["log_g.nll_loss"])
    close(0.1 * log["train/g_loss"], want["log_g.g_loss"])  # which they log weighted
    if case == "open_magvit2":
        close(disc_log["train/disc_loss"], want["log_d.non_saturated_d_loss"])


def test_golden_gradient_of_the_last_layer():
    tensors = load_file(GOLDEN / "ibq_losses.safetensors")
    decoder = Decoder(
        ch=32, out_ch=3, ch_mult=[2, 1], num_res_blocks=1, attn_resolutions=[8], dropout=0.0, in_channels=3,
        resolution=16, z_channels=32,
    )
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    loss = make(disc_num_layers=2, disc_weight=0.1, gen_loss="non_saturating")
    for module, prefix in ((decoder, "decoder."), (loss, "loss.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    latents = F.conv2d(tensors["out/quant"], state["post_quant_conv.weight"], state["post_quant_conv.bias"])
    run(loss, 0, tensors["in/x"], decoder(latents))[0].backward()
    want = tensors["out/grad.decoder.conv_out.weight"]
    got = decoder.conv_out.weight.grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


# ---- LeCam


def test_lecam_follows_the_means_and_pulls_the_logits_to_them():
    lecam = LeCam(decay=0.75)
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-2.0, 0.0, -1.0])
    want = (F.relu(real - -0.25).square().mean() + F.relu(0.5 - fake).square().mean()).detach()
    value = lecam(real, fake)
    torch.testing.assert_close(value.detach(), want)
    assert (float(lecam.real), float(lecam.fake)) == (0.5, -0.25)
    lecam(real.detach(), fake)  # another batch before the backward pass
    value.backward()
    torch.testing.assert_close(real.grad, torch.tensor([1.25, 3.25]))
    assert float(lecam.real) == 0.75 * 0.5 + 0.25 * 2.0


def test_lecam_is_part_of_the_state_only_where_it_is_used():
    x, rec = images()
    loss = make(lecam_weight=0.5)
    total, log = run(loss, 1, x, rec)
    torch.testing.assert_close(total.detach(), log["train/disc_loss"] + 0.5 * log["train/lecam_loss"])
    other = make(lecam_weight=0.5)
    other.load_state_dict(loss.state_dict())
    assert float(other.lecam.real) == float(loss.lecam.real) != 0.0
    assert not any("lecam" in key for key in make().state_dict())
    before = float(loss.lecam.real)
    _, log = run(loss.eval(), 1, x, rec)
    assert float(loss.lecam.real) == before and "train/lecam_loss" not in log  # validation teaches nothing


def lecam_on_half(rank, real, fake):
    lecam = LeCam(decay=0.5)
    real, fake = (x.chunk(2)[rank].clone().requires_grad_() for x in (real, fake))
    lecam(real.detach(), fake.detach())
    value = lecam(real, fake)
    value.backward()
    return {"state": lecam.state_dict(), "value": value.detach(), "gradient": real.grad / 2}


def test_two_processes_have_the_means_of_the_joined_batch(tmp_path):
    real, fake = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    one = LeCam(decay=0.5)
    one(real, fake)
    value = one(whole := real.clone().requires_grad_(), fake)
    value.backward()
    ranks = on_two_ranks(lecam_on_half, tmp_path / "ranks", real, fake)
    for found in ranks:
        torch.testing.assert_close(found["state"], one.state_dict())
    torch.testing.assert_close((ranks[0]["value"] + ranks[1]["value"]) / 2, value.detach())
    torch.testing.assert_close(torch.cat([found["gradient"] for found in ranks]), whole.grad)


# ---- R1


def test_r1_of_a_linear_discriminator_is_half_the_squared_norm():
    layer = nn.Linear(12, 1)
    value = r1_penalty(lambda x: layer(x.flatten(1)), torch.rand(3, 3, 2, 2))
    torch.testing.assert_close(value, 0.5 * layer.weight.square().sum())
    value.backward()
    torch.testing.assert_close(layer.weight.grad, layer.weight.detach())  # it has a gradient itself


def test_r1_comes_every_so_many_batches_with_as_large_a_weight():
    x, rec = images()
    loss = make(r1_weight=0.5, r1_every=4, use_actnorm=True)
    run(loss, 1, x, rec)
    total, log = run(loss, 1, x, rec, step=8)
    want = r1_penalty(loss.discriminator, x).detach()
    torch.testing.assert_close(log["train/r1_penalty"], want)
    torch.testing.assert_close(total.detach(), log["train/disc_loss"] + 0.5 * 4 * want)
    gradient = torch.autograd.grad(total, loss.discriminator.main[0].weight, retain_graph=True)[0]
    without = torch.autograd.grad(run(loss, 1, x, rec, step=9)[0], loss.discriminator.main[0].weight)[0]
    assert gradient.isfinite().all() and not torch.allclose(gradient, without)
    assert all("train/r1_penalty" not in run(loss, 1, x, rec, step=step)[1] for step in (9, 10, 11))


@pytest.mark.parametrize("build", [
    partial(StyleGANDiscriminator, ndf=4, n_layers=2), lambda: make().discriminator,
], ids=["StyleGAN", "PatchGAN"])
def test_the_gradient_of_r1_is_that_of_differences(build):
    """In float64, for one weight: the double backward of our layers."""
    network = build().double().eval()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    weight = next(network.parameters())

    def value():
        gradient = torch.autograd.grad(
            network(y := x.clone().requires_grad_()).flatten(1).mean(1).sum(), y, create_graph=True)[0]
        return 0.5 * gradient.square().sum((1, 2, 3)).mean()

    got = torch.autograd.grad(value(), weight)[0].flatten()[0]
    values = []
    for step in (1e-7, -1e-7):
        with torch.no_grad():
            weight.view(-1)[0] += step
        values.append(value().detach())
        with torch.no_grad():
            weight.view(-1)[0] -= step
    torch.testing.assert_close(got, (values[0] - values[1]) / 2e-7, rtol=1e-3, atol=1e-8)


class Fused(nn.Module):
    """Logits by fused attention, which has no second derivative."""

    def __init__(self, input_nc=3):
        super().__init__()
        self.project = nn.Conv2d(input_nc, 8, 4, 4)

    def forward(self, x):
        tokens = self.project(x).flatten(2).transpose(1, 2).contiguous()[:, None]  # (B, 1, N, 8)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 3))


def test_r1_with_a_discriminator_that_cannot_be_differentiated_twice():
    frozen = {"target": "taming.modules.discriminator.features.FeatureDiscriminator",
              "params": {"network": "dinov2_small"}}
    with pytest.raises(ValueError, match="r1_weight: R1 differentiates the discriminator twice"):
        build_loss({"target": TARGET, "params": {"disc_start": 0, "r1_weight": 1.0, "disc_config": frozen}})
    loss = make(disc_config=Fused, r1_weight=1.0, disc_num_layers=3, disc_ndf=64)
    with pytest.raises(ValueError, match="r1_weight: R1 differentiates.*Set r1_weight: 0"):
        loss.check_discriminator(images()[0])  # before training
    make(disc_config=Fused, disc_num_layers=3, disc_ndf=64).check_discriminator(images()[0])


# ---- the other losses


def test_non_saturating():
    x, rec = images()
    loss = make(disc_loss="non_saturating").eval()
    real, fake = loss.discriminator(x), loss.discriminator(rec)
    real, fake = (logits.mean((1, 2, 3)) for logits in (real, fake))  # of each image
    torch.testing.assert_close(run(loss, 1, x, rec)[0], vanilla_d_loss(real, fake))
    _, log = run(loss, 0, x, rec)
    want = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)).detach()
    torch.testing.assert_close(log["train/g_loss"], want)
    assert float(generator_loss("vanilla", fake).detach()) == pytest.approx(-float(fake.detach().mean()))
    both = make(disc_loss="hinge", gen_loss="non_saturating").eval()
    want = hinge_d_loss(both.discriminator(x), both.discriminator(rec))
    torch.testing.assert_close(run(both, 1, x, rec)[0], want)
    with pytest.raises(ValueError, match="disc_loss: 'non_saturated' is unknown .did you mean non_saturat"):
        make(disc_loss="non_saturated")
    with pytest.raises(ValueError, match="gen_loss: 'hinge' is unknown; choose linear or non_saturating"):
        make(gen_loss="hinge")


def test_everything_is_float32_under_bfloat16():
    x, rec = images()
    loss = make(lecam_weight=0.1, r1_weight=0.1, disc_loss="non_saturating", disc_blur=1.0,
                disc_augment={"policy": "translation"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for index in (0, 1):
            total, log = run(loss, index, x, rec.requires_grad_())
            assert total.dtype == torch.float32 and total.isfinite()
            assert all(value.dtype == torch.float32 for value in log.values() if torch.is_tensor(value))
        total.backward()
    assert loss.lecam.real.dtype == torch.float32


# ---- what the discriminator sees


def seen_by(loss):
    """A list that gets each input of the discriminator."""
    inputs = []
    loss.discriminator.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    return inputs


def test_the_blur_fades_and_is_for_training_alone():
    x, rec = images()
    loss = make(disc_start=10, disc_blur=2.0, disc_blur_batches=4)
    assert [loss.blur_at(step) for step in (10, 11, 13, 14, 99)] == [2.0, 1.5, 0.5, 0.0, 0.0]
    assert make(disc_blur=2.0).blur_at(99) == 2.0
    inputs = seen_by(loss)
    run(loss, 1, x, rec, step=11)
    torch.testing.assert_close(inputs[0], gaussian_blur(x, 1.5))
    torch.testing.assert_close(inputs[1], gaussian_blur(rec, 1.5))
    run(loss, 1, x, rec, step=20)
    run(loss.eval(), 1, x, rec, step=11)
    assert all(torch.equal(seen, x) for seen in (inputs[2], inputs[4]))


def test_images_are_augmented_for_both_networks_in_training():
    x, rec = images()
    loss = make(disc_augment={"policy": "translation,cutout"})
    inputs = seen_by(loss)
    run(loss, 0, x, rec.requires_grad_())[0].backward()
    run(loss, 1, x, rec)
    assert not any(torch.equal(seen, y) for seen, y in zip(inputs, (rec, x, rec), strict=True))
    assert rec.grad.abs().sum() > 0 and all((seen == 0).any() for seen in inputs)
    run(loss.eval(), 1, x, rec)
    assert torch.equal(inputs[3], x)
    with pytest.raises(ValueError, match="policy: 'colour' names 'colour'"):
        make(disc_augment={"policy": "colour"})


# ---- networks that a configuration names


DISCRIMINATORS = {
    "stylegan.StyleGANDiscriminator": {"ndf": 4, "n_layers": 2},
    "blur.BlurPoolDiscriminator": {"ndf": 4, "n_layers": 2},
    "features.FeatureDiscriminator": {
        "network": "efflite0", "random_weights": True, "side": 32, "width": 8,
    },
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_discriminator_is_named_in_the_configuration(name):
    config = {"target": f"taming.modules.discriminator.{name}", "params": DISCRIMINATORS[name]}
    loss = build_loss({"target": TARGET, "params": {
        "disc_start": 0, "perceptual_weight": 0.0, "disc_adaptive": False, "disc_config": config,
        "r1_weight": 0.1, "lecam_weight": 0.1}})
    assert type(loss.discriminator).__name__ == name.split(".")[1] and loss.discriminator.input_nc == 3
    x, rec = images()
    loss.check_discriminator(x)
    total = run(loss, 0, x, rec.requires_grad_())[0] + run(loss, 1, x, rec)[0]
    total.backward()
    assert rec.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.discriminator.parameters())
    torch.manual_seed(1)
    fresh = loss.build_discriminator()
    loss.discriminator.load_state_dict(fresh.state_dict())  # as Health restarts it
    assert type(copy.deepcopy(loss).build_discriminator()) is type(fresh)


def test_other_channels_come_from_the_images():
    config = {"target": "taming.modules.discriminator.stylegan.StyleGANDiscriminator", "params": {"ndf": 4}}
    loss = build_loss({"target": TARGET, "params": {
        "disc_start": 0, "disc_in_channels": 5, "disc_config": config}})
    assert loss.discriminator.from_rgb.in_channels == 5


@pytest.mark.parametrize(("params", "message"), [
    ({"disc_config": {"target": "taming.modules.discriminator.stylegan.StyleGAN"}}, "StyleGANDiscriminator"),
    ({"disc_config": {"params": {}}}, 'Expected key "target"'),
    ({"disc_config": {"target": "taming.modules.discriminator.stylegan.StyleGANDiscriminator",
                      "params": {"ndff": 4}}}, "does not accept 'ndff' .did you mean ndf"),
    ({"disc_config": {"target": "taming.modules.discriminator.stylegan.StyleGANDiscriminator"},
      "disc_num_layers": 2}, "leave them out, or at 3, .* as disc_config.params"),
    ({"disc_augment": {"polcy": "color"}}, "does not accept 'disc_augment.polcy' .did you mean policy"),
    ({"lecam_decay": 1.5}, "lecam_decay: 1.5; it must be a number from 0 to 1"),
    ({"r1_every": 0}, "r1_every: 0; it must be"),
    ({"perceptual_config": {"target": "taming.nothing.X"}}, "taming.nothing"),
])
def test_bad_settings(params, message):
    with pytest.raises(ValueError, match=message):
        build_loss({"target": TARGET, "params": {"disc_start": 0, **params}})


def test_in_python_a_network_is_given_by_what_makes_it():
    with pytest.raises(ValueError, match="disc_config: .*build_loss; in Python give the class"):
        make(disc_config={"target": "x"}, disc_num_layers=3, disc_ndf=64)
    loss = make(disc_config=partial(StyleGANDiscriminator, ndf=4), disc_num_layers=3, disc_ndf=64)
    assert isinstance(loss.discriminator, StyleGANDiscriminator)
    assert hinge_d_loss(torch.ones(1), -torch.ones(1)) == 0.0
