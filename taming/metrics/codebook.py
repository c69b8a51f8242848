"""How much of a codebook is used."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
            raise ValueError(f"a codebook has at least one code, got codebook_size={n_codes}")
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
