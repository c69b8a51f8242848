"""How much of a codebook is used."""

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Counts codebook indices over many batches; `compute` gives usage and perplexity over all processes.

    The counts, `histogram` (K,) int64, are in no checkpoint. `compute` sums them over processes where
    torch.distributed is initialised, so every process must call it.

    Args:
        codebook_size: number of codes K.
    """

    histogram: Tensor
    full_state_update = False

    def __init__(self, codebook_size: int):
        super().__init__()
        if codebook_size < 1:
            raise ValueError(f"a codebook has at least one code, got codebook_size={codebook_size}")
        self.codebook_size = codebook_size
        # on the CPU also when the model is built on the meta device: nothing is loaded into it later
        counts = torch.zeros(codebook_size, dtype=torch.int64, device="cpu")
        self.add_state("histogram", default=counts, dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count indices of any shape.

        Raises:
            ValueError: an index outside 0..codebook_size-1, on the CPU; an accelerator has its own assertion,
                and a check here would make it wait at every batch.
        """
        indices = indices.detach().flatten().long()
        if indices.device.type == "cpu" and indices.numel():
            lowest, highest = (int(v) for v in indices.aminmax())
            if lowest < 0 or highest >= self.codebook_size:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"codebook index {wrong} is outside 0..{self.codebook_size - 1}")
        # never in place: counts made in inference mode (validation) may be added to outside of it
        histogram = self.histogram.to(indices.device)
        self.histogram = histogram.scatter_add(0, indices, torch.ones_like(indices))

    def compute(self) -> dict[str, Tensor]:
        """Return float32 scalars by name.

        `usage`: the share of codes used at least once, in [0, 1]. `perplexity`: the effective number of
        codes, exp(entropy in nats), in [1, codebook_size]; 0 before any count.
        """
        total = self.histogram.sum()
        p = self.histogram / total.clamp_min(1)
        perplexity = torch.exp(torch.special.entr(p).sum()) * (total > 0)
        return {"usage": (self.histogram > 0).float().mean(), "perplexity": perplexity}
