"""Linear layers with reordered weights: equal to the plain ones."""

import pytest
import torch
from torch import nn

from taming.modules.transformer.cpu_inference import PackedLinear, can_pack, pack_linears
from taming.modules.transformer.mingpt import GPT
from taming.sampling import image_generators, sample_tokens

CPU = torch.device("cpu")

with torch.no_grad():
    needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="torch without oneDNN")


@needs_packing
@pytest.mark.parametrize("shape", [(1, 12), (8, 12), (3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_packed_layer_gives_what_the_plain_one_gives(shape, bias):
    linear, x = nn.Linear(12, 7, bias=bias), torch.randn(shape)
    packed = PackedLinear(linear, shape[0], torch.float32)
    torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


@needs_packing
@torch.no_grad()
def test_under_autocast_it_computes_as_autocast_does():
    linear, x = nn.Linear(64, 32), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        want = linear(x)
        got = PackedLinear(linear, 4, torch.bfloat16)(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@needs_packing
@torch.no_grad()
def test_a_twin_leaves_the_original_alone_and_shares_what_is_not_linear():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Special(4, 4), hooked)
    plain = module[0]
    twin = pack_linears(module, 2, torch.float32)
    assert module[0] is plain and isinstance(twin[0], PackedLinear)
    assert all(twin[i] is module[i] for i in (1, 2, 3))
    x = torch.randn(2, 4)
    torch.testing.assert_close(twin(x), module(x), rtol=1e-5, atol=1e-5)
    assert pack_linears(module[1], 2, torch.float32) is module[1]


def test_nothing_is_packed_where_gradients_may_be_wanted_or_the_dtype_is_not_supported():
    assert not can_pack(CPU, torch.float32)  # gradients are enabled here
    with torch.no_grad():
        assert not can_pack(CPU, torch.float16)
        assert not can_pack(torch.device("cuda"), torch.float32)


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("n_unmasked", [0, 4])
def test_long_sampling_uses_it_and_samples_the_same_tokens(n_unmasked):
    model = GPT(31, 80, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked).eval()
    for parameter in model.parameters():
        parameter.mul_(8.0) if parameter.ndim > 1 else None
    model.pos_emb.normal_(0, 0.5)
    prefix, steps = torch.randint(31, (3, 4)), 76
    assert isinstance(model.new_cache(3, 80).head, PackedLinear)
    assert model.new_cache(3, 20).head is model.head  # too short to be worth it
    tokens = prefix
    for _ in range(steps):
        tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(sample_tokens(model, prefix, steps, greedy=True), tokens[:, 4:])
    together = sample_tokens(model, prefix, steps, top_k=9, generator=image_generators(0, range(3)))
    alone = sample_tokens(model, prefix[1:2], steps, top_k=9, generator=image_generators(0, [1]))
    assert torch.equal(together[1:2], alone)
    with torch.no_grad():  # the weights of the moment are used, not those of an earlier call
        model.head.weight.neg_()
    assert not torch.equal(sample_tokens(model, prefix, steps, greedy=True), tokens[:, 4:])
