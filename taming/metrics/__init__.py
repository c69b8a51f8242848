"""Numbers from tensors: how good a reconstruction is, and how much of a codebook is used."""

from taming.metrics.codebook import CodebookUsage
from taming.metrics.images import psnr, ssim

__all__ = ["CodebookUsage", "psnr", "ssim"]
