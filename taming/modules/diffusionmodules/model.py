"""Convolutional encoder and decoder of the VQGAN (the folder's name is historic: there is no diffusion here).

The U-Net halves of Ho et al. (2020), as used by Esser et al. (2021, appendix B). The attribute names are the
keys of published checkpoints.

B batch, C channels, H W pixels, h w latent grid, f = 2 ** (len(ch_mult) - 1) = H / h.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def nonlinearity(x: Tensor) -> Tensor:
    """Swish, x * sigmoid(x) (Ramachandran et al. 2017)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Group normalisation with the eps that published checkpoints were trained with."""
    if in_channels % num_groups:
        raise ValueError(
            f"{in_channels} channels cannot be normalised in {num_groups} groups: "
            f"make ch * ch_mult a multiple of {num_groups}"
        )
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then smooth with a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve H and W: a strided 3x3 convolution if `with_conv`, else average pooling."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the weights were trained
        return F.avg_pool2d(x, kernel_size=2)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip connection.

    `temb` (B, temb_channels), where there is one, shifts the channels between them; no VQGAN has it.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int | None = None, conv_shortcut: bool = False,
        dropout: float = 0.0, temb_channels: int = 0, num_groups: int = 32,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map (B, C, h, w), with a skip connection."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        # strided ones miss torch's fused kernel on a CPU, and the (h*w)**2 scores are kept
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C), scaled by C ** -0.5
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


def _attention(channels: int, num_groups: int, attn_type: str) -> nn.Module:
    """Self-attention, or nothing in its place: `attn_type` "vanilla" or "none"."""
    if attn_type not in ("vanilla", "none"):
        raise ValueError(f'ddconfig.attn_type: {attn_type!r} is unknown; choose "vanilla" or "none"')
    return AttnBlock(channels, num_groups) if attn_type == "vanilla" else nn.Identity()


def _level(channels: list[int], attend: bool, dropout: float, num_groups: int, attn_type: str) -> nn.Module:
    """One resolution: residual blocks channels[0] -> channels[1] -> ..., each with attention if asked."""
    level = nn.Module()
    level.block = nn.ModuleList(
        ResnetBlock(in_channels=a, out_channels=b, dropout=dropout, num_groups=num_groups)
        for a, b in zip(channels, channels[1:], strict=False)
    )
    level.attn = nn.ModuleList(_attention(c, num_groups, attn_type) for c in channels[1:] if attend)
    return level


def _middle(channels: int, dropout: float, num_groups: int, attn_type: str) -> nn.Module:
    """Residual block, attention, residual block at the lowest resolution."""
    middle = nn.Module()
    middle.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, num_groups=num_groups)
    middle.attn_1 = _attention(channels, num_groups, attn_type)
    middle.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, num_groups=num_groups)
    return middle


def _run_level(level: nn.Module, h: Tensor) -> Tensor:
    for i, block in enumerate(level.block):
        h = block(h)
        if level.attn:
            h = level.attn[i](h)
    return h


def _run_middle(middle: nn.Module, h: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(h)))


class Encoder(nn.Module):
    """Map images (B, in_channels, H, W) to latents (B, z_channels, H/f, W/f).

    Args:
        ch: channels at full resolution, a multiple of `num_groups`.
        out_ch: channels of the decoded image (the decoder's; taken so that both halves share one `ddconfig`).
        ch_mult: multiple of `ch` at each resolution; each but the last halves H and W.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions, counted in pixels from `resolution` down, that get attention.
        dropout: rate inside the residual blocks.
        resamp_with_conv: halve by a strided convolution, not by average pooling.
        resolution: the training size in pixels; it only places the attention, and any multiple of f will do.
        double_z: twice `z_channels`, the mean and log-variance of a KL autoencoder; a VQGAN has it off.
        num_groups: groups of the normalisation, 32 in the paper. A group should hold several channels: alone
            in it, a channel loses its mean, and with it the picture's colour. Small nets want 8.
        attn_type: "vanilla", or "none" to leave out all attention, that of the lowest resolution too, as
            latent diffusion's vq-f4-noattn does.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: tuple[int, ...] = (1, 2, 4, 8), num_res_blocks: int,
        attn_resolutions: tuple[int, ...], dropout: float = 0.0, resamp_with_conv: bool = True,
        in_channels: int, resolution: int, z_channels: int, double_z: bool = True, num_groups: int = 32,
        attn_type: str = "vanilla",
    ):
        super().__init__()
        self.ch, self.num_resolutions, self.num_res_blocks = ch, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        block_in = ch
        for i, mult in enumerate(ch_mult):
            attend = resolution // 2**i in attn_resolutions
            level = _level([block_in] + [ch * mult] * num_res_blocks, attend, dropout, num_groups, attn_type)
            block_in = ch * mult
            if i != len(ch_mult) - 1:
                level.downsample = Downsample(block_in, resamp_with_conv)
            self.down.append(level)
        self.mid = _middle(block_in, dropout, num_groups, attn_type)
        self.norm_out = Normalize(block_in, num_groups)
        out_channels = 2 * z_channels if double_z else z_channels
        self.conv_out = nn.Conv2d(block_in, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = _run_level(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = _run_middle(self.mid, h)  # (B, ch * ch_mult[-1], h, w)
        return self.conv_out(nonlinearity(self.norm_out(h)))  # (B, z_channels, h, w)

    @property
    def factor(self) -> int:
        """Pixels of each side that make one latent position: f."""
        return 2 ** (self.num_resolutions - 1)


class Decoder(nn.Module):
    """Map latents (B, z_channels, h, w) to images (B, out_ch, h*f, w*f); arguments as for `Encoder`.

    `in_channels` and `double_z` are the encoder's, taken so that both halves share one `ddconfig`. With
    `give_pre_end` the features before the last normalisation are returned.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: tuple[int, ...] = (1, 2, 4, 8), num_res_blocks: int,
        attn_resolutions: tuple[int, ...], dropout: float = 0.0, resamp_with_conv: bool = True,
        in_channels: int, resolution: int, z_channels: int, give_pre_end: bool = False, double_z: bool = True,
        num_groups: int = 32, attn_type: str = "vanilla",
    ):
        super().__init__()
        self.ch, self.num_resolutions, self.num_res_blocks = ch, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels, self.give_pre_end = resolution, in_channels, give_pre_end
        block_in = ch * ch_mult[-1]
        lowest = resolution // 2 ** (len(ch_mult) - 1)
        self.z_shape = (1, z_channels, lowest, lowest)
        self.conv_in = nn.Conv2d(z_channels, block_in, kernel_size=3, padding=1)
        self.mid = _middle(block_in, dropout, num_groups, attn_type)
        levels = []
        for i in reversed(range(len(ch_mult))):
            attend = resolution // 2**i in attn_resolutions
            channels = [block_in] + [ch * ch_mult[i]] * (num_res_blocks + 1)
            level = _level(channels, attend, dropout, num_groups, attn_type)
            block_in = ch * ch_mult[i]
            if i != 0:
                level.upsample = Upsample(block_in, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up[0] is full resolution: the order of checkpoint keys
        self.norm_out = Normalize(block_in, num_groups)
        self.conv_out = nn.Conv2d(block_in, out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _run_middle(self.mid, self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = _run_level(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h  # (B, ch * ch_mult[0], H, W)
        return self.conv_out(nonlinearity(self.norm_out(h)))  # (B, out_ch, H, W)
