"""The GPT of stage 2: a decoder-only transformer over codebook indices (Radford et al. 2019).

Attribute names are the keys of published checkpoints. B batch, T tokens, D = n_embd channels, V vocabulary,
P cached positions, L layers, n heads, d = D / n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.priors.base import AutoregressivePrior
from taming.modules.transformer.attention import attend
from taming.modules.transformer.cpu_inference import PACK_FROM, can_pack, pack_linears
from taming.modules.transformer.positions import Part, layout_positions
from taming.parameters import NonNegativeInt, PositiveInt, Probability
from taming.sampling import filter_logits, sample_tokens


class GPTConfig:
    """Sizes of a GPT; dropout rates are probabilities, `n_unmasked` a number of positions.

    Any further setting may be given by name, and becomes an attribute.
    """

    n_layer: int
    n_head: int
    n_embd: int
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    n_unmasked: int = 0

    def __init__(self, vocab_size: int, block_size: int, **kwargs: Any):
        self.vocab_size, self.block_size = vocab_size, block_size
        vars(self).update(kwargs)


class GPT1Config(GPTConfig):
    """Sizes of the first GPT, some 125 million parameters (Radford et al. 2018)."""

    n_layer = 12
    n_head = 12
    n_embd = 768


@dataclass
class KeyValueCache:
    """Preallocated keys and values of all layers; the first `length` positions are filled."""

    keys: list[Tensor]  # per layer: (B, n, P, d)
    values: list[Tensor]
    blocks: Sequence[nn.Module]  # the transformer's, or copies with weights in the order of single steps
    head: nn.Module
    length: int = 0


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and all tokens before it.

    The first `n_unmasked` tokens also see all of each other.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd: {config.n_embd} is not a multiple of n_head: {config.n_head}")
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
        """Map x (B, T, D), positions start.. of the sequence, to (B, T, D); the cache holds those before.

        With `last_only`, only the result of the last position is computed and returned, (B, 1, D).
        """
        parts = (self.query, x[:, -1:] if last_only else x), (self.key, x), (self.value, x)
        q, k, v = (rearrange(part(seen), "b t (n d) -> b n t d", n=self.n_head) for part, seen in parts)
        end = start + x.shape[1]
        if cache is not None:
            keys, values = cache
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]  # (B, n, end, d)
        y = attend(q, k, v, self.n_unmasked, self.attn_pdrop if self.training else 0.0)
        return self.resid_drop(self.proj(rearrange(y, "b n t d -> b t (n d)")))


def _drop_mask(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Drop the causal mask, a buffer in checkpoints up to 2021: it follows from the sizes."""
    state_dict.pop(prefix + "mask", None)


class Block(nn.Module):
    """Attention, then a perceptron, each after a layer norm and with a skip connection."""

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
        """Map x (B, T, D) to (B, T, D); arguments as for `CausalSelfAttention.forward`."""
        y = self.attn(self.ln1(x), cache, start, last_only)
        x = (x[:, -1:] if last_only else x) + y
        return x + self.mlp(self.ln2(x))


class GPT(AutoregressivePrior):
    """Predictor of the next code in a sequence of at most `block_size` tokens.

    Args:
        vocab_size: number of different tokens V: codebook and condition share it.
        block_size: longest input: condition tokens + codes - 1.
        n_layer, n_head, n_embd: number of blocks L, heads n, channels D.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout rates.
        n_unmasked: number of first positions, those of the condition, that all see each other.
        layout: the parts of the sequence, condition and codes: for each a number of tokens, or [height,
            width] of a grid. Position embeddings then start from the places of the tokens, from which
            spatial conditions are learned much sooner, see `layout_positions`; from zeros when None.

    Raises:
        ValueError: the layout has fewer tokens than `block_size`.
    """

    tok_emb: nn.Module

    def __init__(
        self, vocab_size: PositiveInt, block_size: PositiveInt, n_layer: PositiveInt = 12,
        n_head: PositiveInt = 8, n_embd: PositiveInt = 256, embd_pdrop: Probability = 0.0,
        resid_pdrop: Probability = 0.0, attn_pdrop: Probability = 0.0, n_unmasked: NonNegativeInt = 0,
        *, layout: Sequence[Part] | None = None,
    ):
        super().__init__()
        self.config = GPTConfig(
            vocab_size, block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, embd_pdrop=embd_pdrop,
            resid_pdrop=resid_pdrop, attn_pdrop=attn_pdrop, n_unmasked=n_unmasked,
        )
        self.vocab_size, self.block_size = vocab_size, block_size
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
        """Return the longest sequence that the network takes."""
        return self.block_size

    def _embed(self, idx: Tensor, embeddings: Tensor | None = None, start: int = 0) -> Tensor:
        """Embed tokens (B, T), after embeddings (B, E, D), at the positions from `start`: (B, E + T, D)."""
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
        """Map tokens (B, T) to logits (B, T, V) of the token after each, and the loss.

        The loss is the mean cross-entropy, in nats, to `targets` (B, T), None without them. `embeddings`
        (B, E, D) go before the tokens and get logits too: (B, E + T, V).
        """
        x = self._embed(idx, embeddings)
        for block in self.blocks:
            x = block(x)
        return self._logits_and_loss(x, targets)

    def _logits_and_loss(self, x: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    # ---- decoding with cached keys and values (taming.sampling.CachedTransformer)

    def new_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """Return room for `length` positions of `batch_size` sequences, with the model's device and dtype."""
        keys, values = self._room(batch_size, length)
        parts: list[nn.Module] = [*self.blocks, self.head]
        if length >= PACK_FROM and can_pack(keys[0].device, keys[0].dtype):
            parts = [pack_linears(part, batch_size, keys[0].dtype) for part in parts]
        return KeyValueCache(keys, values, parts[:-1], parts[-1])

    def _room(self, batch_size: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return uninitialized keys and values (B, n, length, d) of each layer."""
        config, like = self.config, self.pos_emb
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        device = like.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
        empty = [torch.empty(shape, dtype=dtype, device=like.device) for _ in range(2 * config.n_layer)]
        return empty[: config.n_layer], empty[config.n_layer :]

    def extend(self, idx: Tensor, cache: KeyValueCache, embeddings: Tensor | None = None) -> Tensor:
        """Append tokens (B, T) to those in the cache, and return logits (B, V) of the token after the last.

        The first call must hold the whole unmasked prefix, since its tokens see those after them.
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

    @torch.no_grad()
    def forward_with_past(
        self, idx: Tensor, embeddings: Tensor | None = None, targets: Tensor | None = None,
        past: Sequence[Tensor] | None = None, past_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Map tokens (B, T) to logits, loss, and their keys and values: the 2021 call, for inference.

        `new_cache` and `extend` are faster: here keys and values are copied at each call.

        Args:
            idx, embeddings, targets: as for `forward`.
            past: the third result of all calls before, for the tokens before these.
            past_length: number of those tokens.

        Returns:
            Logits (B, T, V), the loss or None, and keys and values (L, 2, B, n, T, d).

        Raises:
            ValueError: the model is in training mode, or `past` does not hold `past_length` tokens.
        """
        if self.training:
            raise ValueError("forward_with_past is for inference: call model.eval() first")
        known = torch.cat(list(past), dim=-2) if past else None  # (L, 2, B, n, past_length, d)
        start = 0 if known is None else known.shape[-2]
        if known is not None and start != past_length:
            raise ValueError(f"past holds {start} tokens, but past_length is {past_length}")
        x = self._embed(idx, embeddings, start)
        kept = list(zip(*self._room(len(x), start + x.shape[1]), strict=True))
        for i, (block, pair) in enumerate(zip(self.blocks, kept, strict=True)):
            if known is not None:
                for room, values in zip(pair, known[i], strict=True):
                    room[:, :, :start] = values
            x = block(x, pair, start)
        presents = torch.stack([torch.stack([room[:, :, start:] for room in pair]) for pair in kept])
        return *self._logits_and_loss(x, targets), presents


class DummyGPT(nn.Module):
    """Stands in for a GPT where only the calls matter: its logits are the tokens plus `add_value`."""

    def __init__(self, add_value: int = 1):
        super().__init__()
        self.add_value = add_value

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        return idx + self.add_value, None


class CodeGPT(GPT):
    """A GPT over vectors (B, T, in_channels) instead of tokens, such as code vectors or patches."""

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
    """Clusters of colors, the tokens of image GPT (Chen et al. 2020).

    Args:
        ncluster: number of clusters K.
        nc: channels C of a pixel.
        niter: rounds of Lloyd's algorithm in `initialize`.
    """

    C: Tensor
    initialized: Tensor

    def __init__(self, ncluster: int = 512, nc: int = 3, niter: int = 10):
        super().__init__()
        self.ncluster, self.nc, self.niter, self.shape = ncluster, nc, niter, (3, 32, 32)
        self.register_buffer("C", torch.zeros(ncluster, nc))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def is_initialized(self) -> bool:
        """Say whether `initialize` has run, here or before the checkpoint was written."""
        return bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Find the clusters of pixels (N, C), N >= K; a cluster that stays empty moves to a random pixel."""
        if x.ndim != 2 or x.shape[1] != self.nc or len(x) < self.ncluster:
            raise ValueError(f"pixels {tuple(x.shape)} given, (N, {self.nc}), N >= {self.ncluster}, expected")
        centers = x[torch.randperm(len(x), device=x.device)[: self.ncluster]]
        for _ in range(self.niter):
            nearest = torch.cdist(x, centers).argmin(1)
            counts = torch.bincount(nearest, minlength=self.ncluster)[:, None]
            sums = torch.zeros_like(centers).index_add_(0, nearest, x)
            elsewhere = x[torch.randint(len(x), (self.ncluster,), device=x.device)]
            centers = torch.where(counts > 0, sums / counts.clamp_min(1), elsewhere)
        self.C.copy_(centers)
        self.initialized.fill_(1)

    def forward(self, x: Tensor, reverse: bool = False, shape: tuple[int, ...] | None = None) -> Tensor:
        """Map pixels (B, C, H, W) to clusters (B, H*W); with `reverse`, clusters to pixels of `shape`.

        That is (C, H, W) or (B, C, H, W), 32 x 32 pixels when None.
        """
        if reverse:
            height, width = (shape or self.shape)[-2:]
            return rearrange(F.embedding(x, self.C), "b (h w) c -> b c h w", h=height, w=width)
        pixels = rearrange(x, "b c h w -> b (h w) c")
        return torch.cdist(pixels, self.C.expand(len(x), -1, -1)).argmin(-1)


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """Set all but the k highest of logits (..., V) to -inf: the 2021 call."""
    return filter_logits(logits, top_k=k)


@torch.no_grad()
def sample(
    model: GPT, x: Tensor, steps: int, temperature: float = 1.0, sample: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Continue tokens x (B, T) by `steps`, and return all of them (B, T + steps): the 2021 call.

    The most likely token is taken each time unless `sample`. Tokens beyond the block size follow from the
    last `block_size` tokens before them.
    """
    model.eval()
    block = model.get_block_size()
    cached = min(steps, max(0, block - x.shape[1] + 1))
    # beyond the block the window slides: every position changes, and nothing can be kept
    for count in [cached] * (cached > 0) + [1] * (steps - cached):
        new = sample_tokens(
            model, x[:, -block:], count, temperature=temperature, top_k=top_k, greedy=not sample
        )
        x = torch.cat((x, new), dim=1)
    return x


@torch.no_grad()
def sample_with_past(
    x: Tensor, model: GPT, steps: int, temperature: float = 1.0, sample_logits: bool = True,
    top_k: int | None = None, top_p: float | None = None, callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue tokens x (B, T) by `steps`, and return only the new ones (B, steps): the 2021 call.

    `top_k` 0, or above the vocabulary, keeps all codes.
    """
    top_k = min(top_k, model.config.vocab_size) if top_k else None
    return sample_tokens(
        model, x, steps, temperature=temperature, top_k=top_k, top_p=top_p, greedy=not sample_logits,
        callback=None if callback is None else lambda step, codes: callback(step),
    )
