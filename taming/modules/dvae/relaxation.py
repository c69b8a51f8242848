"""The Gumbel-softmax relaxation of codes (Jang et al. 2017; Maddison et al. 2017), soft as in DALL-E.

B batch, K codes, h w latent grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.quantizers.base import Quantizer, QuantizerInfo


class GumbelSoftmax(Quantizer):
    """Turns logits into weights of the codes: a soft sample in training, the most likely code in evaluation.

        y = softmax((logits + g) / tau),   g = -ln(-ln u)

    There is no straight-through step: the decoder sees y itself. The loss is the divergence of
    softmax(logits), without noise, from a uniform choice, ln K - H, in nats per code.

    Args:
        size: K.

    Attributes:
        temperature: tau, above 0; the model sets it.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.temperature = size, 1.0

    @property
    def codebook_size(self) -> int:
        """Number of different indices."""
        return self.size

    @property
    def code_dim(self) -> int:
        """Channels of a code: one weight for each of them."""
        return self.size

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Map logits (B, K, h, w) to (weights (B, K, h, w), divergence (), info with indices (B, h, w))."""
        with torch.autocast(z.device.type, enabled=False):
            logits = z.float()
            indices = logits.argmax(1)
            ln_q = F.log_softmax(logits, dim=1)
            divergence = (ln_q.exp() * (ln_q + math.log(self.size))).sum(1).mean()
            if self.training:
                weights = F.gumbel_softmax(logits, tau=self.temperature, dim=1)
            else:
                weights = self.indices_to_codes(indices)
        return weights, divergence, QuantizerInfo(None, None, indices)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return one-hot weights (B, K, ...) of indices (B, ...)."""
        return F.one_hot(indices, self.size).movedim(-1, 1).float()
