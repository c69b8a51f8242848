"""Vector quantization as the tokenizers of today use it: few channels, unit length, any estimator.

B batch, D channels of latents and of results, C channels of a codebook, h w latent grid, K codes, N = B h w.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.quantizers.base import QuantizerInfo, is_finite, projection
from taming.modules.quantizers.entropy import softmax_entropies
from taming.modules.quantizers.estimators import Estimator, check_estimator, estimate
from taming.modules.quantizers.search import nearest_code
from taming.modules.vqvae.quantize import EmbeddingEMA, VectorQuantizer2
from taming.parameters import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability

Quantized = tuple[Tensor, Tensor, QuantizerInfo]


class VQ(VectorQuantizer2):
    """A codebook of vectors, optionally of fewer channels than the latents and of unit length.

    L = |sg[z] - e|^2 + beta |z - sg[e]|^2 + w_e (mean_n H(p_n) - H(p)), e the code nearest to z; with a
    `decay` the first term is left out, and the codes follow running means of their latents. With unit length
    z and all codes are divided by their lengths: Yu et al. 2022, "Vector-quantized image modeling with
    improved VQGAN", section 3.2; Sun et al. 2024, "Autoregressive model beats diffusion" (LlamaGen).

    Args:
        codebook_size: number of codes K.
        dim: channels D of the latents, and of the result.
        codebook_dim: channels C of the codes; others than D need a linear map to them and one back. None: D.
        l2_normalize: latents and codes have unit length; their distance is then that of directions.
        estimator: "straight_through", "rotation" or "diveq"; see `taming.modules.quantizers.estimators`.
        beta: weight of the commitment.
        decay: share of the running means that is kept in each batch; None learns the codes by gradients.
        entropy_weight: w_e; 0 leaves the entropies out. They are of training only.
        entropy_temperature: p_n = softmax(-|z_n - e|^2 / temperature) over the codes.
        revive_after, kmeans_steps: see `VectorQuantizer2`.
        smoothing: see `EmbeddingEMA`; only with a decay.

    Raises:
        ValueError: "diveq" with a decay, which leaves its gradients without effect.
    """

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt, codebook_dim: PositiveInt | None = None, *,
        l2_normalize: bool = False, estimator: Estimator = "straight_through", beta: NonNegativeFloat = 0.25,
        decay: Probability | None = None, entropy_weight: NonNegativeFloat = 0.0,
        entropy_temperature: PositiveFloat = 0.01, revive_after: PositiveInt | None = None,
        kmeans_steps: NonNegativeInt = 0, smoothing: bool = False,
    ):
        width = codebook_dim or dim
        super().__init__(
            codebook_size, width, beta, sane_index_shape=True, legacy=False, revive_after=revive_after,
            kmeans_steps=kmeans_steps,
        )
        self.dim, self.l2_normalize, self.estimator = dim, l2_normalize, check_estimator(estimator)
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        if decay is not None:
            if estimator == "diveq":
                raise ValueError("estimator: diveq trains the codes by gradients: leave decay out")
            self.embedding = EmbeddingEMA(codebook_size, width, decay, smoothing=smoothing)
        if l2_normalize:  # begin in all directions, about as long as latents
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            if isinstance(self.embedding, EmbeddingEMA):
                self.embedding.embed_avg.copy_(self.embedding.weight)
        self.project_in, self.project_out = projection(dim, width), projection(width, dim)

    @property
    def code_dim(self) -> int:
        """Channels D of the result."""
        return self.dim

    def forward(  # type: ignore[override]  # no flags of 2021
        self, z: Tensor
    ) -> Quantized:
        """Quantize z (B, D, h, w): (z_q (B, D, h, w), loss (), (None, None, indices (B, h, w)))."""
        result, *used = self.choose(z)
        if self.training:
            self.learn([used])
        return result

    def choose(self, z: Tensor) -> tuple[Quantized, Tensor, Tensor]:
        """Quantize z as `forward` does, but let the codebook be.

        Returns what `forward` returns, and what the codebook learns from: the latents (N, C) as they were
        compared with codes, and their codes (N,), K for those that are not finite.
        """
        dtype = self.embedding.weight.dtype
        with torch.autocast(z.device.type, enabled=False):
            z = self.project_in(z.to(dtype).movedim(1, -1)).float()  #    (B, h, w, C)
            z = F.normalize(z, dim=-1) if self.l2_normalize else z
            rows = z.detach().flatten(0, -2)  #                           (N, C)
            if self.training and self._begins:
                self._begin(rows)
            codes = self.codes()  #                                       (K, C)
            indices = nearest_code(rows, codes)  #                        (N,)
            z_q = F.embedding(indices, codes).view(z.shape)  #            (B, h, w, C)
            loss = torch.stack([*self.loss_terms(z, z_q, codes).values()]).sum()
            z_q = estimate(z, z_q, self.estimator, self.training)
            z_q = self.project_out(z_q.to(dtype)).movedim(-1, 1)  #       (B, D, h, w)
        result = z_q, loss, QuantizerInfo(None, None, indices.view(z.shape[:-1]))
        return result, rows, torch.where(is_finite(rows), indices, self.n_e)

    def codes(self) -> Tensor:
        """Return the codes (K, C), float32, as they are compared with latents."""
        codes = self.embedding.weight.float()
        if self.training and (self.revive_after is not None or isinstance(self.embedding, EmbeddingEMA)):
            codes = codes.clone()  # `learn` moves codes before the backward pass, which needs the old ones
        return F.normalize(codes, dim=-1) if self.l2_normalize else codes

    def loss_terms(self, z: Tensor, z_q: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name, for latents and their codes (..., C)."""
        terms = {"commitment": self.beta * F.mse_loss(z, z_q.detach())}
        if not isinstance(self.embedding, EmbeddingEMA):
            terms["codebook"] = F.mse_loss(z_q, z.detach())
        if self.training and self.entropy_weight > 0:
            sample, batch = softmax_entropies(
                z.flatten(0, -2), codes, self.entropy_temperature, euclidean=True
            )
            terms["entropy"] = self.entropy_weight * (sample - batch)
        return terms

    @torch.no_grad()
    def learn(self, used: Sequence[Sequence[Tensor]]) -> None:
        """Update the codebook, apart from gradients, by latents and codes as `choose` returns them.

        Running means take one pair after the other; a code is idle if none of them has it.
        """
        for latents, indices in used:
            self._learn(latents, indices)
        self._revive(*(torch.cat([*parts]) for parts in zip(*used, strict=True)))
        if self.l2_normalize and isinstance(self.embedding, EmbeddingEMA):
            self.embedding.weight.copy_(self.codes())

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Return the codes (..., D) of indices (...); with `shape` (B, h, w, D), as a map (B, D, h, w)."""
        dtype = self.embedding.weight.dtype
        codes = self.project_out(F.embedding(indices, self.codes()).to(dtype))
        return codes if shape is None else codes.reshape(shape).movedim(-1, 1)
