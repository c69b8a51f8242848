"""An autoregressive prior in the style of Llama: two-dimensional rotary positions, RMSNorm, SwiGLU.

The network of LlamaGen (Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation"), with its parameter names. B batch, T tokens, M condition tokens, H W grid of codes, D channels,
n heads, m heads of keys and values, d = D / n channels of a head, F channels of the feed-forward network.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.priors.base import project_codebook
from taming.modules.priors.decoder import (
    GridDecoder,
    KeysAndValues,
    attend_in_groups,
    check_heads,
    keep,
    modulate,
    zero_modulation,
)
from taming.modules.transformer.positions import Part, part_length
from taming.parameters import PositiveFloat, PositiveInt, Probability

EPS = 1e-5  # of RMSNorm
HEAD = 64  # channels of a head where no number of heads is given
MULTIPLE = 256  # the feed-forward network has so many channels, or a multiple


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its input; under autocast torch would leave its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions; heads of keys and values may be fewer than heads of queries."""

    def __init__(
        self, channels: int, n_head: int, n_kv_head: int, qk_norm: bool, attn_pdrop: float, resid_pdrop: float
    ):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, channels // n_head
        self.attn_pdrop = attn_pdrop
        self.wqkv = nn.Linear(channels, (n_head + 2 * n_kv_head) * self.head_dim, bias=False)
        self.wo = nn.Linear(channels, channels, bias=False)
        self.q_norm = RMSNorm(self.head_dim, EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, EPS) if qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(resid_pdrop)

    def forward(self, x: Tensor, rotary: Tensor, room: KeysAndValues | None, start: int) -> Tensor:
        """Map x (B, T, D) to (B, T, D); `rotary` (2, T, d), the room holds what is before `start`."""
        heads = rearrange(self.wqkv(x), "b t (n d) -> b n t d", d=self.head_dim)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        k, v = keep(k, v, room, start)  # (B, m, S, d)
        y = attend_in_groups(q.to(v.dtype), k.to(v.dtype), v, self.attn_pdrop if self.training else 0.0)
        return self.resid_dropout(self.wo(rearrange(y, "b n t d -> b t (n d)")))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, channels: int, hidden: int, pdrop: float):
        super().__init__()
        self.w1 = nn.Linear(channels, hidden, bias=False)
        self.w3 = nn.Linear(channels, hidden, bias=False)
        self.w2 = nn.Linear(hidden, channels, bias=False)
        self.ffn_dropout = nn.Dropout(pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention, then the feed-forward network, each after a norm and with a skip connection."""

    def __init__(self, attention: Attention, feed_forward: FeedForward, channels: int, adaln: bool):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm = RMSNorm(channels, EPS)
        self.ffn_norm = RMSNorm(channels, EPS)
        self.adaLN_modulation = zero_modulation(channels, 6) if adaln else None

    def room(self, batch_size: int, length: int) -> tuple[int, ...]:
        """Shape of the keys and values of so many positions."""
        return batch_size, self.attention.n_kv_head, length, self.attention.head_dim

    def forward(
        self, x: Tensor, more: tuple[Tensor, Tensor | None], room: KeysAndValues | None, start: int
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D); `more` are the rotary entries, and the modulation (B, 1, 6D)."""
        rotary, modulation = more
        if modulation is None:
            x = x + self.attention(self.attention_norm(x), rotary, room, start)
            return x + self.feed_forward(self.ffn_norm(x))
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=-1)
        x = x + gate * self.attention(modulate(self.attention_norm(x), shift, scale), rotary, room, start)
        return x + ffn_gate * self.feed_forward(modulate(self.ffn_norm(x), ffn_shift, ffn_scale))


class ConditionEmbedding(nn.Module):
    """Embeddings of condition tokens, from a table of their own or that of the codes.

    A learned vector for each part of the condition tells tokens apart that have the same number: those of two
    conditions, or of a condition and the codes. One condition with a table of its own needs none.
    """

    def __init__(self, vocab_size: int | None, sizes: Sequence[int], channels: int):
        super().__init__()
        self.sizes = list(sizes)
        self.embedding_table = None if vocab_size is None else nn.Embedding(vocab_size, channels)
        marked = vocab_size is None or len(sizes) > 1
        self.part_embedding = nn.Parameter(torch.zeros(len(sizes), channels)) if marked else None

    def forward(self, tokens: Tensor, shared: nn.Embedding) -> Tensor:
        """Map tokens (B, M) to (B, M, D); `shared` is the table of the codes."""
        x = (shared if self.embedding_table is None else self.embedding_table)(tokens)
        if self.part_embedding is None:
            return x
        marks = [mark.expand(size, -1) for mark, size in zip(self.part_embedding, self.sizes, strict=True)]
        return x + torch.cat(marks)


class ConditionFeatures(nn.Module):
    """Features of grid conditions for each code, which know what lies around its place.

    Embeddings of cells are averaged or repeated to the grid of the codes. Two blocks follow, each of 1x1, 5x5
    and 1x1 convolutions, a quarter as wide inside, with a skip connection: four codes to each side are seen.
    """

    def __init__(self, grids: Sequence[tuple[int, ...]], shape: tuple[int, int], channels: int):
        super().__init__()
        self.grids, self.shape = list(grids), shape
        inside = max(1, channels // 4)
        self.blocks = nn.ModuleList([
            nn.Sequential(
                nn.Conv2d(channels, inside, 1), nn.GELU(), nn.Conv2d(inside, inside, 5, padding=2), nn.GELU(),
                nn.Conv2d(inside, channels, 1),
            )
            for _ in range(2)
        ])

    def forward(self, embedded: Sequence[Tensor]) -> Tensor:
        """Map the embeddings (B, h * w, D) of the cells of each grid to features (B, N, D)."""
        x = torch.stack([
            F.adaptive_avg_pool2d(rearrange(cells, "b (h w) d -> b d h w", h=grid[0]), self.shape)
            for cells, grid in zip(embedded, self.grids, strict=True)
        ]).sum(0)  # (B, D, H, W)
        for block in self.blocks:
            x = x + block(x)
        return rearrange(x, "b d h w -> b (h w) d")


class Head(nn.Module):
    """The last norm, modulated where there is a modulation (B, T, 2D), and the logits: (B, T, V).

    It shares its layers with the prior, whose names they keep.
    """

    def __init__(self, norm: nn.Module, output: nn.Module):
        super().__init__()
        self.norm, self.output = norm, output

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        """Map x (B, T, D) to logits (B, T, V)."""
        x = self.norm(x)
        return self.output(x if modulation is None else modulate(x, *modulation.chunk(2, dim=-1)))


class Llama(GridDecoder):
    """p(codes | condition) by a transformer that knows where in the image each token lies.

    Queries and keys are rotated by the row and the column of their token (see `rotary_table`). Condition
    tokens of a grid lie where they show the image, others in a row above it. So one network fits any window
    of the training size, and the sliding window works.

    Args:
        vocab_size: V; with `condition_vocab_size` the number of codes.
        layout: see `GridDecoder`.
        condition_vocab_size: rows of the table of condition tokens, null token included; None: they are
            looked up in that of the codes.
        n_layer, n_head, n_embd: number of blocks, heads n, channels D; n_head is D / 64 when None.
        n_kv_head: heads m of keys and values, a divisor of n_head (Ainslie et al. 2023); n_head when None.
        ffn_dim: channels F of the feed-forward networks; when None 8/3 D, rounded up to a multiple of 256.
        qk_norm: whether RMSNorm is applied to queries and keys (Henry et al. 2020).
        adaln: whether each norm is modulated by the mean embedding of the condition (Peebles and Xie 2023).
        rotate_condition: whether condition tokens are rotated by their places. False is LlamaGen's rule:
            their rotary entries are zero, so that their queries and keys vanish.
        fuse_grids: whether conditions that are grids are read beside the codes, not before them: the position
            that predicts a code gets the features of its place (see `ConditionFeatures`). The sequence is
            shorter, and where things are need not be learned (Li et al. 2024, "ControlAR").
        rotary_base: b of the angles.
        embedding_from_codebook: whether embeddings of codes start from the first stage's code vectors.
        embd_pdrop, attn_pdrop, resid_pdrop, ffn_pdrop: dropout rates: of embeddings, attention weights, and
            the outputs of attention and feed-forward networks. LlamaGen trains with 0.1, attn_pdrop 0.

    Raises:
        ValueError: channels or heads that do not divide; channels of a head that are not a multiple of 4.
    """

    def __init__(
        self, vocab_size: PositiveInt, layout: Sequence[Part],
        condition_vocab_size: PositiveInt | None = None, n_layer: PositiveInt = 12,
        n_head: PositiveInt | None = None, n_embd: PositiveInt = 768, *,
        n_kv_head: PositiveInt | None = None, ffn_dim: PositiveInt | None = None, qk_norm: bool = False,
        adaln: bool = False, rotate_condition: bool = True, fuse_grids: bool = False,
        rotary_base: PositiveFloat = 10000.0, embedding_from_codebook: bool = False,
        embd_pdrop: Probability = 0.0, attn_pdrop: Probability = 0.0, resid_pdrop: Probability = 0.0,
        ffn_pdrop: Probability = 0.0,
    ):
        super().__init__(vocab_size, layout, condition_vocab_size)
        sizes = [part_length(part) for part in self.parts]
        grids = [part for part in self.parts if fuse_grids and not isinstance(part, int)]
        read = [part for part in self.parts if isinstance(part, int) or not fuse_grids]
        self.fused = [fuse_grids and not isinstance(part, int) for part in self.parts]
        self.read = read or [1]  # parts that are read before the codes; a learned vector if all are fused
        self.first = sum(map(part_length, self.read)) - self.num_condition
        if n_head is None and n_embd % HEAD:
            raise ValueError(f"n_head is missing; n_embd: {n_embd} is not a multiple of {HEAD}: give n_head")
        n_head = n_head or n_embd // HEAD
        n_kv_head = n_kv_head or n_head
        check_heads(n_embd, n_head)
        if n_head % n_kv_head:
            raise ValueError(f"n_head: {n_head} is not a multiple of n_kv_head: {n_kv_head}")
        self.head_dim = n_embd // n_head
        if self.head_dim % 4:
            raise ValueError(
                f"n_embd: {n_embd} / n_head: {n_head} = {self.head_dim} channels of a head, but rotary "
                "positions in two dimensions need a multiple of 4: change n_head"
            )
        self.rotate_condition, self.rotary_base = rotate_condition, rotary_base
        self.embedding_from_codebook = embedding_from_codebook
        self._rotary: Tensor | None = None
        hidden = ffn_dim or -(-int(8 * n_embd / 3) // MULTIPLE) * MULTIPLE
        self.tok_embeddings = nn.Embedding(vocab_size, n_embd)
        self.cls_embedding = ConditionEmbedding(condition_vocab_size, sizes, n_embd)
        self.fused_features = ConditionFeatures(grids, (self.height, self.width), n_embd) if grids else None
        self.start_embedding = None if read else nn.Parameter(torch.zeros(1, 1, n_embd))
        self.tok_dropout = nn.Dropout(embd_pdrop)
        self.layers: Any = nn.ModuleList([
            Block(
                Attention(n_embd, n_head, n_kv_head, qk_norm, attn_pdrop, resid_pdrop),
                FeedForward(n_embd, hidden, ffn_pdrop), n_embd, adaln,
            )
            for _ in range(n_layer)
        ])
        self.norm = RMSNorm(n_embd, EPS)
        self.output = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init_weights)
        for parameter in (self.cls_embedding.part_embedding, self.start_embedding):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)
        self.adaLN_modulation = zero_modulation(n_embd, 2) if adaln else None
        for layer in self.layers if adaln else ():
            layer.adaLN_modulation = zero_modulation(n_embd, 6)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def init_from_codebook(self, codebook: Tensor) -> None:
        """Start the embeddings of the codes from code vectors (K, C); see `Prior.init_from_codebook`."""
        project_codebook(self.tok_embeddings.weight[: len(codebook)], codebook)

    @property
    def decoder_blocks(self) -> Sequence[Any]:
        """The blocks."""
        return list(self.layers)

    @property
    def decoder_head(self) -> nn.Module:
        """The last norm, and the logits."""
        return Head(self.norm, self.output)

    def embed(
        self, idx: Tensor, start: int, kept: dict[str, Any], **more: Any
    ) -> tuple[Tensor, Sequence[Any]]:
        """Embed tokens; each block takes rotary entries and its modulation, the head its own modulation."""
        parts, count = [], max(0, self.num_condition - start)
        if count:
            condition = self.read_condition(idx[:, :count], kept)  # (B, positions, D)
            parts.append(condition)
            if self.adaLN_modulation is not None:
                mean = condition.mean(1, keepdim=True)
                kept["layers"] = [layer.adaLN_modulation(mean) for layer in self.layers]  # (B, 1, 6D) each
                kept["head"] = self.adaLN_modulation(mean)  # (B, 1, 2D)
        parts.append(self.tok_embeddings(idx[:, count:]))
        x = torch.cat(parts, dim=1)  # (B, positions, D)
        begin = self.first + start if start else 0
        places = slice(begin, begin + x.shape[1])
        if self.fused_features is not None:
            x = x + kept["beside"][:, places]
        modulations = kept.get("layers", [None] * len(self.layers))
        rotary = self.rotary(x.device)[:, places]
        return self.tok_dropout(x), [*((rotary, each) for each in modulations), kept.get("head")]

    def read_condition(self, tokens: Tensor, kept: dict[str, Any]) -> Tensor:
        """Embed condition tokens (B, M) that are positions: (B, positions, D).

        Those of fused grids become what is added to each position, `kept["beside"]` (B, positions + N, D).
        """
        embedded = self.cls_embedding(tokens, self.tok_embeddings)  # (B, M, D)
        if self.fused_features is None:
            return embedded
        parts = list(zip(embedded.split(self.cls_embedding.sizes, dim=1), self.fused, strict=True))
        read = [part for part, fused in parts if not fused]
        if self.start_embedding is not None:
            read.append(self.start_embedding.expand(len(tokens), -1, -1))
        condition = torch.cat(read, dim=1)
        features = self.fused_features([part for part, fused in parts if fused])  # (B, N, D)
        kept["beside"] = F.pad(features, (0, 0, condition.shape[1] - 1, 1))  # the last position predicts none
        return condition

    def rotary(self, device: torch.device) -> Tensor:
        """Return the table of all positions, (2, positions, d), in float32 whatever the weights are."""
        if self._rotary is None or self._rotary.device != device:
            with torch.inference_mode(False):  # training reads it after validation has made it
                table = rotary_table(self.places(), self.head_dim, self.rotary_base)
                if not self.rotate_condition:
                    table[:, : self.first + self.num_condition] = 0.0
                self._rotary = table.to(device)
        return self._rotary

    def places(self) -> Tensor:
        """Return row and column of each position, in codes of the image, (positions of M + N, 2).

        Cells of a coarser or finer grid lie at their centers. Number i of a part that is not a grid lies in
        column i of a row of its own above the image.
        """
        places, above = [], 0
        for part in [*self.read, (self.height, self.width)]:
            if isinstance(part, int):
                above -= 1
                rows, columns = torch.tensor([float(above)]), torch.arange(float(part))
            else:
                rows, columns = (
                    (torch.arange(cells) + 0.5) * (side / cells) - 0.5
                    for cells, side in zip(part, (self.height, self.width), strict=True)
                )
            places.append(torch.cartesian_prod(rows, columns))
        return torch.cat(places)


def rotary_table(places: Tensor, head_dim: int, base: float) -> Tensor:
    """Return the cosines of places (T, 2), and the sines with the sign that `rotate` needs: (2, T, d).

    The first d / 4 pairs of channels turn by row * b^(-4i / d), i = 0..d/4 - 1, the others by the column (Su
    et al. 2021, "RoFormer", in two dimensions).
    """
    waves = base ** (-torch.arange(0, head_dim, 4, device=places.device) / head_dim)  # (d / 4,)
    angles = (places[:, :, None] * waves).flatten(1)  # (T, d / 2), of pairs of channels
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1))).flatten(2)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighbouring channels of x (B, n, T, d) by the angles of a `rotary_table` (2, T, d)."""
    cos, sin = rotary
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # neighbours exchanged
    return torch.addcmul(x * cos, swapped.to(cos.dtype), sin).to(x.dtype)
