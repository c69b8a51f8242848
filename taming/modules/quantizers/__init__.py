"""Quantizers: latent vectors to codes and back."""

from taming.modules.quantizers.base import Quantizer, QuantizerInfo, nearest_code

__all__ = ["Quantizer", "QuantizerInfo", "nearest_code"]
