"""From sampled codes to images, and the sizes and precisions that a model can generate."""

import torch
from torch import Tensor

from taming.models.cond_transformer import Net2NetTransformer

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


@torch.no_grad()
def decode(model: Net2NetTransformer, codes: Tensor) -> Tensor:
    """Codes (B, h, w) to pictures (B, C, H, W) in [-1, 1], float32, on the CPU.

    In bfloat16 where the transformer is: on a CPU, decoding would take most of the time otherwise. Never in
    float16, beyond whose range a decoder's activations may lie.
    """
    dtype = next(model.transformer.parameters()).dtype
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        images = model.first_stage_model.decode_code(codes)
    return images.float().clamp(-1.0, 1.0).cpu()


def check_size(model: Net2NetTransformer, size: tuple[int, int], source: str) -> None:
    """Raise, with the nearest size that works, unless the model can draw pictures of `size` (H, W) pixels."""
    stage = model.first_stage_model
    smallest, f = stage.image_size, stage.factor
    nearest = tuple(max(least, round(side / f) * f) for side, least in zip(size, smallest, strict=True))
    if nearest != tuple(size):
        raise ValueError(
            f"{source}: {size[0]}x{size[1]} pixels (height x width) cannot be generated: both must be "
            f"multiples of f = {f}, at least {smallest[0]}x{smallest[1]}, as in training; the nearest is "
            f"{nearest[0]}x{nearest[1]}"
        )
