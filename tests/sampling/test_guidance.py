"""Classifier-free guidance against its formula, without a cache and one half after the other."""

import pytest
import torch

from taming.modules.transformer.mingpt import GPT
from taming.sampling import (
    Cancelled,
    Interval,
    Linear,
    PowerCosine,
    image_generators,
    sample_tokens,
    sample_window,
)
from taming.sampling.filters import sample_from

V, NULL, BLOCK, WINDOW = 13, 12, 40, 4


class Watched:
    """A transformer that notes the batch of each call, and the batches of its caches."""

    def __init__(self, model):
        self.model, self.block_size, self.batches, self.caches = model, model.block_size, [], []

    def new_cache(self, batch_size, length):
        self.caches.append(batch_size)
        return self.model.new_cache(batch_size, length)

    def extend(self, idx, cache):
        self.batches.append(len(idx))
        return self.model.extend(idx, cache)

    def __call__(self, idx):
        self.batches.append(len(idx))
        return self.model(idx)


@pytest.fixture
def gpt():
    return sharp(BLOCK)


def sharp(block):
    torch.manual_seed(0)
    model = GPT(V, block, n_layer=2, n_head=2, n_embd=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.ndim > 1 else None
        model.pos_emb.normal_(0, 0.5)
    return model


def numbers_of(seed, batch, steps):
    rows = [torch.rand(steps, dtype=torch.float64, generator=g) for g in image_generators(seed, range(batch))]
    return torch.stack(rows)


@torch.no_grad()
def guided_naively(model, prefix, null, steps, scales, numbers):
    """Each code from two full forwards; scales (steps, B)."""
    codes = prefix[:, :0]
    for step in range(steps):
        given, free = (model(torch.cat((first, codes), 1))[0][:, -1] for first in (prefix, null))
        scale = scales[step][:, None]
        sampled = sample_from(torch.where(scale == 1, given, free + scale * (given - free)), numbers[:, step])
        codes = torch.cat((codes, sampled[:, None]), dim=1)
    return codes


@pytest.mark.parametrize("guidance", [
    2.5, 0.0, torch.tensor([1.0, 3.0, 0.5]), Linear(1.0, 4.0, 12), PowerCosine(1.0, 6.0, 12),
    Interval(3.0, 4, 7), lambda step: torch.tensor([step, 1.0, 2.0]),
], ids=str)
def test_tokens_follow_the_formula(gpt, guidance):
    prefix = torch.randint(V - 1, (3, 5), generator=torch.Generator().manual_seed(1))
    null = torch.cat((torch.full((3, 3), NULL), prefix[:, 3:]), 1)  # 3 condition tokens, 2 codes
    value = guidance if callable(guidance) else lambda step: guidance
    scales = torch.stack([torch.as_tensor(value(step), dtype=torch.float32).expand(3) for step in range(12)])
    want = guided_naively(gpt, prefix, null, 12, scales, numbers_of(2, 3, 12))
    sampling = dict(guidance=guidance, null_prefix=null, generator=image_generators(2, range(3)))
    assert torch.equal(sample_tokens(gpt, prefix, 12, **sampling), want)
    plain = sample_tokens(gpt, prefix, 12, generator=image_generators(2, range(3)))
    assert not torch.equal(want, plain)


def test_schedules_are_named(gpt):
    """A name gives the schedule of as many steps as are sampled; a window counts all its positions."""
    prefix, null = torch.tensor([[1, 2, 3]]), torch.full((1, 3), NULL)
    named = dict(guidance=4.0, guidance_schedule="power-cosine", guidance_power=1.5, guidance_interval=(2, 9))
    for sample, first, steps in ((sample_tokens, (prefix, 12), 12), (sample_window, (prefix,), 42)):
        more = {} if sample is sample_tokens else dict(shape=(6, 7), window=WINDOW)
        more |= {"null_prefix" if sample is sample_tokens else "null_condition": null}
        want = Interval(PowerCosine(1.0, 4.0, steps + 1, 1.5), 2, 9)
        ours, theirs, constant = (
            sample(gpt, *first, generator=image_generators(0, range(1)), **more, **guidance)
            for guidance in (named, dict(guidance=want), dict(guidance=4.0))
        )
        assert torch.equal(ours, theirs) and not torch.equal(ours, constant)


def test_both_halves_run_in_one_batch_and_none_at_scale_1(gpt):
    prefix, null = torch.randint(V - 1, (2, 3)), torch.full((1, 3), NULL)
    sampling = dict(null_prefix=null, greedy=True)
    plain = sample_tokens(gpt, prefix, 6, greedy=True)
    for guidance, batch in ((2.0, 4), (1.0, 2), (torch.tensor([1.0, 1.0]), 2), (lambda step: 1, 2)):
        watched = Watched(gpt)
        codes = sample_tokens(watched, prefix, 6, guidance=guidance, **sampling)
        assert watched.batches == [batch] * 6 and watched.caches == [batch]
        assert batch == 4 or torch.equal(codes, plain)


def test_long_stretches_without_guidance_cost_nothing():
    model = sharp(200)
    prefix, null = torch.randint(V - 1, (2, 3)), torch.full((2, 3), NULL)
    guidance, watched = Interval(3.0, 70, 89), Watched(model)
    generators = dict(generator=image_generators(0, range(2)))
    codes = sample_tokens(watched, prefix, 160, guidance=guidance, null_prefix=null, **generators)
    assert watched.batches == [2] * 70 + [4] * 20 + [2] * 70 and watched.caches == [2, 4, 2]
    scales = torch.tensor([guidance(step) for step in range(160)])[:, None].expand(-1, 2)
    assert torch.equal(codes, guided_naively(model, prefix, null, 160, scales, numbers_of(0, 2, 160)))
    watched = Watched(model)  # one step at the end is not worth another cache
    sample_tokens(watched, prefix, 160, guidance=Interval(3.0, 1, 158), null_prefix=null)
    assert watched.caches == [4]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [2.0, Linear(0.0, 3.0, 30), Interval(4.0, 7, 19)], ids=str)
def test_a_window_is_guided_by_the_same_formula(gpt, guidance):
    c = torch.randint(V - 1, (2, 5, 6), generator=torch.Generator().manual_seed(5))
    null, numbers = torch.full((1, 5, 6), NULL), numbers_of(3, 2, 30).view(2, 5, 6)
    codes = torch.zeros_like(c)
    for i in range(5):
        for j in range(6):
            top, left = min(max(i - 2, 0), 1), min(max(j - 2, 0), 2)
            rows, columns = slice(top, top + WINDOW), slice(left, left + WINDOW)
            before = codes[:, rows, columns].flatten(1)[:, : (i - top) * WINDOW + j - left]
            given, free = (
                gpt(torch.cat((part[:, rows, columns].flatten(1), before), 1))[0][:, -1]
                for part in (c, null.expand_as(c))
            )
            scale = guidance(6 * i + j) if callable(guidance) else guidance
            logits = given if scale == 1 else free + scale * (given - free)
            codes[:, i, j] = sample_from(logits, numbers[:, i, j])
    sampling = dict(window=WINDOW, guidance=guidance, null_condition=null)
    for wavefront in (False, True):
        generators = image_generators(3, range(2))
        got = sample_window(gpt, c, wavefront=wavefront, generator=generators, **sampling)
        assert torch.equal(got, codes)
    strided = sample_window(gpt, c, stride=2, generator=image_generators(3, range(2)), **sampling)
    alone = sample_window(gpt, c[1:], stride=2, generator=image_generators(3, [1]), **sampling)
    assert torch.equal(strided[1:], alone)


def test_a_window_has_no_second_half_at_scale_1(gpt):
    c, null = torch.randint(V - 1, (2, 4, 7)), torch.full((2, 4, 7), NULL)
    plain = sample_window(gpt, c, window=WINDOW, greedy=True)
    for wavefront in (False, True):
        counts = []
        for guidance in (1.0, 2.0):
            watched = Watched(gpt)
            codes = sample_window(
                watched, c, window=WINDOW, greedy=True, guidance=guidance, null_condition=null,
                wavefront=wavefront,
            )
            counts.append(sum(watched.batches))
            assert torch.equal(codes, plain) == (guidance == 1.0)
        assert counts == [2 * 28, 4 * 28]
    watched = Watched(gpt)
    guidance = Interval(2.0, 5, 6)
    sample_window(watched, c, window=WINDOW, greedy=True, guidance=guidance, null_condition=null)
    assert watched.batches == [2] * 5 + [4] * 2 + [2] * 21


def test_a_window_can_be_cancelled(gpt):
    c = torch.randint(V - 1, (1, 4, 7))
    whole = sample_window(gpt, c, window=WINDOW, greedy=True)
    with pytest.raises(Cancelled) as stopped:
        sample_window(gpt, c, window=WINDOW, greedy=True, callback=lambda step, codes: step < 9)
    codes = stopped.value.codes.flatten()
    assert stopped.value.step == 9
    assert torch.equal(codes[:10], whole.flatten()[:10]) and (codes[10:] == 0).all()


def test_guidance_without_fitting_null_tokens_is_an_error(gpt):
    prefix, c = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 5, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="guidance of 2.5 needs null tokens.*null_prefix="):
        sample_tokens(gpt, prefix, 4, guidance=2.5)
    with pytest.raises(ValueError, match="guidance of 3 needs null tokens.*null_condition="):
        sample_window(gpt, c, window=WINDOW, guidance=lambda step: 1 + 2 * (step > 20))
    with pytest.raises(ValueError, match=r"null_prefix \(2, 2\) does not fit the prefix \(2, 3\)"):
        sample_tokens(gpt, prefix, 4, guidance=2.5, null_prefix=prefix[:, :2])
    with pytest.raises(ValueError, match=r"null_condition \(2, 5, 5\) does not fit the condition"):
        sample_window(gpt, c, window=WINDOW, guidance=2.5, null_condition=c[..., :5])
