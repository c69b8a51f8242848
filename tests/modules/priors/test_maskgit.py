"""Masked priors: golden values, what they see, what they learn, likelihood, and sampling."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.checkpoint.families import identify
from taming.config import instantiate_from_config
from taming.modules.priors.maskbit import MaskBit
from taming.modules.priors.maskgit import MaskGIT, UViTMaskGIT
from taming.sampling import SamplingOptions, image_generators

GOLDEN = Path(__file__).parents[2] / "golden"
K, C, N, M = 16, 9, 12, 2  # codes, condition tokens of a vocabulary; of an image
SIZES = dict(n_head=2, n_embd=16)
MODELS = {
    "MaskGIT": (MaskGIT, dict(n_layer=2, **SIZES, embd_pdrop=0.0, attn_pdrop=0.0)),
    "UViTMaskGIT": (UViTMaskGIT, dict(n_layer=3, **SIZES)),
    "MaskBit": (MaskBit, dict(n_layer=2, **SIZES, dropout=0.0)),
    "MaskBit, four groups": (MaskBit, dict(n_layer=1, **SIZES, dropout=0.0, bit_groups=4, pre_norm=True)),
}
each = pytest.mark.parametrize("name", MODELS)


def make(name="MaskGIT", vocab_size=K, block_size=M + N - 1, **arguments):
    torch.manual_seed(0)
    cls, sizes = MODELS[name]
    return cls(vocab_size, C, block_size, **{**sizes, **arguments}).eval()


def inputs(batch=2, seed=0, codes=K):
    """Condition (B, M) and codes (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(C, (batch, M), generator=generator),
            torch.randint(codes, (batch, N), generator=generator))


@each
def test_there_are_no_logits_of_one_code_after_another(name):
    condition, codes = inputs()
    with pytest.raises(ValueError, match="has no logits given the codes before: call log_prob"):
        make(name).code_logits(codes, condition)


# ---- golden values


@pytest.mark.parametrize("name", ["imagebert", "uvitbert"])
@torch.no_grad()
def test_golden(name):
    """Through the family, which cannot know the number of heads of so small a model."""
    tensors = load_file(GOLDEN / f"maskgit_{name}.safetensors")
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    published = identify(state)
    published.model["params"]["n_head"] = 4
    model = instantiate_from_config(published.model).eval()
    model.load_state_dict(published.state)
    assert published.state.keys() == state.keys() == model.state_dict().keys()
    codes, classes, null = tensors["in/idx"], tensors["in/cond"][:, None], torch.tensor([[10]])
    masked = (tensors["in/masked"] == model.vocab_size)[..., None]
    logits = model.part_logits(codes[..., None], masked, classes)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, :, 0], tensors["out/logits"], **close)
    unconditional = model.part_logits(codes[..., None], masked, null.expand(len(codes), -1))
    torch.testing.assert_close(unconditional[:, :, 0], tensors["out/logits_uncond"], **close)
    torch.testing.assert_close(model.masked_loss(logits, codes, masked), tensors["out/loss"], **close)
    how = SamplingOptions(greedy=True, steps=4, mask_schedule="arccos")
    # theirs, 3 and 4 steps: cond + s (cond - uncond), s = 3 or 3 t / 4; uncond + s_t (cond - uncond)
    for key, guidance in {
        "constant": dict(guidance=1 + 3.0),
        "linear": dict(guidance=1 + 3 * 3 / 4, guidance_schedule="linear"),
        "power-cosine": dict(guidance=3.0, guidance_schedule="power-cosine", guidance_power=2.0),
    }.items():
        sampled = model.sample(classes, (1, 16), how.replace(**guidance), null_condition=null)
        assert torch.equal(sampled, tensors[f"out/generate_{key}"]), key


# ---- what a network sees


@each
@torch.no_grad()
def test_masked_codes_are_not_seen_and_others_are(name):
    model, (condition, codes) = make(name), inputs()
    parts = model.split(codes)
    assert torch.equal(model.join(parts), codes) and parts.max() < model.group_size
    masked = torch.rand(parts.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    logits = model.part_logits(parts, masked, condition)
    assert logits.shape == (2, N, model.groups, model.group_size)
    hidden = torch.where(masked, model.group_size - 1 - parts, parts)
    assert torch.equal(model.part_logits(hidden, masked, condition), logits)
    place = (~masked).nonzero()[0]
    seen = parts.clone()
    seen[tuple(place)] = (seen[tuple(place)] + 1) % model.group_size
    changed = (model.part_logits(seen, masked, condition) != logits).flatten(2).any(-1)
    assert changed[place[0]].all() and not changed[1 - place[0]].any()
    for i in range(M):
        other = condition.clone()
        other[:, i] = (other[:, i] + 1) % C
        assert (model.part_logits(parts, masked, other) != logits).flatten(2).any(-1).all()


def test_the_condition_has_embeddings_of_its_own():
    """Class 3 and code 3 are different tokens."""
    model = make()
    assert model.model.embeddings.word_embeddings.weight.shape == (K + 1 + C, 16)
    assert model.vocab_size == K and model.condition_vocab_size == C


@each
def test_places_of_a_layout_start_the_positions(name):
    """Condition tokens and codes of the same place start alike, whatever stands first in the sequence."""
    model = make(name, block_size=4 + 4 - 1, layout=[[2, 2], [2, 2]])
    embedded = {"MaskGIT": lambda: model.model.embeddings.position_embeddings.weight,
                "UViTMaskGIT": lambda: model.pos_embed[0]}.get(name, lambda: model.pos_emb[0])().detach()
    first, second = embedded[:4] - embedded[:4].mean(0), embedded[4:] - embedded[4:].mean(0)
    torch.testing.assert_close(first, second)
    assert first.norm() > 0.1
    with pytest.raises(ValueError, match="layout has 8 tokens, fewer than block_size \\+ 1: 14"):
        make(name, layout=[[2, 2], [2, 2]])


def test_embeddings_of_codes_may_start_from_the_codebook():
    for name in ("MaskGIT", "UViTMaskGIT"):
        model = make(name, embedding_from_codebook=True)
        vectors = torch.randn(K, 3)
        vectors[1] = vectors[0]
        before = model.token_table.weight.detach().clone()
        model.init_from_codebook(vectors)
        after = model.token_table.weight.detach()
        torch.testing.assert_close(after[0], after[1])
        assert torch.equal(after[K:], before[K:]) and not torch.equal(after[2], before[2])


# ---- training


@each
def test_a_fixed_batch_is_learned(name):
    model, (condition, codes) = make(name), inputs()
    before = model.loss(codes, condition).item()
    optimizer, losses = torch.optim.Adam(model.train().parameters(), 1e-2), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(codes, condition)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.25 * sum(losses[:20])
    model.eval()
    assert model.loss(codes, condition).item() < 0.2 * before
    again = model.sample(condition, (3, 4), SamplingOptions(greedy=True, steps=12))
    assert (again == codes).float().mean() > 0.7  # 1/16 by chance


def test_the_loss_of_training_is_that_of_masked_codes():
    model, (condition, codes) = make(label_smoothing=0.1), inputs()
    masked = torch.zeros(2, N, 1, dtype=torch.bool)
    masked[0, 2] = masked[1, 5] = True
    logits = model.part_logits(model.split(codes), masked, condition)
    log_p = logits[:, :, 0].log_softmax(-1)
    want = [0.9 * log_p[i, j, codes[i, j]] + 0.1 * log_p[i, j].mean() for i, j in ((0, 2), (1, 5))]
    torch.testing.assert_close(model.masked_loss(logits, codes, masked), -sum(want) / 2)
    model.unmasked_weight = 1.0
    each = 0.9 * log_p.gather(-1, codes[..., None])[..., 0] + 0.1 * log_p.mean(-1)
    torch.testing.assert_close(model.masked_loss(logits, codes, masked), -each.mean())


@pytest.mark.parametrize("schedule", ["cosine", "arccos", "linear", "root"])
def test_shares_of_masks_follow_the_schedule(schedule):
    model = make(mask_schedule=schedule)
    torch.manual_seed(0)
    masked = model.random_mask(torch.zeros(4000, 50))
    count = masked.sum(1)
    assert count.min() >= 1 and count.max() == 50
    mean = {"cosine": 2 / torch.pi, "arccos": 2 / torch.pi, "linear": 0.5, "root": 1 / 3}[schedule]
    assert abs(count.float().mean() / 50 - mean) < 0.02
    assert abs(masked.float().mean(0) - mean).max() < 0.04  # every place alike


def test_replaced_codes_are_read_and_the_true_ones_predicted():
    model, (condition, codes) = make(), inputs()
    other = (codes + 1) % K
    assert torch.equal(model.log_prob(codes, condition, inputs=codes), model.log_prob(codes, condition))
    assert not torch.equal(model.log_prob(codes, condition, inputs=other), model.log_prob(codes, condition))
    losses = []
    for read in (None, codes, other):
        torch.manual_seed(0)
        losses.append([model.train().loss(codes, condition, inputs=read).item() for _ in range(5)])
    assert losses[0] == losses[1] != losses[2]


# ---- likelihood


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("name", ["MaskGIT", "MaskBit", "MaskBit, four groups"])
@torch.no_grad()
def test_probabilities_of_all_codes_sum_to_one(name, steps):
    size = 4 if name == "MaskGIT" else 16
    count = 3 if name == "MaskGIT" else 2
    model = make(name, size, count, likelihood_steps=steps)
    condition = torch.tensor([[5]])
    codes = torch.tensor(list(itertools.product(range(size), repeat=count)))
    log_prob = model.log_prob(codes, condition.expand(len(codes), -1))
    assert log_prob.shape == codes.shape and (log_prob <= 0).all()
    torch.testing.assert_close(log_prob.sum(1).exp().sum(), torch.tensor(1.0))


@torch.no_grad()
def test_with_as_many_steps_as_codes_it_is_a_chain():
    model, (condition, codes) = make(likelihood_steps=100), inputs()
    model.mask_schedule = "linear"
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).argsort()
    masked, want = torch.ones(2, N, 1, dtype=torch.bool), torch.zeros(2, N)
    for place in order:
        logits = model.part_logits(codes[..., None], masked, condition)[:, place, 0]
        want[:, place] = logits.log_softmax(-1).gather(1, codes[:, place, None])[:, 0]
        masked[:, place] = False
    torch.testing.assert_close(model.log_prob(codes, condition), want)
    assert "100 steps" in model.likelihood and model.likelihood.startswith("a bound")


@each
@torch.no_grad()
def test_the_loss_in_evaluation_is_the_mean_likelihood(name):
    model, (condition, codes) = make(name), inputs()
    torch.testing.assert_close(model.loss(codes, condition), -model.log_prob(codes, condition).mean())
    alone = model.log_prob(codes[1:], condition[1:])
    torch.testing.assert_close(alone, model.log_prob(codes, condition)[1:])


# ---- sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_one_code_in_each_step_is_a_hand_written_loop(guidance):
    model, (condition, _) = make(), inputs()
    null = torch.full((1, M), C - 1)
    how = SamplingOptions(greedy=True, steps=N, mask_schedule="linear", guidance=guidance)
    ours = model.sample(condition, (3, 4), how, null_condition=null)
    for row in range(2):
        codes, left = torch.zeros(1, N, 1, dtype=torch.int64), list(range(N))
        while left:
            masked = torch.zeros(1, N, 1, dtype=torch.bool)
            masked[0, left] = True
            given, without = (model.part_logits(codes, masked, c)[0, :, 0] for c in (condition[[row]], null))
            log_p = (without + guidance * (given - without)).log_softmax(-1)
            best = max(left, key=lambda place: log_p[place].max())
            codes[0, best] = log_p[best].argmax()
            left.remove(best)
        assert torch.equal(codes[0, :, 0], ours[row])


@pytest.mark.parametrize("order", ["confidence", "halton"])
@each
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(name, order):
    model, (condition, codes) = make(name), inputs(batch=3)
    how = SamplingOptions(steps=5, temperature=0.9, top_k=7, mask_order=order, guidance=2.0)
    more = dict(null_condition=torch.full((1, M), C - 1))
    ours = model.sample(condition, (3, 4), how, generator=image_generators(5, range(3)), **more)
    alone = model.sample(condition[1:2], (3, 4), how, generator=image_generators(5, [1]), **more)
    assert torch.equal(alone, ours[1:2])
    assert torch.equal(model.sample(condition, (3, 4), how.replace(seed=5), **more), ours)
    assert not torch.equal(model.sample(condition, (3, 4), how.replace(seed=6), **more), ours)
    assert 0 <= ours.min() and ours.max() < K
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) < 0.4
    filled = model.fill(codes, ~mask, condition, how.replace(seed=5), shape=(3, 4), **more)
    assert torch.equal(filled[mask], codes[mask]) and not torch.equal(filled, codes)
    first = model.sample(condition, (3, 4), how.replace(seed=5), known=codes[:, :5], **more)
    assert torch.equal(first[:, :5], codes[:, :5])


@each
@torch.no_grad()
def test_callbacks_see_decided_codes(name):
    model, (condition, codes) = make(name), inputs()
    seen = []
    ours = model.sample(condition, (3, 4), SamplingOptions(steps=6, seed=0), known=codes[:, :4],
                        callback=lambda step, codes: seen.append((step, codes)))
    assert seen[-1][0] == N - 4 - 1 and torch.equal(seen[-1][1], ours)
    for (step, before), (later, after) in itertools.pairwise(seen):
        assert step <= later and (before[:, :4] == codes[:, :4]).all()
        assert torch.equal(before[before >= 0], after[before >= 0])  # what is decided stays
    assert (seen[0][1] == -1).any()


@each
@torch.no_grad()
def test_half_precision(name):
    """As commands load a model with `--precision bf16`."""
    model, (condition, codes) = make(name).bfloat16(), inputs()
    how, null = SamplingOptions(steps=4, guidance=2.0, seed=0), torch.full((1, M), C - 1)
    ours = model.sample(condition, (3, 4), how, null_condition=null)
    assert 0 <= ours.min() and ours.max() < K
    assert model.log_prob(codes, condition).isfinite().all()


def test_only_codes_of_the_first_stage_are_sampled():
    model, (condition, _) = make(), inputs(batch=20)
    assert model.sample(condition, (3, 4), SamplingOptions(seed=0), codebook_size=5).max() == 4


@pytest.mark.parametrize("name", ["MaskGIT", "MaskBit"])
@torch.no_grad()
def test_larger_grids_are_sampled_window_by_window(name):
    torch.manual_seed(0)
    grid, token = torch.randint(C, (2, 2, 4)), torch.randint(C, (2, 1))
    model = make(name, block_size=1 + 2 * 4 + N - 1)
    wide = torch.randint(C, (2, 4, 6))  # a condition of half the codes' rows
    how = SamplingOptions(steps=3, guidance=1.5, seed=2)
    arguments = dict(window=(3, 4), shape=(6, 6), condition_windows=[None, (2, 4)],
                     null_condition=[torch.full((1, 1), C - 1), torch.full((1, 4, 6), C - 1)])
    codes = model.sample_window([token, wide], how, **arguments)
    assert codes.shape == (2, 6, 6) and 0 <= codes.min() and codes.max() < K
    alone = model.sample_window([token[1:], wide[1:]], how.replace(seed=None), **arguments,
                                generator=image_generators(2, [1]))
    assert torch.equal(alone, codes[1:])
    same = model.sample_window([token, grid], how, window=(3, 4), shape=(3, 4),
                               condition_windows=[None, (2, 4)],
                               null_condition=[torch.full((1, 1), C - 1), torch.full((1, 2, 4), C - 1)])
    tokens = torch.cat((token, grid.flatten(1)), dim=1)
    plain = model.sample(tokens, (3, 4), how, null_condition=torch.full((1, 9), C - 1))
    assert torch.equal(same.flatten(1), plain)  # one window is the training size
    kept = torch.zeros(6, 6, dtype=torch.bool)
    kept[2:4, 1:5] = True
    again = model.sample_window([token, wide], how.replace(seed=3), known=codes, mask=kept, **arguments)
    assert torch.equal(again[:, kept], codes[:, kept]) and not torch.equal(again, codes)


def test_codes_in_one_row():
    """As of TiTok, which have no place in the image."""
    model, (condition, _) = make(), inputs()
    for order in ("confidence", "halton"):
        assert model.sample(condition, (1, N), SamplingOptions(mask_order=order)).shape == (2, N)


# ---- errors


@pytest.mark.parametrize(("build", "message"), [
    (lambda: make(n_embd=15), "n_embd: 15 is not a multiple of n_head: 2"),
    (lambda: make("UViTMaskGIT", n_layer=4), "n_layer: 4 must be odd"),
    (lambda: make("MaskBit", 8), "bit_groups: 2 does not divide the 3 bits of 8 codes: .* 1, 3"),
    (lambda: make("MaskBit", 24), "24 codes has no bits: give a power of two"),
    (lambda: make().sample(torch.zeros(1, 3, dtype=torch.int64), (3, 4)), "of 14; the prior's is 13"),
    (lambda: make().sample(inputs()[0], (3, 4), SamplingOptions(guidance=2.0)), "needs null tokens"),
])
def test_what_cannot_be_is_said(build, message):
    with pytest.raises(ValueError, match=message):
        build()
