"""The prior over two grids is a product of two priors: likelihoods, windows, sampling, callbacks, errors."""

import itertools
import re

import pytest
import torch

from taming.models.conditioning import build_prior
from taming.modules.priors.hierarchical import HierarchicalPrior
from taming.modules.priors.pixelsnail import PixelSNAIL
from taming.modules.transformer.mingpt import GPT
from taming.sampling import Cancelled, SamplingOptions, image_generators

COARSE, FINE, K = (2, 3), (4, 6), 5


def gpt(**params):
    params = dict(n_layer=1, n_head=2, n_embd=8) | params
    return {"target": "taming.modules.transformer.mingpt.GPT", "params": params}


def snail(**params):
    params = dict(channel=8, res_channel=8, n_head=2, n_block=1, n_res_block=1, n_cond_res_block=1,
                  kernel_size=3, dropout=0.0) | params
    return {"target": "taming.modules.priors.pixelsnail.PixelSNAIL", "params": params}


def prior(top=None, bottom=None, parts=(1,), grids=(COARSE, FINE), vocab_size=K, spread=0.5, **params):
    torch.manual_seed(0)
    made = build_prior({"target": f"{HierarchicalPrior.__module__}.HierarchicalPrior", "params": dict(
        vocab_size=vocab_size, layout=[*parts, *map(list, grids)], top=top or gpt(), bottom=bottom or gpt(),
        **params,
    )}).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=spread)
    return made


def codes(batch=2, grids=(COARSE, FINE), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(K, (batch, *grid), generator=generator) for grid in grids]


def flat(grids):
    return torch.cat([grid.flatten(1) for grid in grids], dim=1)


@pytest.mark.parametrize("bottom", [gpt(), snail()])
def test_it_is_the_product_of_its_priors(bottom):
    both, label = prior(bottom=bottom), torch.tensor([[3], [1]])
    top, fine = codes()
    given = torch.cat((label, top.flatten(1)), dim=1)
    want = torch.cat((
        both.top.log_prob(top.flatten(1), label), both.bottom.log_prob(fine.flatten(1), given)
    ), dim=1)
    found = both.log_prob(flat([top, fine]), label)
    assert torch.equal(found, want) and found.shape == (2, 30)
    torch.testing.assert_close(both.loss(flat([top, fine]), label), -want.mean())
    assert both.block_size == 1 + 6 + 24 - 1 and both.bottom.block_size == 1 + 6 + 24 - 1
    # the fine codes depend on the coarse ones, and not the other way
    other = both.log_prob(flat([(top + 1) % K, fine]), label)
    assert not torch.allclose(other[:, 6:], found[:, 6:])
    changed = both.log_prob(flat([top, (fine + 1) % K]), label)
    assert torch.equal(changed[:, :6], found[:, :6])


@pytest.mark.parametrize("parts", [(), (1,)])
@pytest.mark.parametrize("window", [None, (2, 2), (1, 4)])
def test_probabilities_of_all_codes_add_up_to_one(parts, window):
    grids = ((2, 2), (2, 4)) if window == (1, 4) else ((1, 2), (2, 4))
    two = prior(parts=parts, grids=grids, vocab_size=2, bottom_window=window and list(window))
    count = two.block_size - two.num_condition + 1
    every = torch.tensor(list(itertools.product((0, 1), repeat=count)))
    total = two.log_prob(every, torch.ones(len(every), 1, dtype=torch.int64)).double().sum(1).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_without_a_condition_the_start_token_is_for_the_coarse_grid_alone():
    both = prior(parts=())
    assert both.bottom.block_size == 6 + 24 - 1 and both.top.block_size == 6 and both.num_condition == 1
    zeros, ones = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)
    one, another = (both.log_prob(flat(codes()), start) for start in (zeros, ones))
    assert not torch.allclose(one[:, :6], another[:, :6]) and torch.equal(one[:, 6:], another[:, 6:])
    # PixelSNAIL reads no start token
    both = prior(snail(), snail(), parts=())
    assert isinstance(both.top, PixelSNAIL) and both.bottom.num_condition == 6
    assert torch.equal(*(both.log_prob(flat(codes()), start) for start in (zeros, ones)))


@pytest.mark.parametrize(("top", "bottom"), [(gpt(), gpt()), (snail(), snail()), (snail(), gpt())])
def test_samples_are_those_of_both_priors_in_turn(top, bottom):
    both, label = prior(top, bottom), torch.tensor([[3], [1]])
    how = SamplingOptions(top_k=3, guidance=1.5)
    null = torch.tensor([[4]])
    generator = image_generators(0, [0, 1])
    found = both.sample(label, [COARSE, FINE], how, null_condition=null, generator=generator)
    generator = image_generators(0, [0, 1])
    coarse = both.top.sample(label, COARSE, how, null_condition=null, generator=generator)
    fine = both.bottom.sample(
        torch.cat((label, coarse), dim=1), FINE, how, generator=generator,
        null_condition=torch.cat((null.expand(2, 1), coarse), dim=1),
    )
    assert torch.equal(found, torch.cat((coarse, fine), dim=1))
    windowed = both.sample_window(
        [label], how, shape=[COARSE, FINE], window=[COARSE, FINE], condition_windows=[None],
        null_condition=[null], generator=image_generators(0, [0, 1]),
    )
    assert torch.equal(flat(windowed), found)  # a window that does not move
    assert torch.equal(found, both.sample(
        label, [COARSE, FINE], how.replace(seed=0), null_condition=null
    ))  # a seed is that of the images
    other = both.sample(label, [COARSE, FINE], how.replace(seed=1), null_condition=null)
    assert not torch.equal(found, other)


def test_a_seed_gives_both_grids_numbers_of_their_own():
    """Where codes are uniform, those of the fine grid would else repeat those of the coarse one."""
    both = prior(spread=0.0)
    found = both.sample(torch.zeros(4, 1, dtype=torch.int64), [COARSE, FINE], SamplingOptions(seed=0))
    assert (found[:, :6] == found[:, 6:12]).float().mean() < 0.6


def test_a_window_over_the_fine_grid_reads_the_coarse_codes_above_it():
    both, label = prior(bottom_window=[2, 4]), torch.tensor([[3], [1]])
    assert both.windows == [None, (1, 2)] and both.bottom.block_size == 1 + 2 + 8 - 1
    top, fine = codes()
    found = both.log_prob(flat([top, fine]), label)[:, 6:].view(2, *FINE)
    # the first code sees the first window
    given = torch.cat((label, top[:, :1, :2].flatten(1)), dim=1)
    first = both.bottom.log_prob(fine[:, :2, :4].flatten(1), given)
    torch.testing.assert_close(found[:, 0, :3], first[:, :3])
    torch.testing.assert_close(
        flat(both.window_nll([label], [top, fine], window=[COARSE, FINE], condition_windows=[None])),
        -both.log_prob(flat([top, fine]), label),
    )
    same = both.sample(label, [COARSE, FINE], SamplingOptions(seed=3))
    windowed = both.sample_window([label], SamplingOptions(seed=3), shape=[COARSE, FINE],
                                  window=[COARSE, FINE], condition_windows=[None])
    assert torch.equal(flat(windowed), same)


def test_a_window_is_trained_at_random_places_and_judged_side_by_side():
    both, label = prior(bottom_window=[2, 4]), torch.tensor([[3], [1]])
    top, fine = codes()
    given = flat([top, fine])
    tiles = []
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        seen = top[:, row // 2 : row // 2 + 1, column // 2 : column // 2 + 2].flatten(1)
        part = fine[:, row : row + 2, column : column + 4].flatten(1)
        tiles.append(both.bottom.loss(part, torch.cat((label, seen), dim=1)))
    coarse = both.top.loss(top.flatten(1), label)
    torch.testing.assert_close(both.loss(given, label), 0.2 * coarse + 0.8 * torch.stack(tiles).mean())
    both.train()
    places = torch.cat([both._random_places(given)[0] for _ in range(200)])
    assert {tuple(place) for place in places.tolist()} == set(itertools.product(range(3), range(3)))
    torch.manual_seed(0)
    (place,) = both._random_places(given)
    corners = list(enumerate(place.tolist()))
    parts = torch.stack([fine[i, r : r + 2, c : c + 4].flatten() for i, (r, c) in corners])
    seen = [top[i, r // 2 : r // 2 + 1, c // 2 : c // 2 + 2].flatten() for i, (r, c) in corners]
    want = both.bottom.loss(parts, torch.cat((label, torch.stack(seen)), dim=1))
    torch.manual_seed(0)
    torch.testing.assert_close(both.loss(given, label), 0.2 * coarse + 0.8 * want)


@pytest.mark.parametrize("params", [{}, {"bottom_window": [2, 4]}])
def test_larger_images_and_codes_that_stay(params):
    both, label = prior(**params), torch.tensor([[3], [1]])
    shape = [(3, 4), (6, 8)]
    top, fine = codes(grids=shape, seed=5)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0] = True
    arguments = dict(shape=shape, window=[COARSE, FINE], condition_windows=[None])
    how = SamplingOptions(seed=0)
    found = both.sample_window([label], how, known=[top, fine], mask=mask, **arguments)
    assert [grid.shape for grid in found] == [(2, 3, 4), (2, 6, 8)]
    assert torch.equal(found[0][:, 0], top[:, 0]) and torch.equal(found[1][:, :2], fine[:, :2])
    assert not torch.equal(found[0][:, 1:], top[:, 1:]) and not torch.equal(found[1][:, 2:], fine[:, 2:])
    alone = both.sample_window(
        [label[1:]], how, known=[top[1:], fine[1:]], mask=mask, generator=image_generators(0, [1]),
        **arguments,
    )
    assert torch.equal(flat(alone), flat(found)[1:])
    nll = both.window_nll([label], found, window=[COARSE, FINE], condition_windows=[None])
    assert [part.shape for part in nll] == [grid.shape for grid in found] and (flat(nll) > 0).all()


@pytest.mark.parametrize("windowed", [False, True])
def test_the_callback_counts_the_codes_of_both_grids_and_stops(windowed):
    both, label, seen = prior(), torch.tensor([[3], [1]]), []

    def run(callback):
        if windowed:
            return flat(both.sample_window(
                [label], SamplingOptions(seed=0), shape=[COARSE, FINE], window=[COARSE, FINE],
                condition_windows=[None], callback=callback,
            ))
        return both.sample(label, [COARSE, FINE], SamplingOptions(seed=0), callback=callback)

    found = run(lambda step, codes: seen.append((step, codes.clone())))
    assert [step for step, _ in seen] == list(range(30))
    for step, so_far in seen:
        assert torch.equal(so_far[:, : step + 1], found[:, : step + 1])
    for last in (3, 10):
        with pytest.raises(Cancelled) as stop:
            run(lambda step, codes, last=last: step < last)
        assert stop.value.step == last
        assert torch.equal(stop.value.codes[:, : last + 1], found[:, : last + 1])


def test_schedules_of_training_reach_both_priors():
    seen = []

    class Counting(GPT):
        def set_batches_seen(self, batches):
            seen.append(batches)

    both = prior()
    both.top.__class__ = both.bottom.__class__ = Counting
    both.set_batches_seen(7)
    assert seen == [7, 7]


@pytest.mark.parametrize(("change", "message"), [
    ({"grids": ((4, 6), (2, 3))}, "must end in a grid and one finer by whole factors"),
    ({"grids": ((2, 3), (4, 7))}, "must end in a grid and one finer by whole factors"),
    ({"bottom_window": [2, 3]}, "bottom_window: 2x3 of 4x6 codes does not cover whole codes of the grid of "
                                "2x3: give multiples of 2x2"),
    ({"bottom": gpt(block_size=20)}, "bottom.params.block_size: 20 is too short for [1, [2, 3], [4, 6]], the "
                                     "condition and then the codes: leave it out, or give 30; or let a"),
    ({"top": gpt(block_size=5)}, "top.params.block_size: 5 is too short"),
    ({"top": {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}}, "Linear"),
    ({"bottom_window": [2]}, "bottom_window: [2] must be [height, width], in fine codes"),
    ({"bottom_window": [2, 2, 2]}, "bottom_window: [2, 2, 2] must be [height, width]"),
    ({"bottom": "GPT"}, "bottom: 'GPT' is not a prior: give its {target, params}"),
    ({"bottom": gpt(vocab_size=3)}, "bottom.params.vocab_size: 3 is below vocab_size: 5"),
])
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prior(**change)


def test_a_window_as_large_as_the_grid_is_none():
    both = prior(bottom_window=[32, 32])
    assert both.window == FINE and not both.has_window


def test_a_prior_of_two_levels_is_no_level_of_another():
    inner = {"target": "taming.modules.priors.hierarchical.HierarchicalPrior",
             "params": {"top": gpt(), "bottom": gpt(), "layout": [1, [1, 1], [2, 3]]}}
    with pytest.raises(ValueError):
        prior(top=inner)


def test_there_are_no_logits_of_whole_grids_where_a_window_slides():
    with pytest.raises(ValueError, match="with bottom_window there are no logits of whole grids"):
        prior(bottom_window=[2, 4]).code_logits(flat(codes()), torch.tensor([[3], [1]]))


def test_known_codes_of_one_grid_are_too_few():
    with pytest.raises(ValueError, match="known codes are those of both grids, a list"):
        prior().sample_window(
            [torch.tensor([[3], [1]])], shape=[COARSE, FINE], window=[COARSE, FINE], known=codes()[0],
            mask=torch.zeros(COARSE).bool(),
        )


def test_conditions_that_change_with_the_window_are_for_one_level():
    with pytest.raises(ValueError, match="give the whole layout"):
        prior().sample_window(lambda origin: torch.zeros(1, 1), shape=[COARSE, FINE], window=[COARSE, FINE])
