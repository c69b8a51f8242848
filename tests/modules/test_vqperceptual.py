"""The VQGAN's loss: each term's value, what it leaves out, and where gradients go."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taming.modules.losses.vqperceptual import VQLPIPS, VQLPIPSWithDiscriminator, adopt_weight, vanilla_d_loss


def make(disc_start=0, **arguments):
    arguments = dict(disc_num_layers=2, disc_ndf=8, perceptual_weight=0.0) | arguments
    return VQLPIPSWithDiscriminator(disc_start=disc_start, **arguments)


class Scene:
    """A last layer, what it makes of features, and the images that these should be."""

    def __init__(self):
        self.last = nn.Conv2d(4, 3, 3, padding=1)
        self.target = torch.rand(2, 3, 16, 24) * 2 - 1
        self.features = torch.randn(2, 4, 16, 24)
        self.rec = self.last(self.features)
        self.codebook_loss = torch.tensor(0.3)

    def __call__(self, loss, optimizer_idx, step, **arguments):
        arguments = {"last_layer": self.last.weight} | arguments
        return loss(self.codebook_loss, self.target, self.rec, optimizer_idx, step, **arguments)


@pytest.fixture
def scene():
    return Scene()


def calls_of(loss):
    """A list that grows by one with each pass through the discriminator."""
    calls = []
    loss.discriminator.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_before_the_start_the_discriminator_is_not_there(scene):
    loss = make(disc_start=5, codebook_weight=0.5, pixelloss_weight=2.0)
    calls = calls_of(loss)
    total, log = scene(loss, 0, 4)
    disc_loss, disc_log = scene(loss, 1, 4)
    assert calls == [] and disc_log == {} and float(disc_loss) == 0.0 and not disc_loss.requires_grad
    pixels = 2.0 * (scene.target - scene.rec).abs().mean()
    torch.testing.assert_close(total, pixels + 0.5 * 0.3)
    got, want = (torch.autograd.grad(x, scene.last.weight, retain_graph=True)[0] for x in (total, pixels))
    assert torch.equal(got, want)
    assert set(log) == {
        f"train/{k}" for k in ("disc_factor", "total_loss", "quant_loss", "nll_loss", "rec_loss", "p_loss")
    }
    scene(loss, 0, 5)
    scene(loss, 1, 5)
    assert len(calls) == 3  # the generator's, and two of its own


def test_adaptive_weight_is_the_ratio_of_the_norms(scene):
    loss = make(disc_weight=0.7).eval()
    total, log = scene(loss, 0, 0)
    pixels = (scene.target - scene.rec).abs().mean()
    adversarial = -loss.discriminator(scene.rec).mean()
    of_pixels, of_gan = (
        torch.autograd.grad(x, scene.last.weight, retain_graph=True)[0] for x in (pixels, adversarial)
    )
    weight = 0.7 * of_pixels.norm() / (of_gan.norm() + 1e-4)
    torch.testing.assert_close(log["train/d_weight"], weight)
    assert not log["train/d_weight"].requires_grad
    torch.testing.assert_close(total, pixels + 0.3 + weight * adversarial)
    gradient = torch.autograd.grad(total, scene.last.weight)[0]
    torch.testing.assert_close(gradient, of_pixels + weight * of_gan)


def test_adaptive_weight_is_bounded(scene):
    for bound in (1e4, 3.0):
        loss = make(disc_weight=0.5, disc_weight_max=bound)
        with torch.no_grad():
            loss.discriminator.main[-1].weight.zero_()  # no gradient comes through: the ratio is huge
        scale = 1e3  # of the pixels' gradient
        weight = loss.calculate_adaptive_weight(
            scale * scene.rec.sum(), -loss.discriminator(scene.rec).mean(), scene.last.weight
        )
        assert float(weight) == 0.5 * bound


def test_fixed_weight_needs_no_last_layer(scene):
    loss = make(disc_weight=0.8, disc_adaptive=False).eval()
    total, log = scene(loss, 0, 0, last_layer=None)
    want = (scene.target - scene.rec).abs().mean() + 0.3 - 0.8 * loss.discriminator(scene.rec).mean()
    torch.testing.assert_close(total, want)
    assert float(log["train/d_weight"]) == pytest.approx(0.8)


def test_the_generators_pass_leaves_the_discriminator_alone(scene):
    loss = make()
    scene(loss, 0, 0)[0].backward()
    assert all(p.grad is None for p in loss.discriminator.parameters())
    assert scene.last.weight.grad.abs().sum() > 0


def test_the_discriminators_pass_leaves_the_generator_alone(scene):
    loss = make()
    disc_loss, log = scene(loss, 1, 0)
    disc_loss.backward()
    assert scene.last.weight.grad is None
    assert all(p.grad is not None for p in loss.discriminator.parameters())
    assert loss.discriminator.main[0].weight.grad.abs().sum() > 0
    assert set(log) == {"train/disc_loss", "train/logits_real", "train/logits_fake"}


def test_one_backward_for_both_gives_each_its_own_gradient():
    loss, scene = make().eval(), Scene()
    names = [scene.last.weight, *loss.discriminator.parameters()]
    both = scene(loss, 0, 0)[0] + scene(loss, 1, 0)[0]
    together = torch.autograd.grad(both, names, retain_graph=True)
    apart = torch.autograd.grad(scene(loss, 0, 0)[0], names[:1], retain_graph=True)
    apart += torch.autograd.grad(scene(loss, 1, 0)[0], names[1:])
    for got, want in zip(together, apart, strict=True):
        torch.testing.assert_close(got, want)


def test_start_and_ramp_of_the_generator():
    loss = make(disc_start=10, disc_factor=0.5, gen_start=20, gen_ramp=4)
    steps = (10, 19, 20, 21, 23, 24, 1000)
    assert [loss.generator_factor(step) for step in steps] == [0.0, 0.0, 0.125, 0.25, 0.5, 0.5, 0.5]
    assert [make(disc_start=10).generator_factor(step) for step in (9, 10)] == [0.0, 1.0]
    assert [adopt_weight(2.0, step, 5) for step in (4, 5)] == [0.0, 2.0]
    assert adopt_weight(2.0, 4, 5, value=0.1) == 0.1


def test_between_the_starts_only_the_discriminator_learns(scene):
    loss = make(disc_start=0, gen_start=3)
    calls = calls_of(loss)
    assert "train/g_loss" not in scene(loss, 0, 2)[1] and calls == []
    assert float(scene(loss, 1, 2)[0].detach()) > 0 and len(calls) == 2


def test_generator_cannot_start_first():
    with pytest.raises(ValueError, match="gen_start: 3 is before disc_start: 5"):
        make(disc_start=5, gen_start=3)


def test_vanilla_is_cross_entropy(scene):
    real, fake = torch.randn(40), torch.randn(40)
    bce = F.binary_cross_entropy_with_logits
    want = 0.5 * (bce(real, torch.ones(40)) + bce(fake, torch.zeros(40)))
    torch.testing.assert_close(vanilla_d_loss(real, fake), want)
    loss = make(disc_loss="vanilla", disc_factor=0.5).eval()
    want = 0.5 * vanilla_d_loss(loss.discriminator(scene.target), loss.discriminator(scene.rec))
    torch.testing.assert_close(scene(loss, 1, 0)[0], want)
    with pytest.raises(ValueError, match="disc_loss: 'wasserstein' is unknown.*hinge"):
        make(disc_loss="wasserstein")


def test_conditional_discriminator_sees_the_condition(scene):
    loss = make(disc_conditional=True, disc_in_channels=4).eval()
    cond = torch.rand(2, 1, 16, 24)
    _, log = scene(loss, 1, 0, cond=cond)
    want = loss.discriminator(torch.cat((scene.target, cond), 1)).mean()
    torch.testing.assert_close(log["train/logits_real"], want.detach())
    assert "train/g_loss" in scene(loss, 0, 0, cond=cond)[1]
    with pytest.raises(ValueError, match="disc_conditional is True, but cond is missing"):
        scene(make(disc_start=100, disc_conditional=True, disc_in_channels=4), 0, 0)  # long before it matters
    with pytest.raises(ValueError, match="disc_conditional is False, but cond is given"):
        scene(make(), 1, 0, cond=cond)


def test_actnorm_discriminator_starts_from_its_first_batch(scene):
    loss = make(use_actnorm=True).train()
    scene(loss, 0, 0)[0].backward()
    norm = loss.discriminator.main[3]
    assert norm.initialized == 1 and norm.loc.abs().sum() > 0 and norm.loc.grad is None


def test_validation_has_no_adaptive_weight(scene):
    with torch.inference_mode():
        total, log = scene(make(disc_weight=0.4).eval(), 0, 0, last_layer=None, split="val")
    assert float(log["val/d_weight"]) == pytest.approx(0.4)
    assert torch.isfinite(total) and all(key.startswith("val/") for key in log)


def test_pixels_are_compared_in_float32_under_autocast(scene):
    loss = make(disc_start=9)
    want = float(scene(loss, 0, 0)[0].detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = scene(loss, 0, 0)
        disc_total, _ = scene(make(), 1, 0)
    assert (total.dtype, disc_total.dtype) == (torch.float32, torch.float32)
    assert float(total.detach()) == want


def test_perceptual_distance_is_added_and_logged(scene):
    class Constant(nn.Module):
        def forward(self, a, b):
            return torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)

    loss = make(disc_start=9, perceptual_weight=0.5)
    loss.perceptual_loss = Constant()
    total, log = scene(loss, 0, 0)
    torch.testing.assert_close(total, (scene.target - scene.rec).abs().mean() + 0.5 * 2.0 + 0.3)
    assert float(log["train/p_loss"]) == 2.0


def test_pixels_are_compared_as_asked():
    few = torch.full((1, 1, 4, 8), -1.0)
    few[..., 2] = 1.0  # an edge: an eighth of the image
    blank, mean = torch.full_like(few, -1.0), torch.full_like(few, -0.75)
    for pixel_loss, want in (("l1", [0.25, 0.4375]), ("l2", [0.5, 0.4375])):  # L1 takes the blank image
        loss = VQLPIPS(perceptual_weight=0.0, pixel_loss=pixel_loss)
        assert [float(loss(torch.zeros(()), few, rec)[0]) for rec in (blank, mean)] == pytest.approx(want)
    scene = Scene()
    _, log = scene(make(disc_start=5, pixel_loss="l2"), 0, 0)
    torch.testing.assert_close(log["train/rec_loss"], F.mse_loss(scene.rec, scene.target).detach())
    with pytest.raises(ValueError, match="pixel_loss: 'l3' is unknown"):
        VQLPIPS(pixel_loss="l3")


def test_the_adaptive_weight_needs_a_layer():
    loss = VQLPIPSWithDiscriminator(disc_start=0, perceptual_weight=0.0)
    value = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="last_layer"):
        loss.calculate_adaptive_weight(value, value)
