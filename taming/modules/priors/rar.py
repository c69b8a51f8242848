"""RAR: an autoregressive prior that is trained in random orders, which become the raster order.

Yu et al. 2024, "Randomized Autoregressive Visual Generation", with the parameter names of its public
implementation. B batch, T tokens, M condition tokens, H W grid of codes, N = H*W, K codes, D channels,
n heads, d channels of a head.
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
from taming.modules.transformer.positions import Part
from taming.parameters import NonNegativeInt, PositiveInt, Probability

EPS = 1e-6  # of LayerNorm


class Attention(nn.Module):
    """Causal attention whose queries and keys are normalized."""

    def __init__(self, channels: int, n_head: int, attn_pdrop: float, resid_pdrop: float):
        super().__init__()
        self.n_head, self.head_dim, self.attn_pdrop = n_head, channels // n_head, attn_pdrop
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = nn.LayerNorm(self.head_dim, EPS)
        self.k_norm = nn.LayerNorm(self.head_dim, EPS)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(resid_pdrop)

    def forward(self, x: Tensor, room: KeysAndValues | None, start: int) -> Tensor:
        """Map x (B, T, D) to (B, T, D); the room holds keys and values of what is before `start`."""
        q, k, v = rearrange(self.qkv(x), "b t (three n d) -> three b n t d", three=3, n=self.n_head)
        k, v = keep(self.k_norm(k), v, room, start)
        dropout = self.attn_pdrop if self.training else 0.0
        y = attend_in_groups(self.q_norm(q).to(v.dtype), k.to(v.dtype), v, dropout)
        return self.proj_drop(self.proj(rearrange(y, "b n t d -> b t (n d)")))


class FeedForward(nn.Module):
    """Two linear layers with GELU, in its exact form, between them."""

    def __init__(self, channels: int, hidden: int, pdrop: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.drop = nn.Dropout(pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Attention, then the feed-forward network, with modulated norms and gates."""

    def __init__(self, channels: int, n_head: int, hidden: int, attn_pdrop: float, resid_pdrop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, EPS)
        self.attn = Attention(channels, n_head, attn_pdrop, resid_pdrop)
        self.norm2 = nn.LayerNorm(channels, EPS)
        self.mlp = FeedForward(channels, hidden, resid_pdrop)
        self.adaLN_modulation = zero_modulation(channels, 6)

    def room(self, batch_size: int, length: int) -> tuple[int, ...]:
        """Shape of the keys and values of so many positions."""
        return batch_size, self.attn.n_head, length, self.attn.head_dim

    def forward(self, x: Tensor, condition: Tensor, room: KeysAndValues | None, start: int) -> Tensor:
        """Map x (B, T, D) to (B, T, D), with the condition of each position (B, T, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale), room, start)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class FinalNorm(nn.Module):
    """A modulated norm without weights of its own."""

    def __init__(self, channels: int):
        super().__init__()
        self.adaLN_modulation = zero_modulation(channels, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x (B, T, D) to (B, T, D), with the condition of each position (B, T, D)."""
        # published weights have the scale first here, and the shift first in the blocks
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale)


class Head(nn.Module):
    """The last norm and the logits; it shares its layers with the prior, whose names they keep."""

    def __init__(self, norm: FinalNorm, output: nn.Module):
        super().__init__()
        self.norm, self.output = norm, output

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x (B, T, D) to logits (B, T, K), with the condition of each position (B, T, D)."""
        return self.output(self.norm(x, condition))


class RAR(GridDecoder):
    """p(codes | condition), trained in random orders at first and in raster order at last.

    Each position gets the embedding of its code, that of the code's place, and that of the place whose code
    it predicts (section 3.3, "target-aware"), so that one network fits all orders. Each norm is modulated by
    the mean embedding of the condition plus an embedding of the position in the sequence. The sequence begins
    with a token `cls_token`, before the condition.

    In training an item is read in a random order with probability r, which is 1 up to batch `random_until`,
    falls linearly to 0 at `raster_from`, and stays there; in evaluation and sampling the order is raster.

    Args:
        vocab_size: K.
        layout: see `GridDecoder`.
        condition_vocab_size: number of condition tokens, null token included.
        n_layer, n_head, n_embd: number of blocks, heads n, channels D.
        ffn_dim: channels of the feed-forward networks; 4 D when None.
        random_until, raster_from: batches; see above. With 0 and 0 all orders are raster. A model that is
            trained counts its batches here.
        embedding_from_codebook: whether embeddings of codes start from the first stage's code vectors.
        attn_pdrop, resid_pdrop: dropout rates: of attention weights, and of all other outputs in a block.

    Raises:
        ValueError: channels that do not divide, orders that are raster before they are random no longer.
    """

    def __init__(
        self, vocab_size: PositiveInt, layout: Sequence[Part], condition_vocab_size: PositiveInt,
        n_layer: PositiveInt = 24, n_head: PositiveInt = 16, n_embd: PositiveInt = 768, *,
        ffn_dim: PositiveInt | None = None, random_until: NonNegativeInt = 0, raster_from: NonNegativeInt = 0,
        embedding_from_codebook: bool = False, attn_pdrop: Probability = 0.0, resid_pdrop: Probability = 0.0,
    ):
        super().__init__(vocab_size, layout, condition_vocab_size, first=1)
        check_heads(n_embd, n_head)
        if raster_from < random_until:
            raise ValueError(
                f"raster_from: {raster_from} batches come before random_until: {random_until}: orders are "
                "random first"
            )
        self.random_until, self.raster_from, self.batches_seen = random_until, raster_from, 0
        self.embedding_from_codebook = embedding_from_codebook
        length = self.first + self.num_condition + self.height * self.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, n_embd))
        # codes, a mask token that nothing uses, condition tokens: the table of the publication
        self.embeddings = nn.Embedding(vocab_size + 1 + condition_vocab_size, n_embd)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, n_embd))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, length, n_embd))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, length, n_embd))
        self.blocks = nn.ModuleList([
            Block(n_embd, n_head, ffn_dim or 4 * n_embd, attn_pdrop, resid_pdrop) for _ in range(n_layer)
        ])
        self.adaln_before_head = FinalNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name == "cls_token":
                continue  # zeros
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def init_from_codebook(self, codebook: Tensor) -> None:
        """Start the embeddings of the codes from code vectors (K, C); see `Prior.init_from_codebook`."""
        project_codebook(self.embeddings.weight[: len(codebook)], codebook)

    # ---- orders

    def set_batches_seen(self, batches: int) -> None:
        """Take the number of batches that were learned from; the share of random orders follows."""
        self.batches_seen = batches

    @property
    def random_share(self) -> float:
        """Probability r that an item is read in a random order in training (eq. 4)."""
        if self.batches_seen < self.random_until:
            return 1.0
        if self.batches_seen >= self.raster_from:
            return 0.0
        return (self.raster_from - self.batches_seen) / (self.raster_from - self.random_until)

    def sample_orders(self, batch_size: int) -> Tensor | None:
        """Return an order (B, N) for each item: the place, in raster order, of each code that is read.

        None stands for raster order.
        """
        share, device = self.random_share, self.cls_token.device
        if not self.training or share == 0.0:
            return None
        count = self.height * self.width
        shuffled = torch.rand(batch_size, count, device=device).argsort(1)
        is_random = torch.rand(batch_size, 1, device=device) < share
        return torch.where(is_random, shuffled, torch.arange(count, device=device))

    def code_logits(self, codes: Tensor, condition: Tensor, orders: Tensor | None = None) -> Tensor:
        """Return logits (B, N, K) of codes, given the condition (B, M) and the codes read before each.

        Codes and logits are in raster order. They are read in the order (B, N), by default raster in
        evaluation and that of `sample_orders` in training.
        """
        if orders is None:
            orders = self.sample_orders(len(codes))
        if orders is None:
            return super().code_logits(codes, condition)
        tokens = torch.cat((condition, codes.gather(1, orders)), dim=1)
        logits = self(tokens[:, :-1], orders=orders)[0][:, condition.shape[1] - 1 :]  # (B, N, K), as read
        back = orders.argsort(1)[..., None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, back)

    # ---- the network

    @property
    def decoder_blocks(self) -> Sequence[Any]:
        """The blocks."""
        return list(self.blocks)

    @property
    def decoder_head(self) -> nn.Module:
        """The last norm, and the logits."""
        return Head(self.adaln_before_head, self.lm_head)

    def embed(
        self, idx: Tensor, start: int, kept: dict[str, Any], *, orders: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Sequence[Any]]:
        """Embed tokens; each block, and the head, takes the condition of each position.

        Codes are in an order (B, N), raster when None.
        """
        count = max(0, self.num_condition - start)
        ids = torch.cat((idx[:, :count] + self.vocab_size + 1, idx[:, count:]), dim=1)
        x = self.embeddings(ids)  # (B, T, D)
        if count:
            kept["condition"] = x[:, :count].mean(1, keepdim=True)  # (B, 1, D)
            kept["places"] = self._places(orders)
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        begin = self.first + start if start else 0  # positions, the first token included
        end = self.first + start + idx.shape[1]
        x = x + kept["places"][:, begin:end]
        condition = kept["condition"] + self.timesteps_embeddings[:, begin:end]  # (B, T, D)
        return x, [condition] * (len(self.blocks) + 1)

    def _places(self, orders: Tensor | None) -> Tensor:
        """Embed the place of each position, and the place that it predicts: (1 or B, 1 + M + N, D).

        Positions of the condition have places of their own; only the last of them predicts one.
        """
        prefix = self.first + self.num_condition
        embeddings = self.pos_embed, self.target_aware_pos_embed
        own, target = (each[:, prefix:] for each in embeddings)
        if orders is not None:
            own, target = (each[0][orders] for each in (own, target))  # (B, N, D)
        places = torch.cat((self.pos_embed[:, :prefix].expand(len(own), -1, -1), own), dim=1)
        return places + F.pad(target, (0, 0, prefix - 1, 1))
