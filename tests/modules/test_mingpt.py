"""The GPT: what a position sees, its keys, its limits. The cache is tested with the samplers."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.transformer.mingpt import GPT

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
    with pytest.raises(ValueError, match="n_embd: 16 is no multiple of n_head: 3"):
        make(n_head=3)
    assert make().get_block_size() == BLOCK


def test_builds_without_memory():
    with torch.device("meta"):
        logits, _ = GPT(V, BLOCK, n_layer=1, n_head=2, n_embd=16)(torch.zeros(1, 5, dtype=torch.int64))
    assert logits.shape == (1, 5, V)
