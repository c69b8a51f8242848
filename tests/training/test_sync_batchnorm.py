"""Synchronised BatchNorm: on each rank the same as BatchNorm on the joined batch, forward and backward."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from taming.training.sync_batchnorm import SyncBatchNorm2d, SyncBatchNorms
from tests.ranks import on_ranks


def layers(channels=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 1, 1))
    nn.init.normal_(model[1].weight)
    return model


def steps(model, batches):
    """Two batches forward and backward; gradients of the second, and the state after both."""
    for batch in batches:
        model.zero_grad()
        model(batch).square().mean().backward()
    plain = getattr(model, "module", model)
    return {**{f"{k}.grad": p.grad.clone() for k, p in plain.named_parameters()}, **plain.state_dict()}


def on_its_share(rank, count, batches):
    model = SyncBatchNorms().apply(layers())
    assert type(model[1]) is SyncBatchNorm2d
    return steps(DistributedDataParallel(model), [batch.chunk(count)[rank] for batch in batches])


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_agree_with_one_process_on_the_joined_batch(tmp_path, count):
    batches = 3.0 * torch.randn(2, 8, 3, 6, 5) + 1.0
    wanted = steps(layers(), batches)
    for found in on_ranks(count, on_its_share, tmp_path / "ranks", count, batches):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_alone_and_in_evaluation_it_is_plain_batchnorm():
    wanted, found = layers(), SyncBatchNorms().apply(layers())
    batches = torch.randn(2, 4, 3, 6, 5)
    torch.testing.assert_close(steps(found, batches), steps(wanted, batches))
    torch.testing.assert_close(found.eval()(batches[0]), wanted.eval()(batches[0]))
    back = SyncBatchNorms().revert(found)
    assert type(back[1]) is nn.BatchNorm2d
    torch.testing.assert_close(back.state_dict(), wanted.state_dict())
