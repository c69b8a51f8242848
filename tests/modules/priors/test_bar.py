"""BAR: bits in, bits out; exact likelihood, sampling in the same order, windows, and what it learns."""

import itertools

import pytest
import torch

from taming.modules.priors.bar import BAR, BitHead
from taming.sampling import SamplingOptions, image_generators

K, C, GRID = 16, 5, (2, 3)
COUNT = GRID[0] * GRID[1]


def make(vocab_size=K, layout=((1, list(GRID))), **arguments):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, bit_groups=2, head_layers=2)
    model = BAR(vocab_size, list(layout), C, **{**sizes, **arguments}).eval()
    for parameter in model.parameters():  # adaLN-Zero starts with blocks that do nothing
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(C - 1, (batch, 1), generator=generator),
            torch.randint(K, (batch, COUNT), generator=generator))


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_probabilities_of_all_codes_sum_to_one(groups):
    model = make(layout=[1, [1, 2]], bit_groups=groups)
    codes = torch.tensor(list(itertools.product(range(K), repeat=2)))
    log_prob = model.log_prob(codes, torch.tensor([[3]]).expand(len(codes), 1))
    assert (log_prob <= 0).all() and model.likelihood == "exact"
    torch.testing.assert_close(log_prob.sum(1).exp().sum(), torch.tensor(1.0))
    assert log_prob[:, 0].unique().numel() > 8


@torch.no_grad()
def test_a_sample_is_of_the_exact_distribution():
    model = make(layout=[1, [1, 1]])
    condition = torch.zeros(6000, 1, dtype=torch.int64)
    codes = model.sample(condition, (1, 1), SamplingOptions(seed=0))
    shares = torch.bincount(codes[:, 0], minlength=K) / 6000
    every = torch.arange(K)[:, None]
    want = model.log_prob(every, condition[:K]).exp()[:, 0]
    torch.testing.assert_close(shares, want, atol=0.02, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_greedy_sampling_is_a_hand_written_loop(guidance):
    model, (condition, _) = make(), inputs()
    null = torch.full((2, 1), C - 1)
    ours = model.sample(condition, GRID, SamplingOptions(greedy=True, guidance=guidance), null_condition=null)
    codes = torch.zeros(2, COUNT, dtype=torch.int64)
    for place in range(COUNT):
        given, without = (model.code_logits(codes, c)[:, place] for c in (condition, null))  # (B, D)
        parts, masked = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
        for group in range(2):
            logits, other = (model.code_head(x, parts, masked)[:, group] for x in (given, without))
            parts[:, group] = (other + guidance * (logits - other)).argmax(-1)
            masked[:, group] = False
        codes[:, place] = parts[:, 0] + 4 * parts[:, 1]
    assert torch.equal(ours, codes)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    model, (condition, codes) = make(), inputs(3)
    how = SamplingOptions(temperature=0.8, top_k=100, guidance=2.0)  # more than a group has values
    null = torch.full((1, 1), C - 1)
    ours = model.sample(condition, GRID, how, null_condition=null, generator=image_generators(4, range(3)))
    alone = model.sample(condition[1:2], GRID, how, null_condition=null, generator=image_generators(4, [1]))
    assert torch.equal(ours[1:2], alone)
    assert torch.equal(model.sample(condition, GRID, how, null_condition=null, known=codes[:, :4])[:, :4],
                       codes[:, :4])


@torch.no_grad()
def test_half_precision():
    model, (condition, codes) = make().bfloat16(), inputs()
    ours = model.sample(condition, GRID, SamplingOptions(guidance=2.0, seed=0),
                        null_condition=torch.full((1, 1), C - 1))
    assert 0 <= ours.min() and ours.max() < K
    assert model.log_prob(codes, condition).isfinite().all()


@torch.no_grad()
def test_windows_slide_and_tell_the_likelihood():
    model, (condition, codes) = make(), inputs()
    grid = codes.view(2, *GRID)
    nll = model.window_nll([condition], grid, window=GRID)
    torch.testing.assert_close(-nll.flatten(1), model.log_prob(codes, condition))
    arguments = dict(shape=(3, 5), window=GRID)
    large = model.sample_window([condition], SamplingOptions(seed=0), **arguments)
    assert large.shape == (2, 3, 5) and 0 <= large.min() and large.max() < K
    waves = model.sample_window([condition], SamplingOptions(seed=0, wavefront=True), **arguments)
    assert torch.equal(waves, large)


def test_a_fixed_batch_is_learned():
    model, (condition, codes) = make(), inputs()
    before = model.loss(codes, condition).item()
    torch.testing.assert_close(before, -model.log_prob(codes, condition).mean().item())
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(codes, condition).backward()
        optimizer.step()
    assert model.eval().loss(codes, condition).item() < 0.1 * before
    assert torch.equal(model.sample(condition, GRID, SamplingOptions(greedy=True)), codes)


def test_the_loss_of_training_weighs_every_code_and_group_alike():
    """With logits that do not depend on the mask its expectation is the likelihood."""
    torch.manual_seed(0)
    head = BitHead(8, K, 4, 1, 8)
    head.known.weight.data.zero_()
    features, codes = torch.randn(20000, 1, 8)[:1].expand(20000, 1, 8), torch.full((20000, 1), 6)
    want = -head.log_prob(features[:1], codes[:1]).mean()
    torch.testing.assert_close(head.loss(features, codes), want, rtol=0.02, atol=0)


def test_there_is_no_table_of_codes():
    with torch.device("meta"):
        model = BAR(2**24, [1, [16, 16]], 1001, n_layer=1, n_head=2, n_embd=16, bit_groups=6)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert model.vocab_size == 2**24 and model.condition_vocab_size == 1001


@pytest.mark.parametrize(("size", "groups", "message"), [
    (12, 2, "a codebook of 12 codes has no bits: give a power of two"),
    (32, 2, "bit_groups: 2 does not divide the 5 bits of 32 codes: give one of 1, 5"),
])
def test_what_has_no_bits_is_said(size, groups, message):
    with pytest.raises(ValueError, match=message):
        make(size, bit_groups=groups)
