"""Sampling beyond the training size: the rule of 2021, and the faster ways to the same codes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.modules.transformer.mingpt import GPT
from taming.sampling import image_generators, sample_tokens, sample_window, window_nll
from taming.sampling.filters import filter_logits, sample_from
from taming.sampling.window import _dependency_levels, _origins

GOLDEN = Path(__file__).parents[1] / "golden" / "sliding_window_greedy.safetensors"
V, WINDOW = 13, 4


@pytest.fixture
def gpt():
    model = GPT(V, 2 * WINDOW * WINDOW, n_layer=2, n_head=2, n_embd=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.ndim > 1 else None
        model.pos_emb.normal_(0, 0.5)
    return model


def condition(height, width, batch=2):
    return torch.randint(V, (batch, height, width), generator=torch.Generator().manual_seed(5))


def draw_naively(model, c, numbers=None, window=WINDOW):
    """2021's rule, position by position, each by a full forward; numbers (B, H, W) for a random draw."""
    batch, height, width = c.shape
    half, codes = window // 2, torch.zeros_like(c)
    for i in range(height):
        for j in range(width):
            local = []
            for place, side in ((i, height), (j, width)):
                inside = place if place <= half else window - (side - place) if side - place < half else half
                local.append(inside)
            rows = slice(i - local[0], i - local[0] + window)
            columns = slice(j - local[1], j - local[1] + window)
            before = codes[:, rows, columns].flatten(1)[:, : local[0] * window + local[1]]
            with torch.no_grad():
                logits = model(torch.cat((c[:, rows, columns].flatten(1), before), dim=1))[0][:, -1]
            sampled = logits.argmax(-1)
            if numbers is not None:
                sampled = sample_from(filter_logits(logits), numbers[:, i, j])
            codes[:, i, j] = sampled
    return codes


def random_numbers(seed, batch, height, width):
    generators = image_generators(seed, range(batch))
    rows = [torch.rand(height * width, dtype=torch.float64, generator=g) for g in generators]
    return torch.stack(rows).view(batch, height, width)


def test_greedy_codes_are_those_of_2021():
    tensors = load_file(GOLDEN)
    model = GPT(32, 512, n_layer=2, n_head=2, n_embd=32).eval()
    model.load_state_dict({k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")})
    assert torch.equal(sample_window(model, tensors["in/c_indices"], greedy=True), tensors["out/indices"])


@pytest.mark.parametrize("wavefront", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (4, 9), (7, 6), (9, 4)])
def test_every_code_follows_the_rule(gpt, size, wavefront):
    c = condition(*size)
    greedy = sample_window(gpt, c, window=WINDOW, greedy=True, wavefront=wavefront)
    assert torch.equal(greedy, draw_naively(gpt, c))
    got = sample_window(
        gpt, c, window=WINDOW, wavefront=wavefront, generator=image_generators(3, range(2))
    )
    assert torch.equal(got, draw_naively(gpt, c, random_numbers(3, 2, *size)))
    assert len(got.unique()) > 4


def test_in_a_grid_of_the_windows_size_it_is_plain_sampling(gpt):
    c = condition(4, 4)
    for stride in (1, 3, 4):
        got = sample_window(gpt, c, window=WINDOW, stride=stride, generator=image_generators(1, range(2)))
        want = sample_tokens(gpt, c.flatten(1), 16, generator=image_generators(1, range(2)))
        assert torch.equal(got.flatten(1), want)


class Watched:
    """A transformer that counts its calls and their tokens."""

    def __init__(self, model):
        self.model, self.block_size, self.calls, self.tokens = model, model.block_size, 0, 0

    def new_cache(self, *sizes):
        return self.model.new_cache(*sizes)

    def extend(self, idx, cache):
        self.calls, self.tokens = self.calls + 1, self.tokens + idx.shape[1]
        return self.model.extend(idx, cache)

    def __call__(self, idx):
        self.calls, self.tokens = self.calls + 1, self.tokens + idx.numel()
        return self.model(idx)


def test_a_longer_stride_computes_fewer_tokens_and_a_wavefront_fewer_steps(gpt):
    c = condition(4, 20, batch=1)
    tokens = []
    for stride in (1, 2, 4):
        watched = Watched(gpt)
        codes = sample_window(watched, c, window=WINDOW, stride=stride, greedy=True)
        assert watched.calls == 80 and codes.shape == (1, 4, 20) and codes.max() < V
        tokens.append(watched.tokens)
    assert tokens[0] > 1.5 * tokens[1] > 2 * tokens[2]
    watched, seen = Watched(gpt), []
    sample_window(
        watched, c, window=WINDOW, wavefront=True, greedy=True, callback=lambda step, codes: seen.append(step)
    )
    # row i + 1 begins when the window over its first position is complete: 4 steps a row, then 20 columns
    assert watched.calls == len(seen) == 3 * 4 + 20


def test_no_order_of_the_rule_of_2021_takes_fewer_than_304_steps_for_16x64():
    """(i, 0) sees (i - 1, 0..15): each row begins 16 steps after the one above."""
    origins = _origins(16, 64, (16, 16), 1)
    waves = _dependency_levels([[True] * 64 for _ in range(16)], origins, (16, 16))
    assert len(waves) == 15 * 16 + 64 == 304
    assert sorted(place for wave in waves for place in wave) == [(i, j) for i in range(16) for j in range(64)]
    # a chain of that length: along each row to column 15, down to the next, and the last row to its end
    chain = [(i, j) for i in range(15) for j in range(16)] + [(15, j) for j in range(64)]
    for (i, j), (row, column) in zip(chain[1:], chain, strict=False):
        top, left = origins[i][j]
        assert top <= row < top + 16 and left <= column < left + 16 and (row, column) < (i, j)


def test_an_image_does_not_depend_on_its_batch(gpt):
    c = condition(5, 6, batch=3)
    together = sample_window(gpt, c, window=WINDOW, generator=image_generators(0, range(3)))
    alone = sample_window(gpt, c[2:], window=WINDOW, generator=image_generators(0, [2]))
    assert torch.equal(together[2:], alone)


def test_known_codes_stay_and_are_seen(gpt):
    c, known = condition(6, 7), torch.randint(V, (2, 6, 7))

    def sampled(**given):
        return sample_window(gpt, c, window=WINDOW, generator=image_generators(0, range(2)), **given)

    whole, upper = sampled(), sampled(known=known, start=(3, 2))
    assert torch.equal(upper[:, :3], known[:, :3]) and torch.equal(upper[:, 3, :2], known[:, 3, :2])
    assert not torch.equal(upper[:, 3:], whole[:, 3:])
    # the same past and random numbers: the same future
    assert torch.equal(sampled(known=whole, start=(3, 2)), whole)

    mask = torch.rand(2, 6, 7) < 0.5
    in_order = sampled(known=known, mask=mask)
    assert torch.equal(in_order[mask], known[mask])
    assert torch.equal(sampled(known=known, mask=mask, wavefront=True), in_order)
    one = sampled(known=known, mask=mask[0])
    assert torch.equal(one[:, mask[0]], known[:, mask[0]])


def test_a_class_or_start_token_needs_no_grid(gpt):
    prefix = torch.tensor([[3], [7]])
    for shape, window in (((5, 8), 4), ((6, 5), (3, 5))):
        generators = image_generators(0, range(2))
        codes = sample_window(gpt, prefix, shape=shape, window=window, generator=generators)
        assert codes.shape == (2, *shape) and not torch.equal(codes[0], codes[1])
    flat = sample_tokens(gpt, prefix, 16, greedy=True)
    assert torch.equal(sample_window(gpt, prefix, shape=(4, 4), window=4, greedy=True).flatten(1), flat)


def test_only_the_first_stages_codes_are_sampled(gpt):
    codes = sample_window(gpt, condition(5, 9), window=WINDOW, codebook_size=3)
    assert codes.max() == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(condition=torch.zeros(1, 3, 9)), "3x9 codes is smaller than the window of 4x4: at least 4x9"),
    (dict(condition=torch.zeros(1, 1)), "shape=.H, W., in codes, is needed"),
    (dict(shape=(5, 5)), "the condition has 5x6 codes, but shape is 5x5"),
    (dict(window=5), "need a block size of 49; the transformer's is 32"),
    (dict(stride=5), "stride = 5 is outside 1..4"),
    (dict(stride=2, wavefront=True), "a wavefront is for stride 1, not 2"),
    (dict(start=(1, 0)), "give known="),
    (dict(known=torch.zeros(1, 5, 6)), "neither start= nor mask="),
    (dict(known=torch.zeros(1, 5, 5), start=(1, 0)), "known codes .1, 5, 5. do not fit"),
    (dict(known=torch.zeros(1, 5, 6), mask=torch.ones(4, 6)), "mask .4, 6. does not fit"),
    (dict(known=torch.zeros(1, 5, 6), mask=torch.ones(5, 6)), "nothing to sample"),
    (dict(known=torch.zeros(1, 5, 6), start=(5, 0)), "outside the grid of 5x6"),
])
def test_what_cannot_be_sampled_is_said(gpt, arguments, message):
    arguments = {"condition": torch.zeros(1, 5, 6), "window": WINDOW, **arguments}
    tensors = {key: v.long() if torch.is_tensor(v) else v for key, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sample_window(gpt, **tensors)


def test_logits_that_are_not_numbers_name_their_step(gpt):
    with torch.no_grad():
        gpt.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits of step 0 are NaN"):
        sample_window(gpt, condition(5, 6), window=WINDOW)


def test_the_likelihood_of_a_grid_is_that_of_its_windows(gpt):
    c = condition(5, 7)
    codes = torch.randint(V, (2, 5, 7))
    nll = window_nll(gpt, c, codes, window=WINDOW)
    for i, j, top, left in ((0, 0, 0, 0), (2, 3, 0, 1), (4, 6, 1, 3)):  # the rule of 2021, by hand
        window = slice(top, top + 4), slice(left, left + 4)
        before = codes[:, *window].flatten(1)[:, : (i - top) * 4 + j - left]
        with torch.no_grad():
            logits = gpt(torch.cat((c[:, *window].flatten(1), before), dim=1))[0][:, -1]
        want = torch.nn.functional.cross_entropy(logits, codes[:, i, j], reduction="none")
        torch.testing.assert_close(nll[:, i, j], want)
    greedy = sample_window(gpt, c, window=WINDOW, greedy=True)
    assert window_nll(gpt, c, greedy, window=WINDOW).mean() < nll.mean()
    with pytest.raises(ValueError, match="the condition has 5x7 codes, but shape is 5x6"):
        window_nll(gpt, c, codes[:, :, :6], window=WINDOW)
