"""The GPT: what a position sees, its keys, its limits. The cache is tested with the samplers."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.transformer.mingpt import (
    GPT,
    Block,
    CodeGPT,
    DummyGPT,
    GPT1Config,
    GPTConfig,
    KMeans,
    sample,
    sample_with_past,
    top_k_logits,
)

V, BLOCK = 19, 12


def make(**arguments):
    sizes = dict(vocab_size=V, block_size=BLOCK, n_layer=2, n_head=2, n_embd=16)
    model = GPT(**{**sizes, **arguments}).eval()
    torch.nn.init.normal_(model.pos_emb, std=0.5)
    return model


def influence(model, length=BLOCK):
    """A matrix (position, token) of which logits change when a token changes."""
    tokens = torch.randint(V, (1, length))
    changed = tokens.repeat(length, 1)
    changed[range(length), range(length)] = (changed.diagonal() + 1) % V
    with torch.no_grad():
        difference = (model(changed)[0] - model(tokens)[0]).abs().amax(-1)  # (token, position)
    return difference.t() > 1e-7


def test_a_token_sees_itself_and_what_is_before_it():
    assert torch.equal(influence(make()), torch.ones(BLOCK, BLOCK).tril().bool())


@pytest.mark.parametrize("n_unmasked", [1, 4, BLOCK])
def test_the_unmasked_prefix_sees_all_of_itself(n_unmasked):
    want = torch.ones(BLOCK, BLOCK).tril().bool()
    want[:n_unmasked, :n_unmasked] = True
    assert torch.equal(influence(make(n_unmasked=n_unmasked)), want)
    assert influence(make(n_unmasked=n_unmasked), length=2)[0, 1] == (n_unmasked >= 2)


def test_loss_at_a_position_does_not_depend_on_its_own_token():
    """Targets are the tokens moved by one: what is to be predicted at position i is not among the inputs."""
    model, tokens = make(), torch.randint(V, (1, BLOCK + 1))
    logits = model(tokens[:, :-1])[0]  # position i predicts token i + 1
    for i in range(BLOCK):
        other = tokens.clone()
        other[0, i + 1] = (other[0, i + 1] + 1) % V
        got = model(other[:, :-1])[0]
        torch.testing.assert_close(got[:, : i + 1], logits[:, : i + 1])


def test_loss_is_the_mean_over_all_tokens():
    model = make()
    tokens, targets = torch.randint(V, (3, 7)), torch.randint(V, (3, 7))
    logits, loss = model(tokens, targets=targets)
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -picked.mean())
    assert model(tokens)[1] is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens, targets=targets)[1].dtype == torch.float32


@torch.no_grad()
def test_embeddings_go_before_the_tokens():
    model, tokens = make(), torch.randint(V, (2, 5))
    logits, _ = model(tokens[:, 2:], embeddings=model.tok_emb(tokens[:, :2]))
    torch.testing.assert_close(logits, model(tokens)[0])


@torch.no_grad()
def test_attention_is_the_formula():
    attention = make().blocks[0].attn
    x = torch.randn(2, 5, 16)
    parts = attention.query, attention.key, attention.value
    q, k, v = (part(x).view(2, 5, 2, 8).transpose(1, 2) for part in parts)
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    want = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(attention(x), want)


def test_dropout_acts_in_training_only():
    for rate in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        model, tokens = make(**{rate: 0.5}), torch.randint(V, (2, BLOCK))
        assert torch.equal(model(tokens)[0], model(tokens)[0])
        model.train()
        assert not torch.allclose(model(tokens)[0], model(tokens)[0])


def test_gelu_is_exact():
    x = torch.linspace(-3, 3, 50)
    gelu = make().blocks[0].mlp[1]
    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    assert not torch.allclose(gelu(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-5)


def test_initial_weights():
    model = GPT(vocab_size=500, block_size=64, n_layer=2, n_head=2, n_embd=128)
    for module in (model.head, model.tok_emb, model.blocks[0].attn.key, model.blocks[1].mlp[0]):
        assert 0.018 < module.weight.std() < 0.022
    assert model.pos_emb.abs().max() == 0 and model.blocks[0].attn.key.bias.abs().max() == 0
    assert (model.ln_f.weight == 1).all()


def test_masks_of_old_checkpoints_are_dropped():
    model = make()
    state = model.state_dict()
    masks = {f"blocks.{i}.attn.mask": torch.ones(1, 1, BLOCK, BLOCK) for i in range(2)}
    model.load_state_dict({**state, **masks})
    with pytest.raises(RuntimeError, match="blocks.0.attn.masque"):
        model.load_state_dict({**state, "blocks.0.attn.masque": torch.ones(1)})


def test_keys():
    block = [f"{layer}.{kind}" for layer in (
        "ln1", "ln2", "attn.key", "attn.query", "attn.value", "attn.proj", "mlp.0", "mlp.2"
    ) for kind in ("weight", "bias")]
    want = ["pos_emb", "tok_emb.weight", "ln_f.weight", "ln_f.bias", "head.weight"]
    want += [f"blocks.{i}.{key}" for i in range(2) for key in block]
    assert sorted(make().state_dict()) == sorted(want)


def test_limits_are_named():
    with pytest.raises(ValueError, match="13 tokens do not fit the transformer's block_size: 12"):
        make()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_embd: 16 is not a multiple of n_head: 3"):
        make(n_head=3)
    assert make().get_block_size() == BLOCK


def test_builds_without_memory():
    with torch.device("meta"):
        logits, _ = GPT(V, BLOCK, n_layer=1, n_head=2, n_embd=16)(torch.zeros(1, 5, dtype=torch.int64))
    assert logits.shape == (1, 5, V)


# ---- the other names of 2021


def test_a_gpt_over_vectors():
    model = CodeGPT(V, BLOCK, in_channels=5, n_layer=1, n_head=2, n_embd=16).eval()
    x = torch.randn(2, 7, 5)
    logits, loss = model(x, targets=torch.randint(V, (2, 7)))
    assert logits.shape == (2, 7, V) and loss > 0
    x[:, -1] += 1.0
    torch.testing.assert_close(model(x)[0][:, :-1], logits[:, :-1])  # the past does not see the future
    assert model.state_dict()["tok_emb.weight"].shape == (16, 5) and model.tok_emb.weight.std() < 0.03


def test_sample_goes_on_beyond_the_block():
    model, x = make(), torch.randint(V, (2, 5))
    want = x
    with torch.no_grad():
        for _ in range(14):
            want = torch.cat((want, model(want[:, -BLOCK:])[0][:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(sample(model, x, 14), want)
    assert torch.equal(sample(model, x, 3), want[:, :8])
    assert torch.equal(sample_with_past(x, model, 3, sample_logits=False), want[:, 5:8])
    sampled = sample(model, x, 14, temperature=5.0, sample=True, top_k=9)
    assert sampled.shape == (2, 19) and torch.equal(sampled[:, :5], x) and not torch.equal(sampled, want)


def test_top_k_logits():
    assert top_k_logits(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[-torch.inf, 3.0, 2.0]]


def test_kmeans_finds_clusters_and_goes_back():
    truth = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 5.0, 5.0]])
    kmeans = KMeans(ncluster=3, nc=3, niter=10)
    assert not kmeans.is_initialized()
    for seed in range(20):  # Lloyd's algorithm may stop in a local optimum
        torch.manual_seed(seed)
        kmeans.initialize(truth.repeat(100, 1) + 0.01 * torch.randn(300, 3))
        if (torch.cdist(kmeans.C, truth).amin(0) < 0.1).all():
            break
    assert kmeans.is_initialized() and (torch.cdist(kmeans.C, truth).amin(0) < 0.1).all()
    image = truth[torch.randint(3, (2, 4, 6))].permute(0, 3, 1, 2)
    clusters = kmeans(image)
    assert clusters.shape == (2, 24)
    for shape in (image.shape, image.shape[1:]):
        torch.testing.assert_close(kmeans(clusters, reverse=True, shape=shape), image, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="expected"):
        kmeans.initialize(torch.zeros(2, 3))


# ---- calls of 2021


@pytest.mark.parametrize("n_unmasked", [0, 4])
@torch.no_grad()
def test_forward_with_past_gives_what_forward_gives(n_unmasked):
    model, tokens = make(n_unmasked=n_unmasked), torch.randint(V, (3, BLOCK))
    want, loss = model(tokens, targets=tokens)
    logits, first_loss, present = model.forward_with_past(tokens[:, :5], targets=tokens[:, :5])
    assert present.shape == (2, 2, 3, 2, 5, 8)  # layers, keys and values, batch, heads, tokens, channels
    torch.testing.assert_close(logits, want[:, :5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first_loss, model(tokens[:, :5], targets=tokens[:, :5])[1])
    past = [present]
    for start, end in ((5, 6), (6, 7), (7, 10), (10, BLOCK)):
        logits, loss, present = model.forward_with_past(tokens[:, start:end], past=past, past_length=start)
        assert loss is None and present.shape[-2] == end - start
        torch.testing.assert_close(logits, want[:, start:end], rtol=1e-4, atol=1e-5)
        past.append(present)


@torch.no_grad()
def test_forward_with_past_takes_embeddings_first():
    model, tokens, embeddings = make(), torch.randint(V, (2, 4)), torch.randn(2, 3, 16)
    logits, _, present = model.forward_with_past(tokens, embeddings)
    torch.testing.assert_close(logits, model(tokens, embeddings)[0], rtol=1e-4, atol=1e-5)
    assert present.shape[-2] == 7


def test_forward_with_past_names_what_is_wrong():
    model, tokens = make(), torch.randint(V, (1, 4))
    _, _, present = model.forward_with_past(tokens)
    with pytest.raises(ValueError, match="past holds 4 tokens, but past_length is 3"):
        model.forward_with_past(tokens[:, :1], past=[present], past_length=3)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        model.train().forward_with_past(tokens)


def test_configs_take_any_setting_by_name():
    config = GPTConfig(V, BLOCK, n_layer=1, n_head=2, n_embd=16, extra="x")
    assert (config.vocab_size, config.block_size, config.extra, config.resid_pdrop) == (V, BLOCK, "x", 0.1)
    assert not hasattr(GPTConfig(V, BLOCK), "extra")
    x = torch.randn(2, 3, 16)
    assert Block(config).eval()(x).shape == x.shape
    first = GPT1Config(V, BLOCK, n_head=6)
    assert (first.n_layer, first.n_head, first.n_embd) == (12, 6, 768)


def test_a_dummy_adds():
    logits, loss = DummyGPT(3)(torch.tensor([[1, 2]]))
    assert logits.tolist() == [[4, 5]] and loss is None
