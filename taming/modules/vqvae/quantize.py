"""Vector quantization: replace each latent vector by a codebook entry (van den Oord et al. 2017).

The quantizers of 2021 under their names, arguments and keys, on the contract of
`taming.modules.quantizers.base`. B batch, C = e_dim channels, h w latent grid, K = n_e codes.
"""

import io
import math
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.distributed import all_reduce_sum, is_distributed
from taming.modules.quantizers.base import (
    Quantizer,
    QuantizerInfo,
    count_codes,
    is_finite,
    kmeans,
    nearest_code,
    sum_by_code,
)
from taming.util import read_bytes

MAX_HEADER = 4096  # bytes of the header of a .npy file


def _codes_in(path: str, n_e: int) -> Tensor:
    """Read the codes (n,), n <= n_e, of a .npy file, which must be as large as its header says."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"remap: there is no file {path}")
    data = read_bytes(path, "remap: codes file", max_bytes=MAX_HEADER + 8 * n_e)
    try:
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise ValueError(f"remap: {path} is damaged or not a .npy file of numbers") from error
    if not isinstance(codes, np.ndarray) or codes.ndim != 1 or codes.dtype.kind not in "iu":
        raise ValueError(f"remap: {path} must hold one row of whole numbers, the codes in use")
    return torch.tensor(codes, dtype=torch.long)


class Codebook(Quantizer):
    """A codebook, optionally with new numbers for the codes in use.

    Args:
        n_e: number of codes K.
        remap: a .npy file with the codes that stay, in their new order; None keeps all.
        unknown_index: new number of any other code: "random", "extra" (one more index) or an integer.
    """

    e_dim: int
    used: Tensor  # (codes in use,) int64; only with `remap`

    def __init__(self, n_e: int, remap: str | None, unknown_index: str | int):
        super().__init__()
        self.n_e, self.re_embed, self.remap, self.unknown_index = n_e, n_e, remap, unknown_index
        if remap is not None:
            self.register_buffer("used", _codes_in(remap, n_e))
            self.re_embed = len(self.used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1

    @property
    def codebook_size(self) -> int:
        """Number of different indices: those in use, where they are renumbered."""
        return self.re_embed

    @property
    def code_dim(self) -> int:
        """Channels C of a code."""
        return self.e_dim

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Return the codes (..., C) of indices (...); with `shape` (B, h, w, C), as a map (B, C, h, w)."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...)."""
        return self.get_codebook_entry(indices).movedim(-1, 1)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Map old numbers of codes, of any shape, to new ones."""
        match = inds[..., None].eq(self.used)  # (..., len(used))
        new, unknown = match.long().argmax(-1), ~match.any(-1)
        if self.unknown_index == "random":
            return torch.where(unknown, torch.randint_like(new, self.re_embed), new)
        return new.masked_fill(unknown, int(self.unknown_index))

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Map new numbers of codes to old ones; the extra index becomes the first code, as in 2021."""
        return self.used[inds.masked_fill(inds >= len(self.used), 0)]

    def _entry(self, codes: Tensor, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """Return rows of the codes (K, C); see `get_codebook_entry`."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        entries = F.embedding(indices, codes)
        return entries if shape is None else rearrange(entries.reshape(shape), "b h w c -> b c h w")


class VectorQuantizer2(Codebook):
    """Nearest-neighbor codebook with a straight-through gradient.

    L = |sg[z] - z_q|^2 + beta |z - sg[z_q]|^2 (van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq. 4).

    Args:
        n_e: number of codes K.
        e_dim: channels of a code.
        beta: weight of the commitment term.
        remap, unknown_index: new numbers for the codes in use; see `Codebook`.
        sane_index_shape: indices come as (B, h, w) instead of flat (B*h*w,).
        legacy: put beta on the codebook term instead, as the 2021 code did; old configs rely on it.
        revive_after: in training, a code that no latent chose for this number of batches moves to a latent
            of the batch (Dhariwal et al. 2020, "Jukebox", section 3.1); None leaves dead codes dead.
        kmeans_steps: begin with the centres of clusters of the first training batch, found in so many steps
            of k-means (Lancucki et al. 2020, "Robust training of vector quantized bottleneck models"); 0
            begins with random codes.
    """

    embedding: "nn.Embedding | EmbeddingEMA"
    idle_batches: Tensor  # (K,) int64: batches since a code was last used; only with `revive_after`
    has_begun: Tensor  # (), whether the clusters were looked for; only with `kmeans_steps`

    def __init__(
        self, n_e: int, e_dim: int, beta: float, remap: str | None = None,
        unknown_index: str | int = "random", sane_index_shape: bool = False, legacy: bool = True,
        revive_after: int | None = None, kmeans_steps: int = 0,
    ):
        super().__init__(n_e, remap, unknown_index)
        self.e_dim, self.beta, self.legacy, self.sane_index_shape = e_dim, beta, legacy, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.revive_after = revive_after
        if revive_after is not None:  # only then: the key would be missing in checkpoints of 2021
            self.register_buffer("idle_batches", torch.zeros(n_e, dtype=torch.int64))
        self.kmeans_steps, self._begins = kmeans_steps, kmeans_steps > 0
        if kmeans_steps > 0:  # only then, for the same reason
            self.register_buffer("has_begun", torch.tensor(False))

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, C, h, w): (z_q (B, C, h, w) in the codebook's dtype, loss, (None, None, indices)).

        The other arguments are those of Gumbel quantizers, and have one allowed value.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("VectorQuantizer2 has no logits: drop temp, rescale_logits, return_logits")
        with torch.autocast(z.device.type, enabled=False):
            z = rearrange(z.float(), "b c h w -> b h w c")
            if self.training and self._begins:
                self._begin(z.detach().flatten(0, 2))
            indices = nearest_code(z.flatten(0, 2), self.embedding.weight)  # (B*h*w,)
            z_q = self.embedding(indices).float().view(z.shape)
            loss = self._loss(z, z_q)
            z_q = z + (z_q - z).detach()  # the gradient of z_q goes straight to z
            z_q = z_q.to(self.embedding.weight.dtype)
        if self.training:
            rows = z.detach().flatten(0, 2)
            self._after_batch(rows, torch.where(is_finite(rows), indices, self.n_e))
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if self.sane_index_shape:
            indices = indices.view(z.shape[:3])
        return rearrange(z_q, "b h w c -> b c h w"), loss, QuantizerInfo(None, None, indices)

    @torch.no_grad()
    def _begin(self, z: Tensor) -> None:
        """Put the codes on clusters of the latents (N, C) of the first training batch."""
        if not self.has_begun:  # waits for the device, once
            z = z[is_finite(z)]
            if all_reduce_sum(torch.tensor(float(len(z) == 0), device=z.device)):
                return  # on all processes: the next batch may do
            all_codes = torch.ones(self.n_e, dtype=torch.bool, device=z.device)
            self.move_codes(all_codes, kmeans(z, self.n_e, self.kmeans_steps))
            self.has_begun.fill_(True)
        self._begins = False

    def _loss(self, z: Tensor, z_q: Tensor) -> Tensor:
        commitment, codebook = F.mse_loss(z, z_q.detach()), F.mse_loss(z_q, z.detach())
        return commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook

    @torch.no_grad()
    def _after_batch(self, z: Tensor, indices: Tensor) -> None:
        """Update the codebook, apart from gradients, by a training batch: latents (N, C), codes (N,).

        Latents with the index K are not finite, and count for no code.
        """
        self._learn(z, indices)
        self._revive(z, indices)

    def _learn(self, z: Tensor, indices: Tensor) -> None:
        """Move the running means, where there are any, by latents (N, C) and their codes (N,)."""
        if isinstance(self.embedding, EmbeddingEMA):
            self.embedding.update(*sum_by_code(z, indices, self.n_e))

    def _revive(self, z: Tensor, indices: Tensor) -> None:
        """Count the batches in which no process used a code, and move codes that were idle too long."""
        if self.revive_after is None:
            return
        counts = all_reduce_sum(count_codes(indices, self.n_e))  # (K,)
        self.idle_batches.copy_(torch.where(counts > 0, 0, self.idle_batches + 1))
        latents = z[torch.randint(len(z), (self.n_e,), device=z.device)]  # (K, C)
        if is_distributed():
            dist.broadcast(latents, src=0)
        dead = self.idle_batches.ge(self.revive_after) & is_finite(latents)
        self.move_codes(dead, latents)
        self.idle_batches.masked_fill_(dead, 0)

    def move_codes(self, codes: Tensor, latents: Tensor) -> None:
        """Replace the codes that are marked (K,) by the latents (K, C)."""
        weight = self.embedding.weight
        weight.copy_(torch.where(codes[:, None], latents.to(weight.dtype), weight))
        if isinstance(self.embedding, EmbeddingEMA):  # the means begin anew
            book = self.embedding
            book.cluster_size.masked_fill_(codes, 1.0)
            book.embed_avg.copy_(torch.where(codes[:, None], book.weight, book.embed_avg))

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """See `Codebook`."""
        return self._entry(self.embedding.weight, indices, shape)


class VectorQuantizer(VectorQuantizer2):
    """The first quantizer of 2021: `VectorQuantizer2` with statistics of the batch in its result.

    `quantizer(z)` returns (z_q, loss, (perplexity, one-hot codes (B*h*w, K), indices (B*h*w, 1))).
    """

    def __init__(self, n_e: int, e_dim: int, beta: float):
        super().__init__(n_e, e_dim, beta)

    def forward(  # type: ignore[override]  # no flags
        self, z: Tensor
    ) -> tuple[Tensor, Tensor, QuantizerInfo]:
        z_q, loss, (_, _, indices) = super().forward(z)
        one_hot = F.one_hot(indices, self.n_e).to(z.dtype)
        usage = one_hot.float().mean(0)
        perplexity = torch.exp(-torch.sum(usage * torch.log(usage + 1e-10)))
        return z_q, loss, QuantizerInfo(perplexity, one_hot, indices[:, None])


class EmbeddingEMA(nn.Module):
    """A codebook (K, C) that follows running means of the latents instead of gradients.

    Keys as in 2021: `weight`, `cluster_size` (K,), `embed_avg` (K, C). Each cluster starts with size 1, so
    that a code that is not chosen keeps its mean; with size 0, as in 2021, it diverged.

    Args:
        num_tokens, codebook_dim: codes K, and their channels C.
        decay: share of the running sums that is kept in each batch.
        eps: lower bound of the size of a cluster, in latents a batch.
        smoothing: add eps to all sizes instead, and scale them to their sum, (N_j + eps) n / (n + K eps), as
            the authors' code does; codes that are not chosen for hundreds of batches then drift towards 0.
    """

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5,
        smoothing: bool = False,
    ):
        super().__init__()
        self.decay, self.eps, self.smoothing = decay, eps, smoothing
        self.register_buffer("weight", torch.randn(num_tokens, codebook_dim))
        self.register_buffer("cluster_size", torch.ones(num_tokens))
        self.register_buffer("embed_avg", self.weight.clone())

    def forward(self, embed_id: Tensor) -> Tensor:
        return F.embedding(embed_id, self.weight)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """Update by the numbers of latents (K,) that chose each code, and their sums (K, C)."""
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)
        self.embed_avg.lerp_(sums.to(self.embed_avg), 1 - self.decay)
        sizes = self.cluster_size.clamp_min(self.eps)
        if self.smoothing:
            total = self.cluster_size.sum()
            sizes = (self.cluster_size + self.eps) * (total / (total + len(sizes) * self.eps))
        self.weight.copy_(self.embed_avg / sizes[:, None])


class EMAVectorQuantizer(VectorQuantizer2):
    """Nearest-neighbor codebook, learned by running means (van den Oord et al. 2017, appendix A.1).

    Only the commitment is a loss: L = beta |z - sg[z_q]|^2. All processes use the sums over all of them.

    Args:
        n_embed, embedding_dim: codes K, and their channels C.
        beta: weight of the commitment term.
        decay: share of the running sums that is kept in each batch.
        eps, smoothing: of the sizes of clusters; see `EmbeddingEMA`.
        remap, unknown_index, sane_index_shape, revive_after, kmeans_steps: see `VectorQuantizer2`.
    """

    embedding: EmbeddingEMA

    def __init__(
        self, n_embed: int, embedding_dim: int, beta: float, decay: float = 0.99, eps: float = 1e-5,
        remap: str | None = None, unknown_index: str | int = "random", *, sane_index_shape: bool = False,
        revive_after: int | None = None, kmeans_steps: int = 0, smoothing: bool = False,
    ):
        super().__init__(
            n_embed, embedding_dim, beta, remap, unknown_index, sane_index_shape, revive_after=revive_after,
            kmeans_steps=kmeans_steps,
        )
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps, smoothing)

    def _loss(self, z: Tensor, z_q: Tensor) -> Tensor:
        return self.beta * F.mse_loss(z, z_q.detach())


def codebook(
    n_embed: int, embed_dim: int, beta: float, decay: float | None, revive_after: int | None,
    kmeans_steps: int, smoothing: bool = False,
) -> VectorQuantizer2:
    """Make a codebook: of running means with a `decay`, learned by gradients where that is None."""
    if decay is None:
        return VectorQuantizer2(
            n_embed, embed_dim, beta, legacy=False, revive_after=revive_after, kmeans_steps=kmeans_steps
        )
    return EMAVectorQuantizer(
        n_embed, embed_dim, beta, decay, revive_after=revive_after, kmeans_steps=kmeans_steps,
        smoothing=smoothing,
    )


class GumbelQuantize(Codebook):
    """Codes sampled by the Gumbel trick (Jang et al. 2017), as in the discrete VAE of Ramesh et al. 2021.

    A 1x1 convolution gives each latent K logits. In training a code is sampled, with the gradient of the
    softmax at `temperature`; in evaluation the most likely one is taken, so that an image always has the
    same codes (in 2021 they were sampled there too). The loss is `kl_weight` x KL(distribution || uniform),
    in nats a latent.

    Args:
        num_hiddens: channels of the latents.
        embedding_dim, n_embed: channels C and number K of the codes.
        straight_through: sample one code in training; False mixes all of them by their probabilities.
        kl_weight, temp_init: of the loss; of the softmax.
        use_vqinterface: return (z_q, loss, (None, None, indices)); False returns the indices alone third.
        remap, unknown_index: see `Codebook`; only the codes that stay are ever chosen.
    """

    def __init__(
        self, num_hiddens: int, embedding_dim: int, n_embed: int, straight_through: bool = True,
        kl_weight: float = 5e-4, temp_init: float = 1.0, use_vqinterface: bool = True,
        remap: str | None = None, unknown_index: str | int = "random",
    ):
        super().__init__(n_embed, remap, unknown_index)
        self.e_dim, self.embedding_dim, self.n_embed = embedding_dim, embedding_dim, n_embed
        self.straight_through, self.kl_weight, self.temperature = straight_through, kl_weight, temp_init
        self.use_vqinterface = use_vqinterface
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple:
        """Quantize z (B, num_hiddens, h, w): (z_q (B, C, h, w), loss, (None, None, indices (B, h, w))).

        `temp` replaces the temperature; `return_logits` adds the logits (B, codes in use, h, w).
        """
        temperature = self.temperature if temp is None else temp
        with torch.autocast(z.device.type, enabled=False):
            logits, codes = self.proj(z.to(self.proj.weight.dtype)), self.embed.weight  # (B, K, h, w), (K, C)
            if self.remap is not None:
                logits, codes = logits[:, self.used], codes[self.used]
            if self.training:
                chosen = F.gumbel_softmax(logits, tau=temperature, dim=1, hard=self.straight_through)
                indices = chosen.argmax(1)
                z_q = torch.einsum("b k h w, k c -> b c h w", chosen, codes)
            else:
                indices = logits.argmax(1)
                z_q = rearrange(F.embedding(indices, codes), "b h w c -> b c h w")
            log_p = F.log_softmax(logits.float(), dim=1)
            loss = self.kl_weight * (log_p.exp() * (log_p + math.log(self.n_e))).sum(1).mean()
        found = QuantizerInfo(None, None, indices) if self.use_vqinterface else indices
        return (z_q, loss, found, logits) if return_logits else (z_q, loss, found)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """See `Codebook`."""
        return self._entry(self.embed.weight, indices, shape)
