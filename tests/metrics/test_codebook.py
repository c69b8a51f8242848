"""Usage and perplexity of a codebook, alone and over two processes."""

import copy
import math

import pytest
import torch
from torch import nn

from taming.metrics import CodebookUsage
from tests.ranks import on_two_ranks


def test_usage_and_perplexity_over_batches():
    codes = CodebookUsage(8)
    codes.update(torch.zeros(0, dtype=torch.int64))
    assert {name: value.item() for name, value in codes.compute().items()} == {"usage": 0, "perplexity": 0}
    codes.update(torch.tensor([[0, 1], [2, 3]]))
    used = codes.compute()
    assert used["usage"].item() == 0.5 and used["perplexity"].item() == pytest.approx(4)
    codes.update(torch.tensor([0, 0, 0, 0], dtype=torch.int32))
    assert codes.histogram.tolist() == [5, 1, 1, 1, 0, 0, 0, 0]
    p = torch.tensor([5, 1, 1, 1]) / 8
    assert codes.compute()["perplexity"].item() == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    codes.reset()
    assert codes.histogram.tolist() == [0] * 8


@pytest.mark.parametrize("wrong", [-1, 8])
def test_indices_outside_the_codebook_are_named(wrong):
    codes = CodebookUsage(8)
    with pytest.raises(ValueError, match=rf"{wrong} is outside 0\.\.7"):
        codes.update(torch.tensor([1, wrong]))
    assert codes.histogram.sum() == 0


def test_counting_crosses_inference_mode():
    codes = CodebookUsage(4)
    with torch.inference_mode():
        codes.reset()
        codes.update(torch.tensor([1]))
    codes.update(torch.tensor([2]))
    assert codes.histogram.tolist() == [0, 1, 1, 0]


def test_counts_are_in_no_checkpoint_and_no_buffer():
    owner = nn.ModuleDict({"codes": CodebookUsage(4)})
    owner["codes"].update(torch.tensor([1, 1]))
    assert not owner.state_dict() and not list(owner.buffers())
    assert copy.deepcopy(owner)["codes"].histogram.tolist() == [0, 2, 0, 0]
    assert owner.half()["codes"].histogram.dtype == torch.long
    with torch.device("meta"):
        built = CodebookUsage(4)
    built.update(torch.tensor([3]))
    assert built.histogram.tolist() == [0, 0, 0, 1]


class Model(nn.Module):
    """Counts inside a wrapped forward, beside a buffer that the wrapper does synchronise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.codes = CodebookUsage(4)

    def forward(self, indices):
        self.codes.update(indices)
        return self.layer(indices[:, None].float())


def _count(rank):
    model = nn.parallel.DistributedDataParallel(Model())
    for indices in ([0, rank], [2 * rank, 3]):  # rank 0 sees 0 0 0 3, rank 1 sees 0 1 2 3
        model(torch.tensor(indices))
    return model.module.codes.compute()


@pytest.mark.slow
def test_every_rank_gets_the_counts_of_all(tmp_path):
    p = torch.tensor([4, 1, 1, 2]) / 8
    for used in on_two_ranks(_count, tmp_path):
        assert used["usage"] == 1 and used["perplexity"] == pytest.approx(float((-p * p.log()).sum().exp()))
