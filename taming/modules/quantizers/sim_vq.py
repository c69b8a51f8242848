"""A fixed random codebook under a learned linear map: one step moves all codes.

Zhu et al. 2024, "Addressing representation collapse in vector quantized models with one linear layer".
B batch, C channels, h w latent grid, K codes, N = B h w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.quantizers.base import Quantizer, QuantizerInfo
from taming.modules.quantizers.estimators import Estimator, check_estimator, estimate
from taming.modules.quantizers.search import nearest_code
from taming.parameters import NonNegativeFloat, PositiveInt


class SimVQ(Quantizer):
    """Codes e = W c of a fixed codebook c, of which only W is learned.

    L = |sg[z] - e|^2 + beta |z - sg[e]|^2, e the code nearest to z. Keys: `frozen_codebook` (K, C') and
    `code_transform.weight` (C, C'), as in vector-quantize-pytorch.

    Args:
        codebook_size, dim: codes K, and their channels C.
        frozen_dim: channels C' of the fixed codebook; None: C.
        estimator: "straight_through", "rotation" or "diveq".
        beta: weight of the commitment.
    """

    frozen_codebook: Tensor

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt, *, frozen_dim: PositiveInt | None = None,
        estimator: Estimator = "straight_through", beta: NonNegativeFloat = 0.25,
    ):
        super().__init__()
        width = frozen_dim or dim
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, width) * width**-0.5)
        self.code_transform = nn.Linear(width, dim, bias=False)
        self.beta, self.estimator = beta, check_estimator(estimator)

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return len(self.frozen_codebook)

    @property
    def code_dim(self) -> int:
        """Channels C of a code."""
        return self.code_transform.out_features

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, C, h, w): (z_q (B, C, h, w), loss (), (None, None, indices (B, h, w)))."""
        weight = self.code_transform.weight
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  #                                    (B, h, w, C)
            with torch.no_grad():
                codes = self.code_transform(self.frozen_codebook)  #           (K, C)
                indices = nearest_code(z.flatten(0, -2), codes)  #             (N,)
            fixed = F.embedding(indices, self.frozen_codebook)  #              (N, C')
            e = F.linear(fixed.float(), weight.float()).view(z.shape)  #       with a gradient to W
            loss = F.mse_loss(e, z.detach()) + self.beta * F.mse_loss(z, e.detach())
            z_q = estimate(z, e, self.estimator, self.training).to(weight.dtype).movedim(-1, 1)
        return z_q, loss, QuantizerInfo(None, None, indices.view(z.shape[:-1]))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...)."""
        return self.code_transform(F.embedding(indices, self.frozen_codebook)).movedim(-1, 1)
