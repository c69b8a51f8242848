"""The discriminator on several ranks: what it learns from the joined batch, with ActNorm or synchronised."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.losses.vqperceptual import hinge_d_loss
from taming.training.sync_batchnorm import SyncBatchNorm2d, SyncBatchNorms
from tests.ranks import on_ranks

NORMS = {"BatchNorm": False, "ActNorm": True}


def discriminator(use_actnorm):
    """In float64, so that nothing but a wrong sum makes a difference."""
    torch.manual_seed(0)
    return NLayerDiscriminator(3, 8, 2, use_actnorm=use_actnorm).apply(weights_init).double()


def learn(model, real, fake):
    """Gradients of the second of two batches, and the state after both."""
    for batch in zip(real, fake, strict=True):
        model.zero_grad()
        hinge_d_loss(*map(model, batch)).backward()
    plain = getattr(model, "module", model)
    return {**{f"{k}.grad": p.grad.clone() for k, p in plain.named_parameters()}, **plain.state_dict()}


def on_its_share(rank, count, use_actnorm, real, fake):
    model = SyncBatchNorms().apply(discriminator(use_actnorm))
    assert use_actnorm or type(model.main[3]) is SyncBatchNorm2d
    shares = ([batch.chunk(count)[rank] for batch in images] for images in (real, fake))
    return learn(DistributedDataParallel(model), *shares)


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        difference = (found[key] - value).abs().max()
        assert difference <= tolerance * value.abs().max(), (key, difference)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_agree_with_one_process_on_the_joined_batch(tmp_path, count, norm):
    real, fake = torch.randn(2, 2, 8, 3, 32, 24, dtype=torch.float64)
    wanted = learn(discriminator(NORMS[norm]), real, 0.1 * fake + 1.0)
    arguments = (count, NORMS[norm], real, 0.1 * fake + 1.0)
    for found in on_ranks(count, on_its_share, tmp_path / "ranks", *arguments):
        assert_close(found, wanted, 1e-10)


def test_alone_and_in_evaluation_it_is_plain_batchnorm():
    real, fake = torch.randn(2, 2, 4, 3, 32, 24, dtype=torch.float64)
    wanted, found = discriminator(False), SyncBatchNorms().apply(discriminator(False))
    assert_close(learn(found, real, fake), learn(wanted, real, fake), 0.0)
    assert torch.equal(found.eval()(real[0]), wanted.eval()(real[0]))
    back = SyncBatchNorms().revert(found)
    assert type(back.main[3]) is nn.BatchNorm2d
    assert_close(back.state_dict(), wanted.state_dict(), 0.0)
