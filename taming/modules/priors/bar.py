"""BAR: an autoregressive transformer that predicts the bits of each code, by a masked head, not a softmax.

"Autoregressive image generation with masked bit modeling", 2026 (arXiv 2602.09024). Input and head grow with
the number of bits, not of codes. Codes are those of tokenizers whose indices are bits: LFQ, BSQ, FSQ of
levels that are powers of two.

B batch, N codes of G groups of bits, V values of a group, M condition tokens, D channels of the transformer,
W channels of the head. The first bit is the lowest one of the index.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.priors.decoder import modulate
from taming.modules.priors.maskbit import bits_per_group, signed_bits
from taming.modules.priors.masked import init_weights
from taming.modules.priors.rar import RAR
from taming.modules.quantizers.bits import digits_to_indices, indices_to_bits, indices_to_digits
from taming.modules.transformer.positions import Part
from taming.parameters import NonNegativeInt, PositiveInt, Probability


class BitEmbedding(nn.Module):
    """Embeddings of codes, linear in their bits, and of condition tokens, from a table.

    Tokens are the codes 0..K - 1, and K + 1 + c for the condition token c.
    """

    def __init__(self, vocab_size: int, bits: int, condition_vocab_size: int, channels: int):
        super().__init__()
        self.vocab_size, self.bits = vocab_size, bits
        self.code = nn.Linear(bits, channels)
        self.condition = nn.Embedding(condition_vocab_size, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to (B, T, D)."""
        bits = indices_to_bits(tokens.clamp(max=self.vocab_size - 1), self.bits)
        code = self.code((2 * bits - 1).to(self.code.weight.dtype))
        condition = self.condition((tokens - self.vocab_size - 1).clamp(min=0))
        return torch.where((tokens < self.vocab_size)[..., None], code, condition)


class _Layer(nn.Module):
    """A perceptron with a skip connection, whose norm is modulated by the feature of the code."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.modulation = nn.Linear(channels, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(feature).chunk(3, dim=-1)
        return x + (1 + gate) * self.mlp(modulate(F.layer_norm(x, x.shape[-1:]), shift, scale))


class BitHead(nn.Module):
    """p(code | feature): each group of bits given the feature and the groups that are known.

    Args:
        channels: D, of features.
        vocab_size: number of codes, a power of two.
        bit_groups: G.
        n_layer, width: perceptrons, and their channels W.
    """

    def __init__(self, channels: int, vocab_size: int, bit_groups: int, n_layer: int, width: int):
        super().__init__()
        self.groups, self.bits = bit_groups, bits_per_group(vocab_size, bit_groups)
        self.group_size = 2**self.bits
        self.feature = nn.Linear(channels, width)
        self.known = nn.Linear(bit_groups * self.bits, width)
        self.layers = nn.ModuleList([_Layer(width, channels) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, bit_groups * self.group_size)
        self.apply(init_weights)

    def split(self, codes: Tensor) -> Tensor:
        """Return the groups (..., G) of codes (...), that of the lowest bits first."""
        return indices_to_digits(codes, [self.group_size] * self.groups)

    def join(self, parts: Tensor) -> Tensor:
        """Return the codes (...) of groups (..., G)."""
        return digits_to_indices(parts, [self.group_size] * self.groups)

    def forward(self, features: Tensor, parts: Tensor, masked: Tensor) -> Tensor:
        """Return logits (..., G, V) of groups, given features (..., D) and the groups that are not masked."""
        known = signed_bits(parts, masked, self.bits).to(features.dtype)  # (..., bits)
        x = self.feature(features) + self.known(known)  #                   (..., W)
        activated = F.silu(features)
        for layer in self.layers:
            x = layer(x, activated)
        return self.output(self.norm(x)).unflatten(-1, (self.groups, self.group_size))

    def loss(self, features: Tensor, codes: Tensor) -> Tensor:
        """Return the mean cross-entropy of masked groups, times G, in nats per code: ().

        Of each code, any number of groups from 1 to G is masked, all numbers and all groups alike.
        """
        parts = self.split(codes)  # (B, N, G)
        count = torch.randint(1, self.groups + 1, codes.shape, device=codes.device)[..., None]
        masked = torch.rand(parts.shape, device=codes.device).argsort(-1) < count
        logits = self(features, parts, masked)  # (B, N, G, V)
        losses = F.cross_entropy(logits[masked].float(), parts[masked], reduction="none")
        weights = (1.0 / count).expand(parts.shape)[masked]  # every code alike
        return self.groups * (losses * weights).sum() / codes.numel()

    def log_prob(self, features: Tensor, codes: Tensor) -> Tensor:
        """Return log p of codes (...), exact: the chain over the groups, in their order."""
        parts, result = self.split(codes), torch.zeros(codes.shape, device=codes.device)
        masked = torch.ones_like(parts, dtype=torch.bool)
        for group in range(self.groups):
            logits = self(features, parts, masked)[..., group, :].float()  # (..., V)
            result = result + logits.log_softmax(-1).gather(-1, parts[..., group, None])[..., 0]
            masked[..., group] = False
        return result


class BAR(RAR):
    """RAR's transformer over codes as bits, and a head that predicts the bits of a code in G steps.

    `forward`, `code_logits` and `extend` return features (..., D) in place of logits: `code_head` makes codes
    of them. Filters of sampling, top-k for instance, apply to each group of bits.

    Args:
        vocab_size: number of codes, a power of two.
        layout, condition_vocab_size, n_layer, n_head, n_embd, ffn_dim, random_until, raster_from, attn_pdrop,
            resid_pdrop: see `RAR`.
        bit_groups: G, a divisor of the number of bits.
        head_layers, head_width: perceptrons of the head, and their channels; D when None.

    Raises:
        ValueError: a number of codes that is not a power of two, groups that do not divide bits; see `RAR`.
    """

    def __init__(
        self, vocab_size: PositiveInt, layout: Sequence[Part], condition_vocab_size: PositiveInt,
        n_layer: PositiveInt = 24, n_head: PositiveInt = 16, n_embd: PositiveInt = 768, *,
        bit_groups: PositiveInt = 4, head_layers: PositiveInt = 3, head_width: PositiveInt | None = None,
        ffn_dim: PositiveInt | None = None, random_until: NonNegativeInt = 0, raster_from: NonNegativeInt = 0,
        attn_pdrop: Probability = 0.0, resid_pdrop: Probability = 0.0,
    ):
        bits = bit_groups * bits_per_group(vocab_size, bit_groups)
        super().__init__(  # a single code: the table and the softmax of all codes are never made
            1, layout, condition_vocab_size, n_layer, n_head, n_embd, ffn_dim=ffn_dim,
            random_until=random_until, raster_from=raster_from, attn_pdrop=attn_pdrop,
            resid_pdrop=resid_pdrop,
        )
        self.vocab_size = vocab_size
        self.embeddings = BitEmbedding(  # type: ignore[assignment]
            vocab_size, bits, condition_vocab_size, n_embd
        )
        self.embeddings.apply(init_weights)
        self.lm_head = nn.Identity()  # type: ignore[assignment]
        self.bit_head = BitHead(n_embd, vocab_size, bit_groups, head_layers, head_width or n_embd)

    @property
    def code_head(self) -> BitHead:
        """The head."""
        return self.bit_head

    def log_prob(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return log p of each code (B, N), in nats: exact, by the chain over codes, then groups of bits."""
        features = self.code_logits(codes if inputs is None else inputs, condition)  # (B, N, D)
        return self.bit_head.log_prob(features, codes)

    def loss(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return, in training mode, the loss of the head; in eval mode the mean of -`log_prob`: ()."""
        if not self.training:
            return -self.log_prob(codes, condition, inputs).mean()
        features = self.code_logits(codes if inputs is None else inputs, condition)
        return self.bit_head.loss(features, codes)
