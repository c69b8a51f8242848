"""What Llama and RAR share: caches, windows, batches, all kinds of conditions, learning, bad input."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.priors.decoder import attend_in_groups
from taming.modules.priors.llama import Llama
from taming.modules.priors.rar import RAR
from taming.sampling import SamplingOptions, image_generators, sample_tokens, sample_window, window_nll

K, C, NULL = 11, 9, 8
LAYOUTS = {
    "none": [[4, 6]], "class": [1, [4, 6]], "tokens": [5, [4, 6]], "grid": [[2, 3], [4, 6]],
    "several": [1, [4, 6], 3, [4, 6]], "odd": [[3, 5], [3, 5]],
}
MODELS = {
    "Llama": dict(n_head=4),
    "Llama, grouped": dict(n_head=4, n_kv_head=2, qk_norm=True),
    "Llama, one head of keys": dict(n_head=4, n_kv_head=1, adaln=True),
    "Llama, zero": dict(n_head=2, rotate_condition=False, adaln=True, qk_norm=True),
    "Llama, shared": dict(n_head=4, condition_vocab_size=None),
    "Llama, fused": dict(n_head=4, adaln=True, fuse_grids=True),
    "RAR": dict(n_head=4),
}


def make(name, layout=LAYOUTS["class"], **more):
    """A prior whose layers all count: nothing in it stays zero."""
    torch.manual_seed(0)
    cls = RAR if name == "RAR" else Llama
    arguments = dict(condition_vocab_size=C, n_layer=2, n_embd=32) | MODELS[name] | more
    model = cls(K, layout, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model


def inputs(model, batch=3, seed=0):
    """Condition (B, M) and codes (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    condition = torch.randint(NULL, (batch, model.num_condition), generator=generator)
    return condition, torch.randint(K, (batch, model.height * model.width), generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_cache_changes_nothing(name, layout):
    model = make(name, LAYOUTS[layout])
    condition, codes = inputs(model)
    want = model.code_logits(codes, condition)  # (B, N, K)
    assert want.std() > 0.1 and model.block_size == condition.shape[1] + codes.shape[1] - 1
    for chunks in ([1] * codes.shape[1], [0, 3, 1, 7, 1]):
        cache, place = model.new_cache(3, condition.shape[1] + codes.shape[1]), 0
        for i, size in enumerate(chunks):
            size = size if i else size - 1 if chunks[0] else 0
            tokens = codes[:, place : place + size]
            logits = model.extend(torch.cat((condition, tokens), 1) if i == 0 else tokens, cache)
            place += size
            assert cache.length == condition.shape[1] + place
            torch.testing.assert_close(logits, want[:, place], rtol=1e-4, atol=1e-4)
    cache.length = 0  # forgets the condition as well
    other = condition.flip(0)
    torch.testing.assert_close(
        model.extend(other, cache), model.code_logits(codes, other)[:, 0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_codes_before_are_seen_and_all_of_the_condition(name):
    model = make(name, LAYOUTS["several"])
    condition, codes = inputs(model)
    want = model.code_logits(codes, condition)
    changed = codes.clone()
    changed[:, 10:] = (codes[:, 10:] + 1) % K
    after = model.code_logits(changed, condition)
    torch.testing.assert_close(after[:, :11], want[:, :11], rtol=1e-4, atol=1e-5)
    assert ((after[:, 11:] - want[:, 11:]).abs().amax((0, 2)) > 1e-3).all()
    for token in range(condition.shape[1]):
        if name == "Llama, zero" and token == 0:
            continue  # keys vanish: a part of the value is seen
        other = condition.clone()
        other[:, token] = (other[:, token] + 1) % NULL
        assert ((model.code_logits(codes, other) - want).abs().amax(2) > 1e-5).any(1).all()


@pytest.mark.parametrize("name", MODELS)
def test_samples_belong_to_seeds_and_not_to_batches(name):
    model = make(name)
    condition, null = torch.arange(4)[:, None], torch.full((1, 1), NULL)
    how = SamplingOptions(top_k=7, guidance=3.0, guidance_schedule="power-cosine", guidance_power=2.0)
    kept = dict(null_condition=null)
    codes = model.sample(condition, (4, 6), how, generator=image_generators(0, range(4)), **kept)
    for i in range(4):
        alone = model.sample(condition[i:][:1], (4, 6), how, generator=image_generators(0, [i]), **kept)
        assert torch.equal(alone, codes[i:][:1])
    assert len({tuple(row) for row in codes.tolist()}) == 4 and codes.max() < K
    unguided = how.replace(guidance=1.0)
    plain = model.sample(condition, (4, 6), unguided, generator=image_generators(0, range(4)), **kept)
    assert not torch.equal(plain, codes)


@pytest.mark.parametrize("layout", ["none", "class", "several"])
@pytest.mark.parametrize("name", MODELS)
def test_a_window_slides_over_a_larger_grid(name, layout):
    """With and without a cache the same codes, and where the grid is the window those of `sample_tokens`."""
    model = make(name, LAYOUTS[layout])
    height, width = 5, 9
    parts = [
        torch.randint(NULL, (2, *((part,) if isinstance(part, int) else (height, width))))
        for part in model.parts
    ]
    sampling = dict(
        window=(4, 6), shape=(height, width), null_condition=[torch.full_like(p, NULL) for p in parts],
        guidance=2.0,
    )
    codes, waves = (
        sample_window(model, parts, generator=image_generators(1, range(2)), wavefront=wavefront, **sampling)
        for wavefront in (False, True)
    )
    assert codes.shape == (2, height, width) and torch.equal(codes, waves)
    nll = window_nll(model, parts, codes, window=(4, 6))
    small = [part[:, :4, :6].flatten(1) if part.ndim == 3 else part for part in parts]
    first = model.log_prob(codes[:, :4, :6].flatten(1), torch.cat(small, 1)).view(2, 4, 6)
    torch.testing.assert_close(nll[:, :2, :3], -first[:, :2, :3], rtol=1e-4, atol=1e-4)
    inside = [part[:, :4, :6] if part.ndim == 3 else part for part in parts]
    generators = [image_generators(2, range(2)) for _ in range(2)]
    here = sample_window(model, inside, window=(4, 6), shape=(4, 6), generator=generators[0])
    there = sample_tokens(model, torch.cat(small, 1), 24, generator=generators[1])
    assert torch.equal(here.flatten(1), there)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_learned(name):
    torch.manual_seed(0)
    cls = RAR if name == "RAR" else Llama
    orders = dict(random_until=10, raster_from=20) if cls is RAR else {}
    arguments = dict(condition_vocab_size=C, n_layer=2, n_embd=32) | MODELS[name] | orders
    model = cls(K, LAYOUTS["class"], **arguments)
    condition, codes = torch.arange(4)[:, None], torch.randint(K, (4, 24))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for batch in range(80):
        model.set_batches_seen(batch)
        loss = model.loss(codes, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(K).log()) < 0.3  # close to uniform at the start
    assert losses[-1] < 0.3
    model.eval()
    assert torch.equal(model.sample(condition, (4, 6), SamplingOptions(greedy=True)), codes)


@pytest.mark.parametrize("name", ["Llama, grouped", "RAR"])
@torch.no_grad()
def test_bfloat16_is_close(name):
    model = make(name, LAYOUTS["several"])
    condition, codes = inputs(model)
    want = model.log_prob(codes, condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.log_prob(codes, condition) - want).abs().mean() < 0.05
        cache = model.new_cache(3, 60)
        assert cache.rooms[0][0].dtype == torch.bfloat16
        logits = model.extend(torch.cat((condition, codes[:, :4]), 1), cache).float()
    other = model.code_logits(codes, condition)[:, 4]
    assert (logits.log_softmax(-1) - other.log_softmax(-1)).abs().mean() < 0.05
    low = model.to(torch.bfloat16)
    assert (low.log_prob(codes, condition) - want).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["Llama", "RAR"])
@torch.no_grad()
def test_embeddings_start_from_the_codebook(name):
    torch.manual_seed(1)
    cls = RAR if name == "RAR" else Llama
    model = cls(60, [1, [2, 2]], C, n_layer=1, n_head=4, n_embd=512)
    table = model.embeddings if name == "RAR" else model.tok_embeddings
    before = table.weight.clone()
    codebook = torch.randn(60, 8) * 5 + 100
    model.init_from_codebook(codebook)
    rows, vectors = table.weight[:60], codebook - codebook.mean(0)
    angles = [F.cosine_similarity(x[:, None], x[None], dim=-1).flatten() for x in (rows, vectors)]
    assert torch.corrcoef(torch.stack(angles))[0, 1] > 0.95
    assert abs(rows.std() / before[:60].std() - 1) < 0.02 and abs(rows.mean() - before[:60].mean()) < 1e-3
    assert torch.equal(table.weight[60:], before[60:])


@torch.no_grad()
def test_grouped_queries_share_keys_and_values():
    q = torch.randn(2, 6, 5, 4)
    k, v = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    scores = (q @ k.repeat_interleave(3, 1).transpose(2, 3) / 2).masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(attend_in_groups(q, k, v, 0.0), want)
    torch.testing.assert_close(attend_in_groups(q[:, :, -1:], k, v, 0.0), want[:, :, -1:])
    with torch.enable_grad():  # the fused kernel
        torch.testing.assert_close(attend_in_groups(q.requires_grad_(), k, v, 0.0), want)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(n_embd=30, n_head=4), "n_embd: 30 is not a multiple of n_head: 4"),
    (dict(layout=[1]), r"layout: \[1\] does not end with the grid of the codes"),
    (dict(layout=[]), r"layout: \[\] does not end with the grid"),
    (dict(layout=[1, [4, 0]]), "does not end with the grid"),
    (dict(layout=[[2, 2, 2], [4, 4]]), "neither a number of tokens nor"),
    (dict(layout=[0, [4, 4]]), "neither a number of tokens nor"),
])
@pytest.mark.parametrize("cls", [Llama, RAR])
def test_what_cannot_be_is_said(cls, arguments, message):
    arguments = dict(layout=[1, [4, 4]], n_layer=1, n_head=2, n_embd=8) | arguments
    with pytest.raises(ValueError, match=message):
        cls(K, condition_vocab_size=C, **arguments)


@pytest.mark.parametrize("name", ["Llama", "RAR"])
def test_sequences_that_do_not_fit_are_said(name):
    model = make(name, LAYOUTS["tokens"])
    for tokens in (4, 30):
        with pytest.raises(ValueError, match=rf"{tokens} tokens are not 5 .* 4x6 codes: the layout is \[5, "):
            model(torch.zeros(1, tokens, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"{tokens} tokens are not 5 of the condition"):
            model.extend(torch.zeros(1, tokens, dtype=torch.int64), model.new_cache(1, 40))
