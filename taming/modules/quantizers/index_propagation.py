"""Index propagation: every code has a gradient in each step, so that all stay in use.

Shi et al. 2024, "Taming scalable visual tokenizer for autoregressive image generation" (IBQ).
B batch, C channels, h w latent grid, K codes, N = B h w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.quantizers.base import Quantizer, QuantizerInfo
from taming.modules.quantizers.entropy import MEMORY, in_blocks, softmax_entropies
from taming.modules.quantizers.search import nearest_code
from taming.parameters import NonNegativeFloat, PositiveFloat, PositiveInt


class IBQ(Quantizer):
    """A codebook whose most similar code is taken, with the gradient of a softmax over all codes.

    With p = softmax over codes e of z.e, and k its largest entry, z_q = E^T (onehot(k) - sg[p] + p) (eq. 4).

    L = |z_q - z|^2 + |sg[z_q] - z|^2 + beta |e_k - sg[z]|^2 + w (mean_n H(p_n) - diversity H(mean_n p_n)),
    where p_n of the entropies is the softmax of z.e / entropy_temperature. The key of the codes is that of
    the authors' checkpoints, `embedding.weight` (K, C).

    Args:
        codebook_size, dim: codes K, and their channels C.
        beta: weight of the codebook term.
        entropy_weight: w; 0 leaves the entropies out. They are of training only.
        entropy_temperature: of the softmax in them.
        diversity: weight of the batch's entropy against that of each vector.
        memory: bytes for the probabilities of a block of vectors. Where those of the batch need more, they
            are computed in blocks, and again in the backward pass.
    """

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt, *, beta: NonNegativeFloat = 0.25,
        entropy_weight: NonNegativeFloat = 0.05, entropy_temperature: PositiveFloat = 0.01,
        diversity: NonNegativeFloat = 1.0, memory: PositiveInt = MEMORY,
    ):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.beta, self.entropy_weight, self.diversity = beta, entropy_weight, diversity
        self.entropy_temperature, self.memory = entropy_temperature, memory

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return self.embedding.num_embeddings

    @property
    def code_dim(self) -> int:
        """Channels C of a code."""
        return self.embedding.embedding_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, C, h, w): (z_q (B, C, h, w), loss (), (None, None, indices (B, h, w)))."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  #                                       (B, h, w, C)
            rows, codes = z.flatten(0, -2), self.embedding.weight.float()  #      (N, C), (K, C)
            indices = nearest_code(rows, codes, "inner_product")  #               (N,)
            chosen = F.embedding(indices, codes)  #                               (N, C)
            z_q = chosen
            if torch.is_grad_enabled() and (rows.requires_grad or codes.requires_grad):
                blocks = in_blocks(_mean_code, rows, codes, self.memory)
                mean = torch.cat([block for (block,) in blocks])  #               (N, C)
                z_q = chosen + (mean - mean.detach())
            loss = torch.stack([*self.loss_terms(rows, z_q, chosen, codes).values()]).sum()
            z_q = z_q.view(z.shape).movedim(-1, 1).to(self.embedding.weight.dtype)
        return z_q, loss, QuantizerInfo(None, None, indices.view(z.shape[:-1]))

    def loss_terms(self, z: Tensor, z_q: Tensor, chosen: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name.

        Args:
            z, z_q, chosen: latents, their codes with the gradient of the softmax, and without it, (N, C).
            codes: all codes (K, C).
        """
        terms = {
            "quantized": F.mse_loss(z_q, z), "commitment": F.mse_loss(z, z_q.detach()),
            "codebook": self.beta * F.mse_loss(chosen, z.detach()),
        }
        if self.training and self.entropy_weight > 0:
            sample, batch = softmax_entropies(
                z, codes, self.entropy_temperature, euclidean=False, memory=self.memory
            )
            terms["entropy"] = self.entropy_weight * (sample - self.diversity * batch)
        return terms

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...)."""
        return self.embedding(indices).movedim(-1, 1)


def _mean_code(z: Tensor, codes: Tensor) -> tuple[Tensor]:
    """Return the mean of codes (K, C) by the softmax of their products with vectors (n, C): (n, C).

    Its gradient to the codes is that through the softmax alone.
    """
    return ((z @ codes.t()).softmax(1) @ codes.detach(),)
