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
