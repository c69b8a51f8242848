"""Entropies of the choice of codes: exact, in blocks, in little memory, over processes."""

import pytest
import torch

from taming.modules.quantizers.bits import indices_to_bits
from taming.modules.quantizers.entropy import bit_entropies, softmax_entropies
from taming.modules.quantizers.index_propagation import IBQ
from taming.modules.quantizers.lookup_free import BSQ, LFQ
from taming.modules.quantizers.vector import VQ
from tests.modules.quantizers.memory import PeakBytes
from tests.ranks import on_two_ranks


def naive(z, codes, temperature, eps, euclidean=True):
    logits = -torch.cdist(z, codes).square() if euclidean else z @ codes.t()
    p = (logits / temperature).softmax(1)
    entropy = torch.special.entr
    return entropy(p).sum(1).mean(), -(p.mean(0) * (p.mean(0) + eps).log()).sum()


@pytest.mark.parametrize("euclidean", [True, False])
@pytest.mark.parametrize("memory", [1 << 28, 4 * 6 * 50 * 3])
def test_entropies_of_a_softmax(euclidean, memory):
    z, codes = torch.randn(20, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    got = softmax_entropies(z, codes, 0.7, euclidean, memory=memory)
    want = naive(z, codes, 0.7, 1e-5, euclidean)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(x, [z, codes], retain_graph=True) for x in (ours, theirs)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_entropies_of_bits_are_those_of_all_codes(bits, eps):
    z = torch.randn(20, bits, dtype=torch.float64, requires_grad=True)
    codes = 0.3 * (2 * indices_to_bits(torch.arange(2**bits), bits).double() - 1)
    got, want = bit_entropies(z, 0.4, 0.3, eps), naive(z, codes, 0.4, eps)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(x, z, retain_graph=True) for x in (ours, theirs)]
        torch.testing.assert_close(*gradients)


def test_sure_and_unused_codes_have_no_entropy():
    sample, batch = bit_entropies(torch.full((5, 4), 1e4), 0.01, eps=0.0)
    assert sample == 0 and batch == 0
    z = torch.full((5, 4), 1e4, requires_grad=True)
    sum(bit_entropies(z, 0.01, eps=0.0)).backward()
    assert z.grad.isfinite().all()


LARGE = 1 << 18
MEGABYTE = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(("make", "latents", "limit"), [
    (lambda: LFQ(LARGE), 4096, 128 * MEGABYTE),
    (lambda: BSQ(LARGE), 4096, 128 * MEGABYTE),
    (lambda: IBQ(LARGE, 8, memory=32 * MEGABYTE), 128, 96 * MEGABYTE),
    (lambda: VQ(LARGE, 8, l2_normalize=True, decay=0.99, revive_after=5), 512, 192 * MEGABYTE),
], ids=["LFQ", "BSQ", "IBQ", "VQ"])
def test_a_step_with_a_large_codebook_takes_little_memory(make, latents, limit):
    """All tensors of a step, the gradient of the codebook among them; N x K alone would be 268 MB or more."""
    quantizer = make().train()
    z = torch.randn(1, quantizer.code_dim, 16, latents // 16, requires_grad=True)
    with PeakBytes() as memory:
        z_q, loss, _ = quantizer(z)
        (z_q.square().mean() + loss).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    print(f"{type(quantizer).__name__}: {memory.peak / MEGABYTE:.0f} MiB for {latents} latents")
    assert memory.peak < limit < 4 * latents * LARGE


def gradients(rank):
    torch.manual_seed(0)
    z, codes = torch.randn(12, 4), torch.randn(9, 4, requires_grad=True)
    mine = z.chunk(2)[rank].clone().requires_grad_() if rank is not None else z.requires_grad_()
    sample, batch = softmax_entropies(mine, codes, 0.5, euclidean=True)
    batch.backward()
    return batch.detach(), mine.grad, codes.grad


def test_the_entropy_of_a_batch_is_that_of_all_processes(tmp_path):
    """Its gradients, averaged as `ddp` does, are those of one process with the whole batch."""
    parts, (batch, of_z, of_codes) = on_two_ranks(gradients, tmp_path / "ranks"), gradients(None)
    for value, _, _ in parts:
        torch.testing.assert_close(value, batch)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, of_z)
    torch.testing.assert_close((parts[0][2] + parts[1][2]) / 2, of_codes)
