"""Losses of autoencoders of label maps. B batch, L labels, H W pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.parameters import NonNegativeFloat


class BCELoss(nn.Module):
    """Binary cross-entropy of every label at every pixel, on logits."""

    def forward(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss in nats of logits and targets in [0, 1], both (B, L, H, W); logs nothing."""
        return _cross_entropy(prediction, target), {}


class BCELossWithQuant(nn.Module):
    """Binary cross-entropy, plus the quantizer's loss times `codebook_weight`."""

    def __init__(self, codebook_weight: NonNegativeFloat = 1.0):
        super().__init__()
        self.codebook_weight = codebook_weight
        self.terms = ("total_loss", "bce_loss", "quant_loss")  # in the log

    def forward(
        self, qloss: Tensor, target: Tensor, prediction: Tensor, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of logits `prediction`, `target` in [0, 1], (B, L, H, W), and terms to log."""
        bce_loss, qloss = _cross_entropy(prediction, target), qloss.float().mean()
        loss = bce_loss + self.codebook_weight * qloss
        terms = {"total_loss": loss, "bce_loss": bce_loss, "quant_loss": qloss}
        return loss, {f"{split}/{name}": value.detach() for name, value in terms.items()}


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy_with_logits(logits.float(), target.float())
