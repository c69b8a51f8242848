"""The GPT of stage 2: a decoder-only transformer over codebook indices (Radford et al. 2019).

Attribute names are the keys of published checkpoints. B batch, T tokens, D = n_embd channels, V vocabulary,
P cached positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.packed_linear import can_pack, pack_linears
from taming.modules.transformer.positions import Part, layout_positions
from taming.sampling import filter_logits, sample_tokens

FEW = 16  # sequences for which scores of a block of queries may lie in memory at once
BLOCK = 128  # queries
PACK_FROM = 64  # positions; to reorder the weights takes as long as some 40 steps save


@dataclass
class GPTConfig:
    """Sizes of a GPT; dropout rates are probabilities, `n_unmasked` a number of positions."""

    vocab_size: int
    block_size: int
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 256
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    n_unmasked: int = 0


@dataclass
class KeyValueCache:
    """Preallocated keys and values of all layers; the first `length` positions are filled."""

    keys: list[Tensor]  # per layer: (B, heads, P, D / heads)
    values: list[Tensor]
    blocks: nn.Module  # the transformer's, or twins of them with weights laid out for single steps
    head: nn.Module
    length: int = 0


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what is before it.

    The first `n_unmasked` tokens see all of each other as well.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd: {config.n_embd} is no multiple of n_head: {config.n_head}")
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.attn_pdrop, self.n_head, self.n_unmasked = config.attn_pdrop, config.n_head, config.n_unmasked
        self.register_load_state_dict_pre_hook(_drop_mask)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0, last_only: bool = False
    ) -> Tensor:
        """x (B, T, D) at positions start.. of the sequence; what stands before them is in the cache.

        With `last_only`, only the last position asks, and only its result comes out, (B, 1, D).
        """
        asking = x[:, -1:] if last_only else x
        parts = (self.query, asking), (self.key, x), (self.value, x)
        q, k, v = (rearrange(part(seen), "b t (n d) -> b n t d", n=self.n_head) for part, seen in parts)
        end = start + x.shape[1]
        if cache is not None:
            keys, values = cache
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]  # (B, n, end, d)
        dropout = self.attn_pdrop if self.training else 0.0
        few = len(x) <= FEW or q.shape[2] == 1
        if few and x.device.type == "cpu" and not dropout and not q.requires_grad:
            y = self._in_blocks(q, k, v)
        else:
            mask = self._mask(end - q.shape[2], end, x.device)
            causal = mask is None and q.shape[2] > 1
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.resid_drop(self.proj(rearrange(y, "b n t d -> b t (n d)")))

    def _mask(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """What positions start..end may see of 0..end; None where it is all of it, or all before them."""
        if end - start == 1 or (start == 0 and self.n_unmasked <= 1):
            return None
        return self._visible(start, end, end, device)

    def _visible(self, start: int, end: int, seen: int, device: torch.device) -> Tensor:
        """Which of the first `seen` positions start..end may see, bool (end - start, seen)."""
        mask = torch.ones(end - start, seen, dtype=torch.bool, device=device).tril(start)
        mask[: max(0, self.n_unmasked - start), : self.n_unmasked] = True
        return mask

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention as matrix products, a block of the last queries after the other, without what none sees.

        For few sequences on a CPU: there the fused kernel takes longer, in bfloat16 more than twice as long.
        """
        queries, end = q.shape[2], k.shape[2]
        start, blocks = end - queries, []
        q = q * q.shape[-1] ** -0.5
        for first in range(0, queries, BLOCK):
            last = min(first + BLOCK, queries)
            seen = min(end, max(start + last, self.n_unmasked if start + first < self.n_unmasked else 0))
            scores = q[:, :, first:last] @ k[:, :, :seen].transpose(-2, -1)  # (B, n, block, seen)
            if queries > 1:
                mask = self._visible(start + first, start + last, seen, q.device)
                scores = scores.masked_fill_(~mask, -math.inf)
            blocks.append(scores.softmax(-1) @ v[:, :, :seen])
        return torch.cat(blocks, dim=2)


def _drop_mask(module, state_dict, prefix, *_):
    """Checkpoints up to 2021 hold the causal mask as a buffer, which follows from the sizes."""
    state_dict.pop(prefix + "mask", None)


class Block(nn.Module):
    """Attention, then a perceptron, each behind a layer norm and around a skip connection."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),  # the exact erf form: published weights were trained with it
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0, last_only: bool = False
    ) -> Tensor:
        y = self.attn(self.ln1(x), cache, start, last_only)
        x = (x[:, -1:] if last_only else x) + y
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Next-code predictor over at most `block_size` tokens.

    Args:
        vocab_size: number of different tokens V: codebook and condition share it.
        block_size: longest sequence that goes in: condition + grid - 1.
        n_layer, n_head, n_embd: depth, heads, channels D.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout rates.
        n_unmasked: so many first positions, the condition's, all see each other.
        layout: what the sequence is made of, condition and codes: for each part a number of tokens, or
            [height, width] of a grid. Position embeddings then begin with the places of the tokens, which
            spatial conditions learn from much sooner, see `layout_positions`; with zeros when None.

    Raises:
        ValueError: a layout that is shorter than `block_size`.
    """

    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int = 12, n_head: int = 8, n_embd: int = 256,
        embd_pdrop: float = 0.0, resid_pdrop: float = 0.0, attn_pdrop: float = 0.0, n_unmasked: int = 0,
        *, layout: Sequence[Part] | None = None,
    ):
        super().__init__()
        self.config = GPTConfig(
            vocab_size, block_size, n_layer, n_head, n_embd, embd_pdrop, resid_pdrop, attn_pdrop, n_unmasked
        )
        self.block_size = block_size
        self.tok_emb = nn.Embedding(vocab_size, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.Sequential(*[Block(self.config) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init_weights)
        if layout is not None:
            places = layout_positions(layout, n_embd)
            if len(places) < block_size:
                raise ValueError(f"layout has {len(places)} tokens, fewer than block_size: {block_size}")
            self.pos_emb.data.copy_(places[:block_size])

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()

    def get_block_size(self) -> int:
        """The longest sequence that goes in."""
        return self.block_size

    def _embed(self, idx: Tensor, embeddings: Tensor | None = None, start: int = 0) -> Tensor:
        """Tokens (B, T), behind embeddings (B, E, D) if given, with their positions: (B, E + T, D)."""
        x = self.tok_emb(idx)
        if embeddings is not None:
            x = torch.cat((embeddings, x), dim=1)
        end = start + x.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} tokens do not fit the transformer's block_size: {self.block_size}")
        return self.drop(x + self.pos_emb[:, start:end])

    def forward(
        self, idx: Tensor, embeddings: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T) to logits (B, T, V) of what follows each, and the loss.

        The loss is the mean cross-entropy, in nats, to `targets` (B, T), None without them. `embeddings`
        (B, E, D) go before the tokens and get logits too: (B, E + T, V).
        """
        x = self._embed(idx, embeddings)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    # ---- decoding with cached keys and values (taming.sampling.CachedTransformer)

    def new_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """Room for `length` positions of `batch_size` sequences, on the model's device, in its dtype."""
        config, like = self.config, self.pos_emb
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        device = like.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
        empty = [torch.empty(shape, dtype=dtype, device=like.device) for _ in range(2 * config.n_layer)]
        blocks, head = self.blocks, self.head
        if length >= PACK_FROM and can_pack(like.device, dtype):
            blocks, head = pack_linears(blocks, batch_size, dtype), pack_linears(head, batch_size, dtype)
        return KeyValueCache(empty[: config.n_layer], empty[config.n_layer :], blocks, head)

    def extend(self, idx: Tensor, cache: KeyValueCache, embeddings: Tensor | None = None) -> Tensor:
        """Append tokens (B, T) to what the cache holds; logits (B, V) of what follows the last one.

        The first call must hold the whole unmasked prefix, whose tokens see those after them.
        """
        x = self._embed(idx, embeddings, cache.length)
        end = cache.length + x.shape[1]
        if cache.length == 0 and end < self.config.n_unmasked:
            raise ValueError(
                f"the first {end} tokens do not hold the whole unmasked prefix of {self.config.n_unmasked}: "
                "give condition and known codes at once"
            )
        last = len(cache.keys) - 1
        for i, (block, *kept) in enumerate(zip(cache.blocks, cache.keys, cache.values, strict=True)):
            # of the last block, later steps need keys and values alone, and the vocabulary one position
            x = block(x, kept, cache.length, last_only=i == last)
        cache.length = end
        return cache.head(self.ln_f(x[:, -1]))


class CodeGPT(GPT):
    """A GPT over vectors, (B, T, in_channels), in place of tokens: code vectors or patches, for instance."""

    def __init__(
        self, vocab_size: int, block_size: int, in_channels: int, n_layer: int = 12, n_head: int = 8,
        n_embd: int = 256, embd_pdrop: float = 0.0, resid_pdrop: float = 0.0, attn_pdrop: float = 0.0,
        n_unmasked: int = 0,
    ):
        super().__init__(
            vocab_size, block_size, n_layer, n_head, n_embd, embd_pdrop, resid_pdrop, attn_pdrop, n_unmasked
        )
        self.tok_emb = nn.Linear(in_channels, n_embd)
        self._init_weights(self.tok_emb)


class KMeans(nn.Module):
    """Clusters of colours, the tokens of image GPT (Chen et al. 2020).

    Args:
        ncluster: number of clusters K.
        nc: channels C of a pixel.
        niter: rounds of Lloyd's algorithm in `initialize`.
    """

    def __init__(self, ncluster: int = 512, nc: int = 3, niter: int = 10):
        super().__init__()
        self.ncluster, self.nc, self.niter = ncluster, nc, niter
        self.register_buffer("C", torch.randn(ncluster, nc))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def is_initialized(self) -> bool:
        """Whether `initialize` has run, here or before the checkpoint was written."""
        return self.initialized.item() == 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Find the clusters of pixels (N, C), N >= K; one that stays empty moves to a random pixel."""
        if x.ndim != 2 or x.shape[1] != self.nc or len(x) < self.ncluster:
            raise ValueError(f"pixels {tuple(x.shape)} given, (N, {self.nc}), N >= {self.ncluster}, expected")
        centres = x[torch.randperm(len(x), device=x.device)[: self.ncluster]]
        for _ in range(self.niter):
            nearest = torch.cdist(x, centres).argmin(1)
            counts = torch.bincount(nearest, minlength=self.ncluster)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            elsewhere = x[torch.randint(len(x), (self.ncluster,), device=x.device)]
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), elsewhere)
        self.C.copy_(centres)
        self.initialized.fill_(1)

    def forward(self, x: Tensor, reverse: bool = False, shape: tuple[int, ...] | None = None) -> Tensor:
        """Pixels (B, C, H, W) to clusters (B, H*W); with `reverse` and that shape, clusters to pixels."""
        if reverse:
            return rearrange(F.embedding(x, self.C), "b (h w) c -> b c h w", h=shape[2], w=shape[3])
        pixels = rearrange(x, "b c h w -> b (h w) c")
        return torch.cdist(pixels, self.C.expand(len(x), -1, -1)).argmin(-1)


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k highest at -inf: the 2021 call."""
    return filter_logits(logits, top_k=k)


@torch.no_grad()
def sample(
    model: GPT, x: Tensor, steps: int, temperature: float = 1.0, sample: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Continue tokens x (B, T) by `steps`, and return all of them (B, T + steps): the 2021 call.

    Takes the likeliest token each time unless `sample`. Tokens beyond the block size are drawn from the last
    `block_size` before them.
    """
    model.eval()
    block = model.get_block_size()
    cached = min(steps, max(0, block - x.shape[1] + 1))
    # beyond the block the window slides: every position changes, and nothing can be kept
    for count in [cached] * (cached > 0) + [1] * (steps - cached):
        drawn = sample_tokens(
            model, x[:, -block:], count, temperature=temperature, top_k=top_k, greedy=not sample
        )
        x = torch.cat((x, drawn), dim=1)
    return x


@torch.no_grad()
def sample_with_past(
    x: Tensor, model: GPT, steps: int, temperature: float = 1.0, sample_logits: bool = True,
    top_k: int | None = None, top_p: float | None = None, callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue tokens x (B, T) by `steps`, and return only the new ones (B, steps): the 2021 call.

    As it was then, `top_k` 0 keeps all codes, and so does one above the vocabulary.
    """
    top_k = min(top_k, model.config.vocab_size) if top_k else None
    return sample_tokens(
        model, x, steps, temperature=temperature, top_k=top_k, top_p=top_p, greedy=not sample_logits,
        callback=None if callback is None else lambda step, codes: callback(step),
    )
