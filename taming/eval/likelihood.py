"""How likely images are under a prior: the protocol `likelihood`.

B batch, C channels, H W pixels, h w codes.
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.eval.parts import Measured, Parts, batches, joined
from taming.eval.results import VERSION, Result, environment
from taming.eval.sources import DatasetImages, content_hash, hash_of_set, pixels_of
from taming.eval.subject import Subject
from taming.images import from_uint8
from taming.inference.distributed import rank_and_world_size
from taming.metrics import bits_per_dim, nats_per_code, psnr
from taming.models.cond_transformer import Net2NetTransformer

LEVELS = 255  # largest difference of two 8-bit pixels


def evaluate_likelihood(subject: Subject, source: DatasetImages, *, batch_size: int = 16) -> Result | None:
    """Measure the likelihood of images given their conditions; return the result, in the first process alone.

    Metrics: `nats per code`; `bits per dim of the codes`, over C * H * W values, which is the rate at which
    the reconstruction, of the PSNR given beside it, is described; and `bits per dim of the pixels`, an upper
    bound on lossless coding: the codes, then each 8-bit pixel as a logistic around its reconstruction,
    discretized, of one scale that is fitted to the set.

    Raises:
        ValueError: items without the conditions of the model.
    """
    started = time.time()
    parts = Parts(subject.folder, {
        "protocol": "likelihood", "version": VERSION, "images": source.identity(), "subject": subject.about,
    }, len(source))
    parts.measure(lambda numbers: _measure(subject.model, source, numbers, batch_size), "images")
    if rank_and_world_size()[0] != 0:
        return None
    measured = parts.collect()
    nll, (n_codes, dims) = measured["nll"].double(), measured["shape"][0].tolist()
    per_code, of_codes = nats_per_code(nll, n_codes), bits_per_dim(nll, dims)
    of_residual = residual_bits(measured["residual"].double().sum(0))
    parts.remove()
    return Result(
        protocol={
            "name": "likelihood", "version": VERSION, "rounding": "nearest 8-bit",
            "likelihood": subject.model.transformer.likelihood,
            "images": source.describe() | {"sha256": hash_of_set(measured["hash"])},
        },
        metrics={
            "nats per code": per_code.mean, "bits per dim of the codes": of_codes.mean,
            "bits per dim of the pixels": of_codes.mean + of_residual,
            "perplexity": math.exp(per_code.mean), "PSNR": float(measured["psnr"].double().mean()),
        },
        errors={
            "nats per code": per_code.standard_error, "bits per dim of the codes": of_codes.standard_error,
        },
        subject=subject.about, more=environment(started, subject.device) | {"codes per image": n_codes},
    )


def _measure(model: Net2NetTransformer, source: DatasetImages, numbers: list[int], size: int) -> Measured:
    return joined([measure_likelihood(model, source.batch(batch)) for batch in batches(numbers, size)])


@torch.no_grad()
def measure_likelihood(model: Net2NetTransformer, batch: dict[str, Any]) -> Measured:
    """Return what is measured for a batch: nats of each image, and how its reconstruction differs from it."""
    x, c = model.get_xc(batch)  # (B, C, H, W), each condition
    x = x.to(model.device)
    given = [value.to(model.device) for value in ([c] if isinstance(c, Tensor) else c)]
    codes = model.encode_codes(x)  # (B, h, w), or a list of grids
    nll = model.codes_nll(codes, model.encode_conditions(given))
    pixels, again = (pixels_of(images) for images in (x, model.decode_codes(codes)))
    n_codes = model.first_stage_model.num_codes(x.shape[2], x.shape[3])
    return {
        "nll": nll, "psnr": psnr(from_uint8(pixels), from_uint8(again)), "hash": content_hash(pixels),
        "residual": _histogram(pixels, again, x.shape[1]),
        "shape": torch.tensor([n_codes, x[0].numel()]).expand(len(x), 2),
    }


def _histogram(pixels: Tensor, again: Tensor, channels: int) -> Tensor:
    """Count the differences -255..255 of 8-bit pixels (B, 3, H, W), of the first channels: int64 (B, 511)."""
    difference = (pixels[:, :channels].long() - again[:, :channels].long() + LEVELS).flatten(1)
    counts = torch.zeros(len(pixels), 2 * LEVELS + 1, dtype=torch.int64, device=pixels.device)
    return counts.scatter_add_(1, difference, torch.ones_like(difference))


def residual_bits(counts: Tensor) -> float:
    """Return the bits per pixel value of differences -255..255 under the best discretized logistic.

    Args:
        counts: of each difference, (511,), float64.
    """
    difference = torch.arange(-LEVELS, LEVELS + 1, dtype=torch.float64).abs()
    scales = torch.logspace(-2, 2, 400, dtype=torch.float64)[:, None]  # in levels of 8-bit pixels
    # p(d) = sigmoid((d + 1/2) / s) - sigmoid((d - 1/2) / s), in the logarithm; symmetric in d
    low, high = (difference - 0.5) / scales, (difference + 0.5) / scales
    log_p = torch.log(-torch.expm1(low - high)) - F.softplus(low) - F.softplus(-high)
    bits = -(log_p * counts).sum(1) / (math.log(2) * counts.sum())
    return float(bits.min())
