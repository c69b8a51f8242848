"""Sampling with the cache: equal to sampling without one, and each image independent of its batch."""

import pytest
import torch

from taming.modules.transformer.mingpt import GPT, sample_with_past
from taming.sampling import Cancelled, filter_logits, image_generators, sample_tokens
from taming.sampling.filters import sample_from

V, BLOCK = 23, 16


@pytest.fixture
def gpt():
    return sharp(n_unmasked=0)


def sharp(n_unmasked):
    """A tiny GPT whose random weights are large enough to prefer some codes."""
    model = GPT(V, BLOCK, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.ndim > 1 else None
        model.pos_emb.normal_(0, 0.5)
    return model


@torch.no_grad()
def sample_naively(model, prefix, steps, numbers=None, **filters):
    """Every token from a forward over all before it; the most likely one without `numbers` (B, steps)."""
    tokens = prefix
    for step in range(steps):
        logits = model(tokens)[0][:, -1]
        if numbers is None:
            sampled = logits.argmax(-1)
        else:
            sampled = sample_from(filter_logits(logits, **filters), numbers[:, step])
        tokens = torch.cat((tokens, sampled[:, None]), dim=1)
    return tokens[:, prefix.shape[1] :]


@pytest.mark.parametrize(("n_unmasked", "length"), [(0, 1), (0, 5), (4, 4), (4, 6)])
def test_cached_logits_are_those_of_a_full_forward(n_unmasked, length):
    model = sharp(n_unmasked)
    tokens = torch.randint(V, (3, BLOCK))
    cache = model.new_cache(3, BLOCK)
    with torch.no_grad():
        got = [model.extend(tokens[:, :length], cache)]
        got += [model.extend(tokens[:, t : t + 1], cache) for t in range(length, BLOCK)]
        want = [model(tokens[:, : t + 1])[0][:, -1] for t in range(length - 1, BLOCK)]
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-4)
    assert cache.length == BLOCK


def test_several_tokens_may_be_appended_at_once(gpt):
    tokens = torch.randint(V, (2, 11))
    cache = gpt.new_cache(2, 11)
    with torch.no_grad():
        gpt.extend(tokens[:, :3], cache)
        got, want = gpt.extend(tokens[:, 3:], cache), gpt(tokens)[0][:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_unmasked", [0, 4])
def test_tokens_are_those_without_a_cache(n_unmasked):
    model, steps = sharp(n_unmasked), BLOCK - 4 + 1
    prefix = torch.randint(V, (3, 4))
    assert torch.equal(sample_tokens(model, prefix, steps, greedy=True), sample_naively(model, prefix, steps))
    filters = dict(temperature=1.3, top_k=15, top_p=0.95)
    got = sample_tokens(model, prefix, steps, generator=image_generators(7, range(3)), **filters)
    rows = [torch.rand(steps, dtype=torch.float64, generator=g) for g in image_generators(7, range(3))]
    want = sample_naively(model, prefix, steps, torch.stack(rows), **filters)
    assert torch.equal(got, want)
    assert len(got.unique()) > 5  # they are sampled, not constant


def test_an_image_does_not_depend_on_its_batch(gpt):
    prefix = torch.randint(V, (6, 2))
    together = sample_tokens(gpt, prefix, 12, generator=image_generators(3, range(6)))
    for rows in ([0], [4, 1], [5, 3, 2]):
        apart = sample_tokens(gpt, prefix[rows], 12, generator=image_generators(3, rows))
        assert torch.equal(apart, together[rows])


def test_seeds_and_numbers_give_streams_of_their_own():
    pairs = [(seed, index) for seed in (0, 1, 2, 4, 2**32, 2**40) for index in range(50)]
    streams = {float(torch.rand((), generator=image_generators(s, [i])[0])) for s, i in pairs}
    assert len(streams) == len(pairs)
    seeds = {g.initial_seed() for g in image_generators(5, range(20_000))}
    assert len(seeds) == 20_000 and max(seeds) < 2**32  # the generator heeds no more bits
    means = torch.stack([torch.rand(8, generator=g) for g in image_generators(0, range(2000))]).mean(0)
    assert (means - 0.5).abs().max() < 0.03  # no stream looks like its neighbour's


def test_one_generator_serves_the_rows_in_order(gpt):
    prefix = torch.zeros(4, 1, dtype=torch.int64)
    many = sample_tokens(gpt, prefix, 12, generator=torch.Generator().manual_seed(9))
    again = sample_tokens(gpt, prefix, 12, generator=torch.Generator().manual_seed(9))
    fewer = sample_tokens(gpt, prefix[:2], 12, generator=torch.Generator().manual_seed(9))
    assert torch.equal(many, again) and torch.equal(many[:2], fewer)
    assert len({tuple(row) for row in many.tolist()}) == 4


def test_without_a_generator_the_global_numbers_count(gpt):
    prefix = torch.zeros(2, 1, dtype=torch.int64)
    torch.manual_seed(1)
    first, second = sample_tokens(gpt, prefix, 12), sample_tokens(gpt, prefix, 12)
    torch.manual_seed(1)
    assert torch.equal(sample_tokens(gpt, prefix, 12), first)
    assert not torch.equal(first, second)


def test_only_codes_of_the_first_stage_are_sampled(gpt):
    prefix = torch.randint(V, (8, 1))
    assert sample_tokens(gpt, prefix, 12).max() >= 5
    assert sample_tokens(gpt, prefix, 12, codebook_size=5).max() < 5
    assert sample_tokens(gpt, prefix, 12, codebook_size=5, greedy=True).max() < 5


def test_callback_sees_every_step(gpt):
    seen = []
    prefix = torch.zeros(2, 3, dtype=torch.int64)
    codes = sample_tokens(gpt, prefix, 4, callback=lambda step, codes: seen.append((step, codes.clone())))
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(so_far, codes[:, : step + 1]) for step, so_far in seen)


def test_a_callback_that_returns_false_stops_it(gpt):
    prefix = torch.zeros(2, 3, dtype=torch.int64)
    whole = sample_tokens(gpt, prefix, 8, generator=image_generators(0, range(2)))
    calls = []

    def stop(step, codes):
        calls.append(step)
        return step < 4

    with pytest.raises(Cancelled, match="cancelled after step 4") as stopped:
        sample_tokens(gpt, prefix, 8, generator=image_generators(0, range(2)), callback=stop)
    assert calls == [0, 1, 2, 3, 4] and stopped.value.step == 4
    assert torch.equal(stopped.value.codes, whole[:, :5])
    for nothing in (None, 0, ""):  # only False itself
        got = sample_tokens(
            gpt, prefix, 8, generator=image_generators(0, range(2)), callback=lambda *_, x=nothing: x
        )
        assert torch.equal(got, whole)


def test_settings_may_change_from_step_to_step_and_image_to_image(gpt):
    prefix, steps = torch.randint(V, (3, 2)), 10
    temperatures = torch.rand(steps, 3) + 0.5
    numbers = [torch.rand(steps, dtype=torch.float64, generator=g) for g in image_generators(7, range(3))]
    numbers, min_p, tokens = torch.stack(numbers), torch.tensor([0.0, 0.1, 0.9]), prefix
    for step in range(steps):
        with torch.no_grad():
            logits = gpt(tokens)[0][:, -1] / temperatures[step, :, None]
        sampled = sample_from(filter_logits(logits, min_p=min_p), numbers[:, step])
        tokens = torch.cat((tokens, sampled[:, None]), dim=1)
    got = sample_tokens(
        gpt, prefix, steps, temperature=lambda step: temperatures[step], min_p=min_p,
        generator=image_generators(7, range(3)),
    )
    assert torch.equal(got, tokens[:, 2:])


def test_codes_can_be_used_where_gradients_flow(gpt):
    codes = sample_tokens(gpt, torch.zeros(1, 1, dtype=torch.int64), 3)
    embedding = torch.nn.Embedding(V, 2)
    embedding(codes).sum().backward()
    assert embedding.weight.grad.sum() == 6.0


def test_no_steps_give_no_codes(gpt):
    assert sample_tokens(gpt, torch.zeros(2, 3, dtype=torch.int64), 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("length", "arguments", "message"),
    [
        (0, {}, "prefix is empty"),
        (5, {"steps": 13}, "5 tokens given and 13 to sample need a block size of 17"),
        (1, {"top_k": 24}, r"top_k = 24 is outside 1\.\.23"),
        (1, {"temperature": 0}, "temperature must be above 0"),
        (1, {"temperature": lambda step: 3 - step}, "temperature must be above 0, not 0"),
        (1, {"temperature": torch.ones(3)}, r"temperature \(3,\): give a number, or 2"),
        (1, {"generator": image_generators(0, range(3))}, "3 generators for a batch of 2"),
    ],
)
def test_errors_name_the_values(gpt, length, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(gpt, torch.zeros(2, length, dtype=torch.int64), **{"steps": 4, **arguments})


@pytest.mark.parametrize("greedy", [True, False])
def test_broken_weights_are_reported_at_the_first_step(gpt, greedy):
    with torch.no_grad():
        gpt.head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="step 0 are NaN"):
        sample_tokens(gpt, torch.zeros(2, 1, dtype=torch.int64), 4, greedy=greedy)


def test_prefix_must_hold_what_sees_all_of_itself():
    with pytest.raises(ValueError, match="first 3 tokens do not hold the whole unmasked prefix of 4"):
        sample_tokens(sharp(n_unmasked=4), torch.zeros(2, 3, dtype=torch.int64), 4)


def test_call_of_2021(gpt):
    prefix, seen = torch.randint(V, (2, 3)), []
    torch.manual_seed(5)
    want = sample_tokens(gpt, prefix, 6, top_k=9)
    torch.manual_seed(5)
    assert torch.equal(sample_with_past(prefix, gpt, steps=6, top_k=9, callback=seen.append), want)
    assert seen == list(range(6))
    for generous in (0, 1000):  # both kept all codes
        torch.manual_seed(5)
        everything = sample_with_past(prefix, gpt, steps=6, top_k=generous)
        torch.manual_seed(5)
        assert torch.equal(everything, sample_tokens(gpt, prefix, 6))


def test_cache_follows_autocast(gpt):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpt.new_cache(1, 4).keys[0].dtype == torch.bfloat16
        codes = sample_tokens(gpt, torch.zeros(2, 2, dtype=torch.int64), 5, greedy=True)
    assert gpt.new_cache(1, 4).values[1].dtype == torch.float32
    assert codes.shape == (2, 5) and codes.dtype == torch.int64
