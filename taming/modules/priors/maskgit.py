"""MaskGIT: a bidirectional transformer that predicts masked codes, as a BERT or as a U-ViT.

Chang et al. 2022, "MaskGIT: masked generative image transformer"; the networks are those of the generators of
Yu et al. 2024, "An image is worth 32 tokens for reconstruction and generation" (TiTok), whose names these
modules have. The U-ViT is that of Bao et al. 2023, "All are worth words".

B batch, N codes, M condition tokens, T = M + N, D = n_embd channels, K codes, C condition tokens of a
vocabulary, n heads, L blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.priors.base import project_codebook
from taming.modules.priors.masked import MaskedPrior, init_weights, start_positions
from taming.modules.transformer.positions import Part
from taming.parameters import PositiveInt, Probability


class MaskedTransformer(MaskedPrior):
    """What both networks share: one table of tokens, and the order condition, codes.

    The tokens of the table are the codes 0..K - 1, the mask K, and the condition tokens, of which token c
    stands at K + 1 + c: for classes with a null token, those of the published generators.

    Args:
        n_head, n_embd: heads n, channels D.
        embedding_from_codebook: see `Prior`.
        vocab_size, condition_vocab_size, block_size, training: see `MaskedPrior`.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(
        self, vocab_size: PositiveInt, condition_vocab_size: PositiveInt, block_size: PositiveInt,
        n_head: PositiveInt, n_embd: PositiveInt, *, embedding_from_codebook: bool = False, **training: Any,
    ):
        super().__init__(vocab_size, condition_vocab_size, block_size, **training)
        self.embedding_from_codebook = embedding_from_codebook
        if n_embd % n_head:
            raise ValueError(f"n_embd: {n_embd} is not a multiple of n_head: {n_head}")
        self.n_head = n_head
        self.table_size = vocab_size + 1 + condition_vocab_size

    @property
    def token_table(self) -> nn.Embedding:
        """The table of tokens."""
        raise NotImplementedError

    def init_from_codebook(self, codebook: Tensor) -> None:
        """Start the embeddings of the codes from code vectors (K, C); see `Prior.init_from_codebook`."""
        project_codebook(self.token_table.weight.data[: self.vocab_size], codebook)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) of the table to features (B, T, D)."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """Map features (B, N, D) to logits (B, N, K)."""
        raise NotImplementedError

    def part_logits(self, parts: Tensor, masked: Tensor, condition: Tensor) -> Tensor:
        codes = torch.where(masked, self.vocab_size, parts)[..., 0]  #       (B, N)
        tokens = torch.cat((condition + self.vocab_size + 1, codes), dim=1)  # (B, M + N)
        x = self.encode_tokens(tokens)[:, condition.shape[1]:]  #            (B, N, D)
        return self.head(x)[:, :, None]  #                                   (B, N, 1, K)


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attend to all of a sequence, from everywhere: (B, n, T, d) each, to (B, T, D)."""
    return rearrange(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), "b n t d -> b t (n d)")


# ---- BERT


def _module(**children: nn.Module) -> Any:
    """Hold modules by the names that a checkpoint has."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class BertLayer(nn.Module):
    """Attention, then a perceptron; a layer norm follows each sum with the input (Devlin et al. 2019).

    The names are those of BertModel in the library transformers.
    """

    def __init__(self, n_embd: int, n_head: int, n_inner: int, dropout: float, attn_pdrop: float):
        super().__init__()
        projections = {name: nn.Linear(n_embd, n_embd) for name in ("query", "key", "value")}
        norm = [nn.LayerNorm(n_embd, eps=1e-12) for _ in range(2)]
        self.attention: Any = _module(
            self=_module(**projections), output=_module(dense=nn.Linear(n_embd, n_embd), LayerNorm=norm[0])
        )
        self.intermediate: Any = _module(dense=nn.Linear(n_embd, n_inner))
        self.output: Any = _module(dense=nn.Linear(n_inner, n_embd), LayerNorm=norm[1])
        self.drop, self.attn_pdrop, self.n_head = nn.Dropout(dropout), attn_pdrop, n_head

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        own = self.attention
        read = (getattr(own.self, name)(x) for name in ("query", "key", "value"))
        q, k, v = (rearrange(part, "b t (n d) -> b n t d", n=self.n_head) for part in read)
        y = _attend(q, k, v, self.attn_pdrop if self.training else 0.0)
        x = own.output.LayerNorm(x + self.drop(own.output.dense(y)))
        y = F.gelu(self.intermediate.dense(x))  # the exact form
        return self.output.LayerNorm(x + self.drop(self.output.dense(y)))


class MaskGIT(MaskedTransformer):
    """p(codes | condition) by a BERT over the condition and the codes, some of them masked.

    It takes any condition that is tokens: classes, grids of codes, a start token, sequences.

    Args:
        vocab_size, condition_vocab_size, block_size: K, C, M + N - 1; see `MaskedPrior`.
        n_layer, n_head, n_embd: number of blocks L, heads n, channels D.
        n_inner: channels inside the perceptrons; 4 * D when None.
        embd_pdrop, attn_pdrop: dropout rates: of embeddings and results, of attention.
        layout: see `GPT`.
        training: arguments of `MaskedPrior`: masks, losses, likelihood; and `embedding_from_codebook`, see
            `Prior`.

    Raises:
        ValueError: heads that do not divide the channels; a layout with fewer tokens than `block_size` + 1.
    """

    def __init__(
        self, vocab_size: PositiveInt, condition_vocab_size: PositiveInt, block_size: PositiveInt,
        n_layer: PositiveInt = 24, n_head: PositiveInt = 16, n_embd: PositiveInt = 768,
        n_inner: PositiveInt | None = None, embd_pdrop: Probability = 0.1, attn_pdrop: Probability = 0.1, *,
        layout: Sequence[Part] | None = None, **training: Any,
    ):
        super().__init__(vocab_size, condition_vocab_size, block_size, n_head, n_embd, **training)
        length = block_size + 1  # the last code is read, too
        self.model: Any = _module(
            embeddings=_module(
                word_embeddings=nn.Embedding(self.table_size, n_embd),
                position_embeddings=nn.Embedding(length, n_embd),
                token_type_embeddings=nn.Embedding(2, n_embd),  # one type alone is in use
                LayerNorm=nn.LayerNorm(n_embd, eps=1e-12),
            ),
            encoder=_module(layer=nn.ModuleList([
                BertLayer(n_embd, n_head, n_inner or 4 * n_embd, embd_pdrop, attn_pdrop)
                for _ in range(n_layer)
            ])),
            lm_head=nn.Linear(n_embd, vocab_size),
        )
        self.drop = nn.Dropout(embd_pdrop)
        self.apply(init_weights)
        start_positions(layout, self.model.embeddings.position_embeddings.weight)

    @property
    def token_table(self) -> nn.Embedding:
        """The table of tokens."""
        return self.model.embeddings.word_embeddings

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        own = self.model.embeddings
        x = own.word_embeddings(tokens) + own.token_type_embeddings.weight[0]
        x = x + own.position_embeddings.weight[: tokens.shape[1]]
        x = self.drop(own.LayerNorm(x))  # (B, T, D)
        for layer in self.model.encoder.layer:
            x = layer(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.model.lm_head(x)


# ---- U-ViT


class UViTBlock(nn.Module):
    """A transformer block with layer norms at the inputs; `skip` joins the features of an earlier one."""

    def __init__(self, n_embd: int, n_head: int, n_inner: int, dropout: float, skip: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn: Any = _module(
            qkv=nn.Linear(n_embd, 3 * n_embd, bias=False), proj=nn.Linear(n_embd, n_embd)
        )
        self.mlp: Any = _module(fc1=nn.Linear(n_embd, n_inner), fc2=nn.Linear(n_inner, n_embd))
        self.skip_linear = nn.Linear(2 * n_embd, n_embd) if skip else None
        self.drop, self.n_head = nn.Dropout(dropout), n_head

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map x (B, T, D), and the features (B, T, D) of the other block, to (B, T, D)."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        q, k, v = rearrange(self.attn.qkv(self.norm1(x)), "b t (s n d) -> s b n t d", s=3, n=self.n_head)
        x = x + self.drop(self.attn.proj(_attend(q, k, v, 0.0)))
        return x + self.drop(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class UViTMaskGIT(MaskedTransformer):
    """p(codes | condition) by a U-ViT: the first half of the blocks hands its features to the second half.

    Args:
        vocab_size, condition_vocab_size, block_size: K, C, M + N - 1; see `MaskedPrior`.
        n_layer: number of blocks, odd: as many before the middle one as after it.
        n_head, n_embd: heads n, channels D.
        n_inner: channels inside the perceptrons; 4 * D when None.
        dropout: rate, of the blocks' results.
        layout: see `GPT`.
        training: arguments of `MaskedPrior`: masks, losses, likelihood; and `embedding_from_codebook`, see
            `Prior`.

    Raises:
        ValueError: an even number of blocks; heads that do not divide the channels; a layout with fewer
            tokens than `block_size` + 1.
    """

    def __init__(
        self, vocab_size: PositiveInt, condition_vocab_size: PositiveInt, block_size: PositiveInt,
        n_layer: PositiveInt = 21, n_head: PositiveInt = 16, n_embd: PositiveInt = 1024,
        n_inner: PositiveInt | None = None, dropout: Probability = 0.0, *,
        layout: Sequence[Part] | None = None, **training: Any,
    ):
        super().__init__(vocab_size, condition_vocab_size, block_size, n_head, n_embd, **training)
        if n_layer % 2 == 0:
            raise ValueError(f"n_layer: {n_layer} must be odd, with a middle block: give {n_layer + 1}")
        sizes = n_embd, n_head, n_inner or 4 * n_embd, dropout
        self.embeddings = nn.Embedding(self.table_size, n_embd)
        self.pos_embed = nn.Parameter(torch.zeros(1, block_size + 1, n_embd))  # the last code is read, too
        self.in_blocks = nn.ModuleList([UViTBlock(*sizes) for _ in range(n_layer // 2)])
        self.mid_block = UViTBlock(*sizes)
        self.out_blocks = nn.ModuleList([UViTBlock(*sizes, skip=True) for _ in range(n_layer // 2)])
        self.norm = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)
        self.apply(init_weights)
        start_positions(layout, self.pos_embed)

    @property
    def token_table(self) -> nn.Embedding:
        """The table of tokens."""
        return self.embeddings

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens) + self.pos_embed[:, : tokens.shape[1]]  # (B, T, D)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(x)
