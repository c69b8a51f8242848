"""Vector quantization: replace each latent vector by its nearest codebook entry (van den Oord et al. 2017).

B batch, C = e_dim channels, h w latent grid, K = n_e codes. Every quantizer here has the same interface:
`quantizer(z) -> (z_q, loss, (None, None, indices))`, `get_codebook_entry(indices, shape)`, and `n_e`.
"""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the code (K, C) with the smallest Euclidean distance to each vector (N, C), in float32.

    Under bfloat16 1 to 7 % of the indices would change, so autocast is switched off here.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        z, codebook = z.float(), codebook.float()
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; the first term is the same for every code and left out
        return torch.addmm(codebook.square().sum(1), z, codebook.t(), alpha=-2.0).argmin(1)


class Codebook(nn.Module):
    """What all quantizers share: the number of codes, and optionally a renumbering of those in use.

    Args:
        n_e: number of codes K.
        remap: a .npy file with the codes that stay, in their new order; None keeps all.
        unknown_index: what an index outside them becomes: "random", "extra" (one more index) or a number.
    """

    def __init__(self, n_e: int, remap: str | None, unknown_index: str | int):
        super().__init__()
        self.n_e, self.re_embed, self.remap, self.unknown_index = n_e, n_e, remap, unknown_index
        if remap is not None:
            self.register_buffer("used", torch.from_numpy(np.load(remap)).long())
            self.re_embed = self.used.shape[0]
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Old numbers to new ones; any shape."""
        match = indices[..., None] == self.used  # (..., len(used))
        new, unknown = match.long().argmax(-1), ~match.any(-1)
        if self.unknown_index == "random":
            return torch.where(unknown, torch.randint_like(new, self.re_embed), new)
        return new.masked_fill(unknown, self.unknown_index)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """New numbers back to old ones; the extra index stands for the first code, as in 2021."""
        return self.used[indices.masked_fill(indices >= self.used.shape[0], 0)]


class VectorQuantizer2(Codebook):
    """Nearest-neighbour codebook with a straight-through gradient.

    L = |sg[z] - z_q|^2 + beta |z - sg[z_q]|^2 (van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq. 4).

    Args:
        n_e: number of codes K.
        e_dim: channels of a code.
        beta: weight of the commitment term.
        remap: a .npy file of the codes in use; indices are then counted among these (see `Codebook`).
        unknown_index: what `remap` makes of other codes.
        sane_index_shape: indices come as (B, h, w) instead of flat (B*h*w,).
        legacy: put beta on the codebook term instead, as the 2021 code did; old configs rely on it.
        revive_after: in training, a code that no latent chose for so many batches moves to a latent of the
            batch (Dhariwal et al. 2020, "Jukebox", section 3.1); None leaves dead codes dead, as in 2021.
    """

    def __init__(
        self, n_e: int, e_dim: int, beta: float, remap: str | None = None,
        unknown_index: str | int = "random", sane_index_shape: bool = False, legacy: bool = True,
        revive_after: int | None = None,
    ):
        super().__init__(n_e, remap, unknown_index)
        self.e_dim, self.beta, self.legacy, self.sane_index_shape = e_dim, beta, legacy, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.revive_after = revive_after
        if revive_after is not None:  # only then: the key would be missing in checkpoints of 2021
            self.register_buffer("idle_batches", torch.zeros(n_e, dtype=torch.int64))

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantize z (B, C, h, w) to (z_q, loss, (None, None, indices)), z_q in the codebook's dtype.

        The flags are those of Gumbel quantizers; they ask for logits, which this one has not.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("VectorQuantizer2 has no logits: drop temp, rescale_logits, return_logits")
        with torch.autocast(z.device.type, enabled=False):
            z = rearrange(z.float(), "b c h w -> b h w c")
            indices = nearest_code(z.flatten(0, 2), self.embedding.weight)  # (B*h*w,)
            z_q = self.embedding(indices).float().view(z.shape)
            commitment, codebook = F.mse_loss(z, z_q.detach()), F.mse_loss(z_q, z.detach())
            loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
            z_q = z + (z_q - z).detach()  # the gradient of z_q passes straight to z
            z_q = z_q.to(self.embedding.weight.dtype)
        if self.training and self.revive_after is not None:
            self._revive(z.detach().flatten(0, 2), indices)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if self.sane_index_shape:
            indices = indices.view(z.shape[:3])
        return rearrange(z_q, "b h w c -> b c h w"), loss, (None, None, indices)

    @torch.no_grad()
    def _revive(self, z: Tensor, indices: Tensor) -> None:
        """Count the batches in which each code went unused in all processes, and move those that are dead."""
        used = torch.bincount(indices, minlength=self.n_e) > 0  # (K,)
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:
            used = used.int()
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
        self.idle_batches.copy_(torch.where(used > 0, 0, self.idle_batches + 1))
        dead = self.idle_batches >= self.revive_after
        latents = z[torch.randint(len(z), (self.n_e,), device=z.device)]  # (K, C)
        if distributed:
            dist.broadcast(latents, src=0)
        weight = self.embedding.weight
        weight.copy_(torch.where(dead[:, None], latents.to(weight.dtype), weight))
        self.idle_batches.masked_fill_(dead, 0)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Codes for indices of any shape; with shape (B, h, w, C) as a latent map (B, C, h, w)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        codes = self.embedding(indices)
        return codes if shape is None else rearrange(codes.reshape(shape), "b h w c -> b c h w")
