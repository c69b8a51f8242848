"""DALL-E's discrete VAE: golden values, likelihood, relaxation, schedules, pickled networks, resume."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from taming.checkpoint import load_model, read_checkpoint
from taming.config import ConfigError, find_config, instantiate_from_config, load_config
from taming.lr_scheduler import LambdaWarmUpCosineScheduler
from taming.models.dvae import DVAE
from taming.modules.dvae.logit_laplace import logit_laplace_nll, map_pixels, mean_pixels, unmap_pixels
from taming.modules.dvae.networks import Block, Conv2d, Encoder, Sizes
from taming.modules.dvae.relaxation import GumbelSoftmax
from tests.tiny import curves, resume, train

GOLDEN = Path(__file__).parents[1] / "golden"
DDCONFIG = dict(resolution=[16, 24], n_hid=8, n_init=4, n_blk_per_group=1, n_groups=3)
TEMPERATURE = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": dict(
    warm_up_steps=0, max_decay_steps=10, lr_start=1.0, lr_max=1.0, lr_min=0.0625)}


def dvae(**params):
    torch.manual_seed(0)
    ddconfig = DDCONFIG | params.pop("sizes", {})
    return DVAE(ddconfig=ddconfig, **{"n_embed": 12} | params)


def images(n=2, size=(16, 24), channels=3):
    return torch.rand(n, channels, *size) * 2 - 1


def parts_of(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_golden():
    tensors = load_file(GOLDEN / "dalle_dvae.safetensors")
    given, want = parts_of(tensors, "in/"), parts_of(tensors, "out/")
    model = DVAE(ddconfig=dict(resolution=32, n_hid=12, n_init=8), n_embed=64).eval()
    model.load_state_dict(parts_of(tensors, "state/"))
    x = 2 * given["x"] - 1
    close(map_pixels(given["x"]), want["mapped"])
    close(unmap_pixels(given["p"]), want["unmapped"])
    close(model.encode_to_prequant(x), want["logits"])
    assert torch.equal(model.encode_codes(x), want["indices"])
    weights, _, info = model.encode(x)
    assert torch.equal(info.indices, want["indices"])
    close(model.decoder(weights), want["decoder_stats"])
    close((model.decode(weights) + 1) / 2, want["reconstruction"])
    close((model.decode_codes(want["indices"]) + 1) / 2, want["reconstruction"])
    close(model.decoder.decode_latents(model.codes_to_latents(given["codes"])), want["decoder_stats_codes"])
    close(model.decoder(want["logits"].softmax(1)), want["soft_decoder_stats"])


def test_the_published_size():
    with torch.device("meta"):
        model = DVAE(ddconfig=dict(resolution=256))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert counts == [53_786_240, 43_829_766] and model.factor == 8 and model.codebook_size == 8192


# ---- likelihood


@pytest.mark.parametrize("b", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("mu", [-1.0, 0.3])
def test_the_density_integrates_to_one(mu, b):
    y = torch.linspace(-40, 40, 400_001, dtype=torch.float64)  # logits: x = sigmoid(y), dx = x (1 - x) dy
    x = torch.sigmoid(y)
    inside = (x > 1e-7) & (x < 1 - 1e-7)
    stats = torch.tensor([mu, math.log(b)]).view(1, 2, 1, 1).expand(1, 2, 1, int(inside.sum()))
    density = torch.exp(-logit_laplace_nll(stats, x[inside].view(1, 1, 1, -1))).flatten().double()
    total = torch.trapezoid(density * x[inside] * (1 - x[inside]), y[inside])
    assert abs(total - 1) < 1e-3


def test_the_density_is_the_formula():
    x, mu, b = torch.tensor(0.3), torch.tensor(0.2), torch.tensor(0.7)
    stats = torch.stack([mu, b.log()]).view(1, 2, 1, 1)
    want = 1 / (2 * b * x * (1 - x)) * torch.exp(-(torch.log(x / (1 - x)) - mu).abs() / b)
    close(logit_laplace_nll(stats, x.view(1, 1, 1, 1)).squeeze(), -want.log())


def test_pixels_are_mapped_away_from_0_and_1_and_back():
    p = torch.linspace(0, 1, 11)
    close(map_pixels(p)[[0, -1]], torch.tensor([0.1, 0.9]))
    close(unmap_pixels(map_pixels(p)), p)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    stats = torch.cat((torch.logit(map_pixels(p)).view(1, 1, 1, -1), torch.full((1, 1, 1, 11), 5.0)), dim=1)
    close(mean_pixels(stats).flatten(), p)
    assert logit_laplace_nll(stats, map_pixels(p).view(1, 1, 1, -1)).isfinite().all()


# ---- relaxation


def test_samples_follow_the_distribution():
    quantizer, n = GumbelSoftmax(6), 20_000
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])
    torch.manual_seed(0)
    weights, _, _ = quantizer.train()(logits.view(1, 6, 1, 1).expand(1, 6, 1, n))
    counts = weights.argmax(1).flatten().bincount(minlength=6)
    expected = n * logits.softmax(0)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square of 5 degrees of freedom at 0.999


def test_soft_samples_become_hard_as_the_temperature_falls():
    quantizer = GumbelSoftmax(6).train()
    logits = 20 * torch.randn(2, 6, 4, 4)
    for temperature in (1.0, 1 / 16, 1 / 100):
        quantizer.temperature = temperature
        weights, _, _ = quantizer(logits)
        torch.testing.assert_close(weights.sum(1), torch.ones(2, 4, 4))
    assert (weights.amax(1) > 0.99).float().mean() > 0.95
    quantizer.temperature = 1.0
    assert (quantizer(torch.randn(2, 6, 4, 4))[0].amax(1) < 0.99).all()  # soft, in the forward pass as well


def test_the_divergence_from_a_uniform_choice():
    quantizer = GumbelSoftmax(6)
    assert quantizer(torch.full((1, 6, 2, 2), 3.0))[1].abs() < 1e-6
    one = torch.zeros(1, 6, 2, 2)
    one[:, 2] = 1e3
    close(quantizer(one)[1], torch.tensor(math.log(6)))
    logits = torch.randn(2, 6, 3, 3)
    entropy = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy().mean()
    for mode in (True, False):  # that of the logits, whether a sample is relaxed or not
        close(quantizer.train(mode)(logits)[1], math.log(6) - entropy)


@torch.no_grad()
def test_codes_are_the_most_likely_ones():
    model = dvae().eval()
    x = images(3)
    codes = model.encode_codes(x)
    assert torch.equal(codes, model.encode_codes(x)) and codes.shape == (3, 4, 6)
    assert torch.equal(codes[1:2], model.encode_codes(x[1:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codes, model.encode_codes(x))
    weights, _, info = model.encode(x)
    assert torch.equal(info.indices, codes)
    assert torch.equal(weights, F.one_hot(codes, 12).movedim(-1, 1).float())
    close(model.decode_codes(codes), model.decode(weights))
    assert model.decode_codes(codes).abs().max() <= 1


def test_gradients_reach_the_encoder_at_the_last_temperature():
    model = dvae()
    model.quantize.temperature = 1 / 16
    loss, _, _, _ = model.losses(images(), 1.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_blocks_begin_close_to_the_identity():
    x = torch.randn(1, 8, 6, 6)
    block = Block(8, 8, (3, 3, 3, 1), gain=1 / 64)
    assert (block(x) - x).std() < 0.1 * x.std()
    encoder = Encoder(Sizes(resolution=16, n_hid=8), 12)
    gains = {part.gain for part in encoder.modules() if isinstance(part, Block)}
    assert gains == {1 / 64}  # 4 groups of 2 blocks


# ---- loss and schedules


@pytest.mark.parametrize("kl_norm", ["per_pixel", "per_token"])
@torch.no_grad()
def test_the_loss_is_that_of_the_paper(kl_norm):
    """Both terms as sums over an image, divided by 3 H W, or the divergence by the number of its codes."""
    model = dvae(kl_norm=kl_norm).eval()
    x = images()
    loss, terms, rec, codes = model.losses(x, 6.6)
    mapped = 0.8 * (x + 1) / 2 + 0.1
    logits = model.encoder(mapped)
    q = logits.softmax(1)
    divergence = (q * (q * 12).log()).sum((1, 2, 3))  # (B,)
    nll = logit_laplace_nll(model.decoder(F.one_hot(codes, 12).movedim(-1, 1).float()), mapped).sum((1, 2, 3))
    values = 3 * 16 * 24
    close(terms["rec_loss"], nll.mean() / values)
    close(terms["kl"], divergence.mean() / 24)
    close(loss, nll.mean() / values + 6.6 * divergence.mean() / (values if kl_norm == "per_pixel" else 24))
    close(rec, model(x)[0])


def test_schedules_of_the_paper_hit_their_ends():
    params = load_config(find_config("dvae/imagenet_dvae")).model.params
    ends = {"temperature_scheduler_config": (1.0, 1 / 16, 150_000), "kl_scheduler_config": (0.0, 1.0, 5000),
            "scheduler_config": (1.0, 0.0125, 1_200_000)}
    for name, (first, last, batches) in ends.items():
        schedule = instantiate_from_config(params[name])
        values = [float(schedule(batches * i // 10)) for i in range(13)]
        assert values[0] == first and values[10:] == [pytest.approx(last)] * 3
        assert sorted(values, reverse=first > last) == values
        assert values[5] == pytest.approx((first + last) / 2)  # half a cosine
    assert 1e-4 * 0.0125 == 1.25e-6


def test_a_temperature_of_0_is_named():
    schedule = {**TEMPERATURE, "params": TEMPERATURE["params"] | {"lr_min": 0.0}}
    model = dvae(temperature_scheduler_config=schedule, kl_scheduler_config=TEMPERATURE, kl_weight=2.0)
    assert model.set_schedules() == 2.0 and model.quantize.temperature == 1.0
    model.batches_seen = 5
    assert model.set_schedules() == pytest.approx(2 * 0.53125) and model.quantize.temperature == 0.5
    model.batches_seen = 10
    with pytest.raises(ValueError, match="gives 0 at batch 10: the temperature must stay above 0"):
        model.set_schedules()


@pytest.mark.parametrize(("params", "message"), [
    (dict(n_embed=1), "n_embed: 1; it must be a whole number of at least 2"),
    (dict(sizes=dict(resolution=18)), "ddconfig.resolution: 18 is not a multiple of f = 4, that of 3 groups"),
    (dict(sizes=dict(n_hid=10)), "ddconfig.n_hid: 10 is not a multiple of 4"),
    (dict(sizes=dict(n_hidd=8)), r"ddconfig.n_hidd' \(did you mean n_hid"),
    (dict(kl_norm="per_image"), "kl_norm: 'per_image'; it must be one of per_pixel, per_token"),
    (dict(kl_weight=-1.0), "kl_weight: -1.0; it must be a number of at least 0"),
])
def test_bad_values_are_named(params, message):
    ddconfig = DDCONFIG | params.pop("sizes", {})
    config = {"target": "taming.models.dvae.DVAE", "params": {"ddconfig": ddconfig, "n_embed": 12} | params}
    with pytest.raises((ConfigError, ValueError), match=message):
        instantiate_from_config(config)


def test_bad_images_are_named():
    model = dvae()
    with pytest.raises(ValueError, match="18x16 pixels are not a multiple of f = 4: crop to 16x16"):
        model.encode_codes(images(size=(18, 16)))
    with pytest.raises(ValueError, match="1 channels a pixel .* takes 3"):
        model.encode_codes(images(channels=1))
    gray = {"image": torch.zeros(2, 16, 24, 1)}
    with pytest.raises(ValueError, match="the images have 1 channels, but ddconfig.in_channels is 3: set"):
        model.check_batch(gray)
    dvae(sizes=dict(in_channels=1)).check_batch(gray)


def test_a_few_images_are_learned_by_heart():
    model = dvae(sizes=dict(resolution=16, n_hid=16, n_init=8), n_embed=32)
    x = F.interpolate(images(2, (4, 4)), scale_factor=4.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = LambdaWarmUpCosineScheduler(0, 1 / 16, 1.0, 1.0, 80)
    losses = []
    for step in range(100):
        model.quantize.temperature = float(schedule(step))
        loss, terms, _, _ = model.losses(x, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(terms["rec_loss"].item())
    _, terms, _, codes = model.eval().losses(x, 0.01)
    assert losses[-1] < losses[0] - 0.5 and len(codes.unique()) > 1
    assert abs(terms["rec_loss"] - losses[-1]) < 0.3  # most likely codes and soft samples agree by now


# ---- files of DALL-E


@pytest.fixture
def dall_e(monkeypatch):
    """Classes with the names of the package dall_e, for pickles; they are gone when files are read."""
    names = {"": (), "encoder": ("Encoder", "EncoderBlock"), "decoder": ("Decoder", "DecoderBlock")}
    classes = {}
    for module, found in {**names, "utils": ("Conv2d",)}.items():
        path = f"dall_e.{module}".rstrip(".")
        made = types.ModuleType(path)
        for name in found:
            classes[name] = type(name, (nn.Module,), {"__module__": path, "__qualname__": name})
            setattr(made, name, classes[name])
        monkeypatch.setitem(sys.modules, path, made)
    return classes


def as_pickled(network, side, classes):
    """Turn one of our networks into what DALL-E's code would have pickled."""
    for part in network.modules():
        if isinstance(part, Block):
            part.__class__ = classes[f"{side}Block"]
            part.post_gain, part.device, part.n_layers = part.gain, torch.device("cpu"), 8
        elif isinstance(part, Conv2d):
            part.__class__ = classes["Conv2d"]
            part.use_float16 = True
    network.__class__ = classes[side]
    return network


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_pickled_networks_load_without_their_code(dall_e, tmp_path, monkeypatch, new_format):
    ours = dvae(sizes=dict(resolution=256, n_blk_per_group=2)).eval()
    x = images(1, (16, 24))
    with torch.no_grad():
        want, codes = ours(x)[0], ours.encode_codes(x)
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    for side in ("encoder", "decoder"):
        network = as_pickled(getattr(ours, side), side.capitalize(), dall_e)
        torch.save(network, tmp_path / f"{side}.pkl", _use_new_zipfile_serialization=new_format)
    for name in ("", ".encoder", ".decoder", ".utils"):
        monkeypatch.delitem(sys.modules, f"dall_e{name}")
    model = DVAE.from_dall_e(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    assert "dall_e" not in sys.modules
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    with torch.no_grad():
        assert torch.equal(model(x)[0], want)
    saved = model.save_pretrained(tmp_path / "saved")
    again, _, _ = load_model(saved, DVAE)
    assert torch.equal(again.encode_codes(x), codes)
    with pytest.raises(ValueError, match="decoder.pkl|do not fit"):
        DVAE.from_dall_e(tmp_path / "decoder.pkl", tmp_path / "encoder.pkl")


def test_other_pickled_modules_are_not_allowed(dall_e, tmp_path, monkeypatch):
    other = type("Other", (nn.Module,), {"__module__": "dall_e.utils", "__qualname__": "Other"})
    monkeypatch.setattr(sys.modules["dall_e.utils"], "Other", other, raising=False)
    module = dall_e["Encoder"]()
    module.part = other()
    torch.save(module, tmp_path / "encoder.pkl")
    with pytest.raises(ValueError, match="asks for dall_e.utils.Other, which weights do not need"):
        read_checkpoint(tmp_path / "encoder.pkl")
    module.part = nn.Identity()
    module.part.register_parameter("w", None)
    module._parameters["odd"] = "text"
    torch.save(module, tmp_path / "encoder.pkl")
    with pytest.raises(ValueError, match="odd is neither a tensor nor a module"):
        read_checkpoint(tmp_path / "encoder.pkl")
    torch.save({"blocks.input.w": torch.zeros(1)}, tmp_path / "half.pkl")
    with pytest.raises(ValueError, match="half.pkl is not the encoder of DALL-E"):
        DVAE.from_dall_e(tmp_path / "half.pkl", tmp_path / "half.pkl")


# ---- runs

RUN = """
model:
  base_learning_rate: 1.0e-3
  target: taming.models.dvae.DVAE
  params:
    ddconfig: {resolution: 32, n_hid: 8, n_init: 4, n_blk_per_group: 1, n_groups: 3}
    n_embed: 16
    monitor: val/rec_loss
    kl_scheduler_config:
      target: taming.lr_scheduler.LambdaWarmUpCosineScheduler
      params: {warm_up_steps: 0, max_decay_steps: 4, lr_start: 0.0, lr_max: 0.0, lr_min: 1.0}
    temperature_scheduler_config:
      target: taming.lr_scheduler.LambdaWarmUpCosineScheduler
      params: {warm_up_steps: 0, max_decay_steps: 4, lr_start: 1.0, lr_max: 1.0, lr_min: 0.0625}
    scheduler_config:
      target: taming.lr_scheduler.LambdaWarmUpCosineScheduler
      params: {warm_up_steps: 1, max_decay_steps: 4, lr_start: 0.5, lr_max: 1.0, lr_min: 0.1}
data:
  target: taming.data.datamodule.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: taming.data.landscapes.Landscapes, params: {size: 32, length: 8, split: train}}
    validation: {target: taming.data.landscapes.Landscapes, params: {size: 32, length: 4, split: validation}}
lightning:
  trainer: {accelerator: cpu, devices: 1, log_every_n_steps: 1, enable_progress_bar: false}
"""


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(tmp_path):
    """Noise of the relaxation, temperature, divergence weight and learning rate go on where they were."""
    yaml = tmp_path / "dvae.yaml"
    yaml.write_text(RUN)
    whole = train(yaml, tmp_path, "whole", "--max_steps", 6)
    parts = train(yaml, tmp_path, "parts", "--max_steps", 3)
    resume(parts, "--max_steps", 6)
    states = [read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (whole, parts)]
    assert states[0]["batches_seen"] == states[1]["batches_seen"] == 6
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    for key in ("train/rec_loss", "train/kl", "train/temperature", "train/kl_weight", "train/lr"):
        ours, theirs = ([row[key] for row in curves(run) if key in row] for run in (parts, whole))
        assert ours == theirs and len(theirs) == 6 and len(set(theirs)) > 3, key
