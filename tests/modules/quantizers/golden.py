"""What tests of quantizers share: golden cases, and maps as rows."""

import torch

from tests.test_golden import read

__all__ = ["as_map", "as_rows", "close", "read"]


def as_map(rows):
    """Vectors (B, N, C) of a case as latents (B, C, 1, N)."""
    return rows.movedim(-1, 1)[:, :, None]


def as_rows(z):
    """Latents (B, C, 1, N) as vectors (B, N, C)."""
    return z[:, :, 0].movedim(1, -1)


def close(got, want, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(got.detach(), want, rtol=rtol, atol=atol)


def load_codebooks(state, modules):
    """Give each `VQ` the buffers of a codebook of vector-quantize-pytorch, head h of layer l at l + h."""
    layers = sorted({key.split("_codebook.")[0] for key in state if "_codebook." in key})
    books = [
        {ours: state[f"{layer}_codebook.{theirs}"][head] for ours, theirs in NAMES.items()}
        for layer in layers for head in range(len(state[f"{layer}_codebook.embed"]))
    ]
    for module, book in zip(modules, books, strict=False):
        module.embedding.load_state_dict(book)


NAMES = {"weight": "embed", "cluster_size": "cluster_size", "embed_avg": "embed_avg"}
