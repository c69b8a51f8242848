"""The variational autoencoder: bounds against exact likelihoods, any size, schedules, bad input."""

import math

import pytest
import torch

from taming.config import ConfigError, instantiate_from_config
from taming.models.vae import GaussianVAE
from taming.modules.vae.gaussian import DiagonalGaussian, gaussian_log_prob
from taming.modules.vae.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, make_likelihood

NAMES = ("gaussian", "gaussian_learned", "bernoulli", "disc_logistic")


def vae(size=16, channels=3, likelihood="gaussian", **params):
    ddconfig = dict(in_channels=channels, resolution=size, latent_dim=6, ch=4, norm="group")
    return GaussianVAE(**{"ddconfig": ddconfig, "likelihood": likelihood} | params)


def images(n=2, size=(16, 16), channels=3):
    return torch.randint(256, (n, channels, *size)) / 127.5 - 1.0


# ---- the posterior


def test_kl_is_exact_and_gradients_are_those_of_the_reparameterization():
    moments = torch.tensor([[0.5, -1.0, 0.2, -0.7]], requires_grad=True)
    q = DiagonalGaussian(moments)
    z = DiagonalGaussian(moments.detach().expand(20_000, 4)).sample()
    sampled = gaussian_log_prob(z, q.mean, q.logvar) - gaussian_log_prob(z, 0.0, 0.0)
    assert sampled.mean().item() == pytest.approx(q.kl().item(), rel=0.02)
    assert DiagonalGaussian(torch.zeros(3, 8)).kl().tolist() == [0.0] * 3
    many = DiagonalGaussian(torch.randn(500, 8) * 3)
    assert (many.kl_by_dimension() >= 0).all() and many.kl().shape == (500,)
    torch.manual_seed(1)
    z = q.sample()
    noise = ((z - q.mean) / q.std).detach()
    (gradient,) = torch.autograd.grad(z.sum(), moments)
    torch.testing.assert_close(gradient, torch.cat((torch.ones(1, 2), 0.5 * q.std.detach() * noise), dim=1))
    wild = DiagonalGaussian(torch.tensor([[0.0, 0.0, 500.0, -500.0]]))
    assert wild.kl().isfinite().all() and wild.sample().isfinite().all()
    grid = DiagonalGaussian(torch.randn(2, 8, 3, 5))
    assert grid.mean.shape == (2, 4, 3, 5) and grid.kl().shape == grid.log_prob(grid.sample()).shape == (2,)


# ---- likelihoods


def test_the_256_probabilities_of_a_pixel_have_the_sum_1():
    levels = (torch.arange(256) / 127.5 - 1.0).view(256, 1, 1, 1)
    for mean, log_scale in ((0.0, -1.0), (0.9, -5.0), (-1.2, -3.0), (3.0, 1.0)):
        params = torch.tensor([mean, log_scale]).view(1, 2, 1, 1).expand(256, 2, 1, 1)
        log_p = DiscretizedLogistic().log_prob(levels, params)
        assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-5) and log_p.isfinite().all()
    # a probability of the level, whatever rounding the pixel has been through
    near = DiscretizedLogistic().log_prob(levels + 1e-3, params)
    torch.testing.assert_close(near, DiscretizedLogistic().log_prob(levels, params))


def test_likelihoods_are_densities_of_their_samples():
    x = images(4)
    by_torch = torch.distributions.Normal(torch.full_like(x, 0.1), 0.3).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(0.3).log_prob(x, torch.full_like(x, 0.1)), by_torch)
    logits = torch.randn_like(x)
    binary = x.sign()
    want = torch.distributions.Bernoulli(logits=logits).log_prob((binary + 1) / 2).flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(binary, logits), want)
    for name in NAMES:
        kind = make_likelihood(name, sigma=0.1)
        params = 0.3 * torch.randn(1, kind.n_params(3), 1, 1).expand(4000, -1, 4, 4)
        drawn = kind.sample(params)
        assert drawn.shape == (4000, 3, 4, 4) and kind.mean(params).shape == drawn.shape
        if name != "disc_logistic":  # clipped at the ends, its mean is another
            mean = kind.mean(params)[0, :, 0, 0]
            torch.testing.assert_close(drawn.mean((0, 2, 3)), mean, atol=0.02, rtol=0)
        else:
            levels = (drawn + 1) * 127.5
            assert (levels - levels.round()).abs().max() < 1e-3 and drawn.abs().max() <= 1.0
    assert make_likelihood("gaussian_learned", 0.2).log_sigma.requires_grad
    assert not make_likelihood("gaussian", 0.2).log_sigma.requires_grad
    with pytest.raises(ValueError, match="likelihood: 'gauss' is unknown; choose one of gaussian, "):
        make_likelihood("gauss")


# ---- bounds


def linear_vae(d=2, sigma=0.4):
    """A VAE without hidden layers: p(x) is N(b, W W' + sigma^2 I)."""
    ddconfig = dict(in_channels=1, resolution=[2, 4], latent_dim=d, ch_mult=[])
    return GaussianVAE(ddconfig, "gaussian", sigma)


def exact_log_likelihood(model, x):
    w, b = model.decoder.linear.weight, model.decoder.linear.bias
    covariance = w @ w.T + model.likelihood.log_sigma.exp() ** 2 * torch.eye(len(w))
    return torch.distributions.MultivariateNormal(b, covariance).log_prob(x.flatten(1))


def test_the_elbo_of_a_trained_linear_vae_is_the_exact_log_likelihood():
    """Probabilistic PCA: the posterior is Gaussian, and diagonal where training has turned the axes."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 2))[0] * torch.tensor([2.0, 1.0])
    x = (torch.randn(500, 2) @ directions.T + 0.4 * torch.randn(500, 8) + 0.3).view(500, 1, 2, 4)
    model = linear_vae()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        (-model.elbo(x).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        exact = exact_log_likelihood(model, x).mean()
        elbo = model.elbo(x, samples=200).mean()
        assert elbo <= exact + 0.01 and elbo.item() == pytest.approx(exact.item(), abs=0.05)
        # and that is the most likely of all such models (Tipping and Bishop 1999, eq. 8): known variance
        values, vectors = torch.linalg.eigh(torch.cov(x.flatten(1).T, correction=0))
        gain = (values[-2:] - 0.16).clamp_min(0.0).sqrt()
        w = vectors[:, -2:] * gain
        best = torch.distributions.MultivariateNormal(
            x.flatten(1).mean(0), w @ w.T + 0.16 * torch.eye(8)
        ).log_prob(x.flatten(1)).mean()
        assert exact.item() == pytest.approx(best.item(), abs=0.05)
        bounds = [model.iwae_bound(x, k).mean().item() for k in (1, 5, 50)]
        assert bounds[0] - 0.02 <= bounds[1] <= bounds[2] + 0.02 <= exact + 0.04


def test_bounds_of_an_untrained_model_are_ordered():
    torch.manual_seed(0)
    model = linear_vae().eval()
    x = torch.randn(400, 1, 2, 4)
    with torch.no_grad():
        exact = exact_log_likelihood(model, x).mean().item()
        elbo = model.elbo(x, samples=200).mean().item()
        one = torch.stack([model.iwae_bound(x, 1) for _ in range(200)]).mean().item()
        many = [model.iwae_bound(x, k).mean().item() for k in (10, 100, 2000)]
    assert one == pytest.approx(elbo, abs=0.2)  # in expectation
    assert elbo < many[0] < many[1] < many[2] <= exact + 0.05 and many[2] == pytest.approx(exact, abs=0.3)


@pytest.mark.parametrize("likelihood", NAMES)
def test_the_elbo_does_not_depend_on_the_batch_and_bits_are_of_8_bit_pixels(likelihood):
    model = vae(likelihood=likelihood).eval()
    x = images(6)
    torch.manual_seed(3)
    whole = model.elbo(x)
    torch.manual_seed(3)
    noise = torch.randn(6, 6)
    posterior = model.encode(x)
    z = posterior.mean + posterior.std * noise
    pairs = zip(x.split(1), z.split(1), strict=True)
    alone = torch.cat([model.likelihood.log_prob(a, model.decode_params(b)) for a, b in pairs])
    torch.testing.assert_close(whole, alone - posterior.kl())
    assert model.elbo(x, samples=3).shape == model.iwae_bound(x, 4).shape == (6,)
    if likelihood == "disc_logistic":
        uniform = torch.full((1,), -16 * 16 * 3 * math.log(256.0))
        assert model.bits_per_dim(uniform).item() == pytest.approx(8.0)
    else:
        with pytest.raises(ValueError, match="set likelihood=disc_logistic"):
            model.bits_per_dim(whole)


# ---- the model


@pytest.mark.parametrize(
    ("size", "channels"), [(64, 3), ((28, 28), 1), ((33, 47), 3), ((5, 64), 2), ((2, 3), 1)]
)
def test_images_of_any_size(size, channels):
    model = vae(size, channels, "disc_logistic").eval()
    x = images(2, model.image_size, channels)
    assert model.encode(x).mean.shape == (2, 6)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x)) and model.reconstruct(x).shape == x.shape
    assert model.sample(3).shape == (3, *x.shape[1:]) and model(x)[0].shape == x.shape
    same = [model.sample(3, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*same)


def test_networks_shrink_to_two_pixels():
    assert vae(64).encoder.moments.in_features == 4 * 16 * 2 * 2  # as the usual one of five convolutions
    assert vae((28, 40)).encoder.moments.in_features == 4 * 8 * 2 * 3
    assert vae(norm := 16).encoder.layers[1].num_groups == 4 and norm == 16
    with pytest.raises(ValueError, match="ddconfig.norm: 'layer' is unknown"):
        vae(ddconfig=dict(in_channels=3, resolution=16, latent_dim=6, norm="layer"))


def test_eight_images_are_learned_by_heart():
    model = vae(likelihood="gaussian_learned", sigma=0.5)
    x = torch.nn.functional.interpolate(images(8, (2, 2)), scale_factor=8.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(120):
        optimizer.zero_grad()
        (-model.elbo(x).mean()).backward()
        optimizer.step()
        errors.append((model.reconstruct(x) - x).square().mean().item())
    assert errors[-1] < 0.3 * errors[0] and model.likelihood.log_sigma < math.log(0.45)


def test_the_weight_of_the_divergence_rises_over_batches_and_free_bits_are_free(monkeypatch):
    model = vae(beta=2.0, kl_warmup=10)
    weights = []
    for model.batches_seen in (0, 1, 5, 10, 1000):
        weights.append(model.kl_weight())
    assert weights == pytest.approx([0.0, 0.2, 1.0, 2.0, 2.0])
    assert vae(beta=0.5).kl_weight() == 0.5

    def loss_of(**params):
        torch.manual_seed(0)
        model, found = vae(**params), {}
        x = images()
        monkeypatch.setattr(model, "manual_backward", lambda loss: found.update(loss=loss.item()))
        for name in ("check_finite", "log_dict", "log", "gradients_complete"):
            monkeypatch.setattr(model, name, lambda *a, **k: False)
        torch.manual_seed(1)
        model.training_step({"image": x.permute(0, 2, 3, 1)}, 0)
        torch.manual_seed(1)
        q = model.encode(x)
        nll = -model.likelihood.log_prob(x, model.decode_params(q.sample())).mean().item()
        return found["loss"] - nll, q.kl_by_dimension().mean(0)

    cost, kl = loss_of()
    assert cost == pytest.approx(kl.sum().item(), abs=2e-3)
    cost, kl = loss_of(free_bits=0.5, beta=3.0)
    assert cost == pytest.approx(3.0 * kl.clamp_min(0.5).sum().item(), abs=2e-3) and kl.min() < 0.5


def test_bad_input_is_named():
    model = vae()
    with pytest.raises(ValueError, match="24x16 pixels .* made for 16x16"):
        model.encode(images(size=(24, 16)))
    with pytest.raises(ValueError, match="1 channels a pixel .* takes 3"):
        model.encode(images(channels=1))
    for shape in ((2, 5), (2, 6, 1, 1), (6,)):
        with pytest.raises(ValueError, match=r"latents are \(B, 6\), ddconfig.latent_dim; got"):
            model.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="the images have 1 channels, but ddconfig.in_channels is 3: set"):
        model.check_batch({"image": torch.zeros(2, 16, 16, 1)})
    for name, value in (("sigma", 0.0), ("free_bits", -1.0), ("kl_warmup", 1.5), ("betta", 1.0)):
        with pytest.raises(ConfigError, match=name):
            instantiate_from_config({"target": "taming.models.vae.GaussianVAE", "params": {
                "ddconfig": dict(in_channels=3, resolution=16, latent_dim=6), name: value}})
