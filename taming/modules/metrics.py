"""How good a reconstruction is, and how much of a codebook is used.

B batch, C channels, H W pixels; images are in [-1, 1], so the data range is 2.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

DATA_RANGE = 2.0


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, per image.

    Args:
        a, b: images (B, C, H, W) in [-1, 1]; what lies outside is clamped.

    Returns:
        (B,) float32; inf where the images are equal.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _clamped(a, b)
    return 10 * torch.log10(DATA_RANGE**2 / (a - b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, per image: the mean over channels and over all places where the window fits.

    The window is a Gaussian of 11 x 11 pixels, sigma 1.5. Where a side is shorter than 11 pixels, the window
    is cut to the largest odd size that fits; such values compare with each other only. Computed in float32;
    the same as for 8-bit pixels with a data range of 255.
    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    equation 13, K1 = 0.01, K2 = 0.03.

    Args:
        a, b: images (B, C, H, W) in [-1, 1]; what lies outside is clamped.

    Returns:
        (B,) float32 in [-1, 1]; 1 where the images are equal.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = (x + 1 for x in _clamped(a, b))  # 0 is black, as in the paper: the luminance term depends on it
    window = _gaussian(min(11, *a.shape[2:]), 1.5)
    mu_a, mu_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]), window).flatten(2)  # (B, C*h*w)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    numerator = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
    return (numerator / ((mu_a * mu_a + mu_b * mu_b + c1) * (var_a + var_b + c2))).mean(1)


def _clamped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"two batches (B, C, H, W) are needed, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.float().clamp(-1, 1), b.float().clamp(-1, 1)


def _gaussian(room: int, sigma: float) -> list[float]:
    """Make a Gaussian window of the largest odd length up to `room`, with sum 1."""
    radius = (room - 1) // 2
    window = [math.exp(-x * x / (2 * sigma**2)) for x in range(-radius, radius + 1)]
    return [w / sum(window) for w in window]


def _blur(x: Tensor, window: list[float]) -> Tensor:
    """Filter the two last dimensions, where the window fits.

    Written as sums, since a convolution would run in TF32 or bf16 where the variances need all of float32.
    """
    for dim in (-1, -2):
        size = x.shape[dim] - len(window) + 1
        x = sum(w * x.narrow(dim, k, size) for k, w in enumerate(window))
    return x


class CodebookUsage(nn.Module):
    """A histogram of codebook indices, gathered over many batches, and what can be read from it.

    `histogram` (n_codes,) long counts how often each code was used since the last `reset`. It moves with the
    module, and to the indices' device, but is no registered buffer: it belongs in no checkpoint, and
    DistributedDataParallel overwrites every rank's buffers with those of rank 0 at each forward, which would
    lose the other ranks' counts.

    With several ranks call `all_reduce` once before reading, at the same point on every rank, and `reset`
    afterwards.
    """

    def __init__(self, n_codes: int):
        super().__init__()
        if n_codes < 1:
            raise ValueError(f"a codebook has at least one code, got n_codes={n_codes}")
        self.n_codes = n_codes
        # On the CPU even when the model is built on the meta device, since nothing is loaded into it later.
        self.histogram = torch.zeros(n_codes, dtype=torch.long, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodebookUsage":
        super()._apply(fn, recurse)
        device = fn(self.histogram.new_empty(0)).device
        if device.type != "meta":
            self.histogram = self.histogram.to(device)
        return self

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count indices of any shape.

        Raises:
            ValueError: an index outside 0..n_codes-1, on the CPU; an accelerator has its own assertion, and a
                check here would make it wait at every batch.
        """
        indices = indices.detach().flatten().long()
        if indices.device.type == "cpu" and indices.numel():
            lowest, highest = (int(v) for v in indices.aminmax())
            if lowest < 0 or highest >= self.n_codes:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"codebook index {wrong} is outside 0..{self.n_codes - 1}")
        # Never in place: a histogram made in inference mode (validation) may be added to outside of it.
        histogram = self.histogram.to(indices.device)
        self.histogram = histogram.scatter_add(0, indices, torch.ones_like(indices))

    def usage(self) -> Tensor:
        """Fraction of codes that were used at least once: () float32 in [0, 1]."""
        return (self.histogram > 0).float().mean()

    def perplexity(self) -> Tensor:
        """Effective number of codes, exp(entropy in nats): () float32 in [1, n_codes]; 0 before any count."""
        total = self.histogram.sum()
        p = self.histogram / total.clamp_min(1)
        return torch.exp(torch.special.entr(p).sum()) * (total > 0)

    def reset(self) -> None:
        """Forget all counts."""
        self.histogram = torch.zeros_like(self.histogram)

    def all_reduce(self) -> None:
        """Add up the counts of all ranks, where torch.distributed is initialised; every rank must call it."""
        if dist.is_available() and dist.is_initialized():
            total = self.histogram.clone()
            dist.all_reduce(total)
            self.histogram = total
