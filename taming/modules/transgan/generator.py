"""TransGAN's generator: transformer stages, each on a grid twice as fine with a quarter of the channels.

Source: Jiang, Chang and Wang 2021, "TransGAN: Two transformers can make one strong GAN", arXiv 2102.07074,
the first version; parameter names are those of its published code. B batch, S stages, h w grid of a stage,
N = h*w tokens in raster order, C channels of a stage, H W pixels of the image.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.modules.transgan.blocks import Block
from taming.modules.transgan.locality import Kind, locality_mask
from taming.parameters import Length, PositiveInt


def upsample(x: Tensor, height: int, width: int) -> Tensor:
    """Rearrange tokens (B, height * width, C) to twice the grid, (B, 4 * height * width, C / 4)."""
    x = x.transpose(1, 2).unflatten(2, (height, width))  #  (B, C, h, w)
    return F.pixel_shuffle(x, 2).flatten(2).transpose(1, 2)


class TransGANGenerator(nn.Module):
    """Generates images (B, 3, H, W), about in [-1, 1], of latents (B, latent_dim).

    Args:
        resolution: size of the images, a side or (height, width), in pixels.
        dim: channels of the first stage; a quarter of them in each further one.
        depths: number of blocks of each stage; S of them.
        latent_dim: size of z; `dim` when None.
        heads: attention heads, in every stage.
        entry_stage: stage, counted from 1, at which images of low resolution enter: see `super_resolve`. Not
            for sampling alone.
        mask_kind: see `locality_mask`.
        mask_all_blocks: mask all blocks of the last stage, rather than its last block, as published.
        fused_attention: use torch's fused kernel; a gradient penalty differentiates the generator once.

    Raises:
        ValueError: a size that is not a multiple of 2 ** (S - 1), channels that stages or heads do not
            divide, or an entry stage that is not one of 2 to S.
    """

    def __init__(
        self, resolution: Resolution, dim: PositiveInt,
        depths: Annotated[Sequence[PositiveInt], Length(1)] = (5, 2, 2),
        latent_dim: PositiveInt | None = None, heads: PositiveInt = 4,
        entry_stage: PositiveInt | None = None, *, mask_kind: Kind = "2d", mask_all_blocks: bool = False,
        fused_attention: bool = True,
    ):
        super().__init__()
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        finer = len(depths) - 1  # stages after the first
        if height % 2**finer or width % 2**finer:
            raise ValueError(
                f"images of {height}x{width} pixels are not a multiple of {2**finer}, for {len(depths)} "
                "stages: change resolution, or the number of depths"
            )
        if dim % (4**finer * heads):
            raise ValueError(
                f"dim: {dim} is not a multiple of {4**finer * heads}: each of {finer} stages after the first "
                f"has a quarter of the channels, which {heads} heads divide"
            )
        if entry_stage is not None and not 2 <= entry_stage <= len(depths):
            raise ValueError(
                f"entry_stage: {entry_stage} must be a stage after the first, 2 to {len(depths)}: images of "
                "low resolution take the place of its input"
            )
        self.resolution = resolution
        self.image_size, self.latent_dim, self.entry_stage = (height, width), latent_dim or dim, entry_stage
        self.mask_kind, self.mask_all_blocks = mask_kind, mask_all_blocks
        self.grids = [(height >> finer - k, width >> finer - k) for k in range(len(depths))]
        self.dims = [dim // 4**k for k in range(len(depths))]

        (h, w), tokens = self.grids[0], [h * w for h, w in self.grids]
        self.l1 = nn.Linear(self.latent_dim, h * w * dim)
        for k, (n, channels) in enumerate(zip(tokens, self.dims, strict=True), 1):
            self.register_parameter(f"pos_embed_{k}", nn.Parameter(torch.empty(1, n, channels)))
        self.blocks, *stages = [
            nn.ModuleList(Block(channels, heads, fused_attention) for _ in range(depth))
            for channels, depth in zip(self.dims, depths, strict=True)
        ]
        self.upsample_blocks = nn.ModuleList(stages)
        to_rgb = nn.Conv2d(self.dims[-1], 3, 1)
        nn.init.xavier_uniform_(to_rgb.weight)
        self.deconv = nn.Sequential(to_rgb)
        self.from_rgb = None if entry_stage is None else nn.Linear(3, self.dims[entry_stage - 1])
        self._masks: dict[tuple[int, torch.device], Tensor] = {}
        self.register_load_state_dict_pre_hook(_drop_unused)
        for k in range(1, len(depths) + 1):
            nn.init.trunc_normal_(self.get_parameter(f"pos_embed_{k}"), std=0.02)

    def forward(self, z: Tensor, radius: int | None = None) -> Tensor:
        """Generate images (B, 3, H, W) of latents (B, latent_dim).

        With a `radius`, queries of the last stage see no further: see `taming.modules.transgan.locality`.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"latents are (B, {self.latent_dim}), the latent_dim; got {tuple(z.shape)}")
        x = self.l1(z).unflatten(1, (-1, self.dims[0]))  #               (B, N_1, C_1)
        x = self._stage(x, 1, radius)
        return self._finish(x, 2, radius)

    def super_resolve(self, low: Tensor, radius: int | None = None) -> Tensor:
        """Enlarge images (B, 3, h, w) of the grid of the entry stage to (B, 3, H, W).

        A linear layer takes the place of the stages before, which get no gradient.

        Raises:
            ValueError: no entry stage, or images of another size.
        """
        if self.entry_stage is None or self.from_rgb is None:
            raise ValueError("the generator takes no images: set entry_stage, to 2 for instance")
        grid = self.grids[self.entry_stage - 1]
        if tuple(low.shape[2:]) != grid:
            wanted, found = (f"{h}x{w}" for h, w in (grid, low.shape[2:]))
            raise ValueError(f"the entry stage takes images of {wanted} pixels, got {found}")
        x = self.from_rgb(low.flatten(2).transpose(1, 2))  #             (B, N_e, C_e)
        x = self._stage(x, self.entry_stage, radius)
        return self._finish(x, self.entry_stage + 1, radius)

    def _finish(self, x: Tensor, first: int, radius: int | None) -> Tensor:
        """Run stages `first` to S, each after an upsampling, and map tokens to pixels."""
        for k in range(first, len(self.grids) + 1):
            x = upsample(x, *self.grids[k - 2])  #                       (B, 4 N, C / 4)
            x = self._stage(x, k, radius)
        return self.deconv(x.transpose(1, 2).unflatten(2, self.image_size))  # (B, 3, H, W)

    def _stage(self, x: Tensor, k: int, radius: int | None) -> Tensor:
        """Add positions to tokens (B, N, C) and run the blocks of stage `k`, counted from 1."""
        x = x + self.get_parameter(f"pos_embed_{k}")
        blocks = [*(self.blocks if k == 1 else self.upsample_blocks[k - 2])]  # type: ignore[misc]
        mask = self._mask(radius, x.device) if radius is not None and k == len(self.grids) else None
        for block in blocks:
            x = block(x, mask if self.mask_all_blocks or block is blocks[-1] else None)
        return x

    def _mask(self, radius: int, device: torch.device) -> Tensor:
        if (radius, device) not in self._masks:  # one at a time: a radius is not used again
            self._masks = {(radius, device): locality_mask(*self.grids[-1], radius, self.mask_kind, device)}
        return self._masks[radius, device]


def _drop_unused(module: nn.Module, state: dict, prefix: str, *args: object) -> None:
    """Drop a normalization that the published code has in its files, and does not use."""
    for name in [name for name in state if name.startswith(f"{prefix}to_rgb.")]:
        del state[name]
