"""Masked priors: they predict all codes that are masked from those that are not, at once.

Chang et al. 2022, "MaskGIT: masked generative image transformer". B batch, N codes, G groups of bits of a
code (1 where a code is one unit), U = N * G units that are masked each on its own, V values of a unit, M
condition tokens, S steps.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.priors.base import Prior
from taming.modules.transformer.positions import Part, layout_positions
from taming.parameters import NonNegativeFloat, PositiveInt, Probability
from taming.sampling import SamplingOptions, halton_order, sample_masked, sample_masked_window
from taming.sampling.logits_sampler import Callback, Generators, at_most
from taming.sampling.masked import report_masked
from taming.sampling.options import resolve
from taming.sampling.schedules import MASK_SCHEDULES, num_masked
from taming.sampling.window import Condition

MaskSchedule = Literal["cosine", "arccos", "linear", "square", "cubic", "root"]


class MaskedPrior(Prior):
    """A prior over masked codes; a subclass is a network, `part_logits`.

    Args:
        vocab_size: number of codes K.
        condition_vocab_size: number of condition tokens, null token included; they have embeddings of their
            own.
        block_size: condition tokens + codes - 1, as for priors that read a code less than they predict.
        mask_schedule: of the share of masked codes in training, at a progress that is uniform in [0, 1].
        label_smoothing: probability that the target of training spreads over all values.
        unmasked_weight: weight of codes that are not masked, in training; Yu et al. 2024 ("TiTok") take 0.1.
        likelihood_steps: steps S of `log_prob`. More of them cost time, and give higher values.
        certainty: by what sampling compares codes: "log_prob", or "logit" as Yu et al. 2024 do.

    Attributes:
        groups: G.
        group_size: V.
    """

    in_steps = True
    groups: int = 1
    group_size: int

    def __init__(
        self, vocab_size: PositiveInt, condition_vocab_size: PositiveInt, block_size: PositiveInt, *,
        mask_schedule: MaskSchedule = "cosine", label_smoothing: Probability = 0.0,
        unmasked_weight: NonNegativeFloat = 0.0, likelihood_steps: PositiveInt = 16,
        certainty: Literal["log_prob", "logit"] = "log_prob",
    ):
        super().__init__()
        self.vocab_size, self.condition_vocab_size = vocab_size, condition_vocab_size
        self.block_size = block_size
        self.mask_schedule, self.label_smoothing = mask_schedule, label_smoothing
        self.unmasked_weight, self.likelihood_steps = unmasked_weight, likelihood_steps
        self.certainty, self.group_size = certainty, vocab_size

    def part_logits(self, parts: Tensor, masked: Tensor, condition: Tensor) -> Tensor:
        """Return logits (B, N, G, V) of all groups of all codes.

        Args:
            parts: (B, N, G) int64; values where they are masked must not count.
            masked: (B, N, G) bool.
            condition: tokens (B, M).
        """
        raise NotImplementedError

    def split(self, codes: Tensor) -> Tensor:
        """Return the groups (B, N, G) of codes (B, N)."""
        return codes[..., None]

    def join(self, parts: Tensor) -> Tensor:
        """Return the codes (B, N) of groups (B, N, G)."""
        return parts[..., 0]

    def check_length(self, condition: Tensor, count: int) -> None:
        """Raise ValueError if condition (B, M) and `count` codes are more than the network reads."""
        if condition.shape[1] + count - 1 > self.block_size:
            raise ValueError(
                f"{condition.shape[1]} condition tokens and {count} codes need a block_size of "
                f"{condition.shape[1] + count - 1}; the prior's is {self.block_size}"
            )

    # ---- training

    def loss(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what training minimizes, (), in nats per code.

        In training mode it is the cross-entropy of codes that are masked at random, the mean over all of
        them, times G (eq. 3 of Chang et al. 2022). In eval mode it is the mean of -`log_prob`.
        """
        if not self.training:
            return super().loss(codes, condition, inputs)
        parts = self.split(codes)  # (B, N, G)
        masked = self.random_mask(parts.flatten(1)).view(parts.shape)
        seen = parts if inputs is None else self.split(inputs)
        return self.masked_loss(self.part_logits(seen, masked, condition), codes, masked)

    def masked_loss(self, logits: Tensor, codes: Tensor, masked: Tensor) -> Tensor:
        """Return the loss, (), of logits (B, N, G, V) for codes (B, N), whose groups (B, N, G) are masked."""
        losses = F.cross_entropy(
            logits.flatten(0, 2).float(), self.split(codes).flatten(), label_smoothing=self.label_smoothing,
            reduction="none",
        )
        weights = torch.where(masked.flatten(), 1.0, self.unmasked_weight)
        return self.groups * (losses * weights).sum() / weights.sum()

    def random_mask(self, units: Tensor) -> Tensor:
        """Choose which units (B, U) are masked: at least one in each row, of a share that varies by row."""
        share = MASK_SCHEDULES[self.mask_schedule](torch.rand(len(units), 1, device=units.device))
        count = (units.shape[1] * share).round().clamp(min=1)  # (B, 1)
        return torch.rand(units.shape, device=units.device).argsort(1) < count

    # ---- likelihood

    @property
    def likelihood(self) -> str:
        """What `log_prob` is, for reports."""
        return (
            f"a bound: decoded in up to {self.likelihood_steps} steps in one fixed random order, groups of a "
            "step independently"
        )

    def log_prob(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return log p of each code (B, N), in nats, for codes that are decided in one fixed random order.

        The order, and the schedule of S steps, are the same for all images. Units of a step are independent,
        given those of earlier steps, so this is a distribution over codes: that of a sampler which follows
        this order. With S = U it is the exact chain of this order. The order is chosen at random, so its
        expectation is a lower bound of the log-likelihood of the mixture over all orders (Jensen; Uria et
        al. 2014, "A deep and tractable density estimator", eq. 8).
        """
        parts = self.split(codes)  # (B, N, G)
        seen = parts if inputs is None else self.split(inputs)
        count = parts[0].numel()
        rank = _random_rank(count).to(codes.device)  # (U,)
        steps = torch.tensor([min(self.likelihood_steps, count)])
        units, left = torch.tensor([count]), torch.tensor([count])
        result = torch.zeros(len(codes), count, device=codes.device)
        for step in range(int(steps)):
            masked = rank >= count - left.item()
            left = num_masked(self.mask_schedule, steps, step, units, left)
            now = masked & (rank < count - left.item())  # (U,)
            logits = self.part_logits(seen, masked.view(parts[0].shape).expand(parts.shape), condition)
            chosen = logits.flatten(1, 2)[:, now].float()  # (B, those of this step, V)
            result[:, now] = -F.cross_entropy(
                chosen.transpose(1, 2), parts.flatten(1)[:, now], reduction="none"
            )
        return result.view(parts.shape).sum(-1)

    # ---- sampling

    def sample(
        self, condition: Tensor, shape: tuple[int, int], options: SamplingOptions | None = None, *,
        null_condition: Tensor | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None, known: Tensor | None = None,
    ) -> Tensor:
        """Sample codes (B, N), N = h * w, in `options.steps` steps; see `Prior.sample`, `sample_masked`."""
        count, size = shape[0] * shape[1], len(condition)
        codes = torch.zeros(size, count, dtype=torch.int64, device=condition.device)
        masked = torch.ones_like(codes, dtype=torch.bool)
        if known is not None:
            codes[:, : known.shape[1]], masked[:, : known.shape[1]] = known, False
        return self.fill(
            codes, masked, condition, options, null_condition=null_condition, shape=shape,
            generator=generator, callback=callback, codebook_size=codebook_size,
        )

    def fill(
        self, codes: Tensor, masked: Tensor, condition: Tensor, options: SamplingOptions | None = None, *,
        shape: tuple[int, int], null_condition: Tensor | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None,
    ) -> Tensor:
        """Sample those codes (B, N) that are masked (B, N), and return all codes.

        Args:
            codes, masked: the codes, and which of them are sampled.
            condition, options, shape, null_condition, generator, codebook_size: see `Prior.sample`.
            callback: called after each step with the number of codes that are decided in all images, minus
                1, and the codes so far (B, N), -1 where a code is masked.
        """
        self.check_length(condition, codes.shape[1])
        options = resolve(options, {})
        parts = self.split(codes)  # (B, N, G)
        given = int((~masked).sum(1).min()) if callback is not None else 0

        def predict(units: Tensor, open_units: Tensor, guided: bool) -> Tensor:
            read = [condition]
            if guided and null_condition is not None:
                read.append(null_condition.expand(len(condition), -1))
            seen, hidden = (x.view(parts.shape).repeat(len(read), 1, 1) for x in (units, open_units))
            return self.part_logits(seen, hidden, torch.cat(read)).flatten(1, 2)

        def watch(units: Tensor, open_units: Tensor) -> None:
            report_masked(
                callback, self.join(units.view(parts.shape)), open_units.view(parts.shape).any(-1), given
            )

        vocabulary = codebook_size if self.groups == 1 else None
        if self.groups > 1:  # filters are for codes; of a group, more values than there are is all of them
            options = options.replace(top_k=at_most(options.top_k, self.group_size))
        order = None
        if options.mask_order == "halton":
            each = torch.arange(self.groups)
            order = halton_order(*shape).flatten()[:, None] * self.groups + each  # (N, G)
            order = order.flatten().to(codes.device)
        units = sample_masked(
            predict, parts.flatten(1), masked[..., None].expand(parts.shape).flatten(1), options,
            has_null=null_condition is not None, vocabulary=vocabulary, by_logit=self.certainty == "logit",
            order=order, generator=generator, watch=None if callback is None else watch,
        )
        return self.join(units.view(parts.shape))

    def sample_window(
        self, condition: Condition, options: SamplingOptions | None = None, *,
        codebook_size: int | None = None, **arguments: Any,
    ) -> Tensor:
        """Sample a grid of codes (B, H, W) of any size, window by window; see `sample_masked_window`."""
        fill = functools.partial(self.fill, codebook_size=codebook_size)
        return sample_masked_window(fill, self.block_size, condition, options, **arguments)


def init_weights(module: nn.Module) -> None:
    """Start linear layers and embeddings from normal numbers of deviation 0.02, and biases from 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def start_positions(layout: Sequence[Part] | None, positions: Tensor) -> None:
    """Start position embeddings (T, D) or (1, T, D) from the places of the tokens, or from normal numbers.

    Args:
        layout: the parts of the sequence, in its order, see `layout_positions`; None for normal numbers of
            deviation 0.02.
        positions: the parameter.

    Raises:
        ValueError: the layout has fewer tokens than there are positions.
    """
    if layout is None:
        nn.init.normal_(positions, 0.0, 0.02)
        return
    length, channels = positions.shape[-2:]
    places = layout_positions(layout, channels)
    if len(places) < length:
        raise ValueError(f"layout has {len(places)} tokens, fewer than block_size + 1: {length}")
    positions.data.copy_(places[:length])


@functools.cache
def _random_rank(count: int) -> Tensor:
    """Return the place of each of so many units in a random order that is always the same, (U,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
