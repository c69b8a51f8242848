"""Sampling codes from a transformer: pure functions of tensors, with the random numbers passed in."""

from taming.sampling.decode import CachedTransformer, sample_tokens
from taming.sampling.filters import filter_logits
from taming.sampling.logits_sampler import Cancelled, image_generators
from taming.sampling.masked import halton_order, sample_masked, sample_masked_window
from taming.sampling.options import SamplingOptions
from taming.sampling.schedules import Interval, Linear, PowerCosine
from taming.sampling.window import sample_window, window_nll

__all__ = [
    "CachedTransformer", "Cancelled", "Interval", "Linear", "PowerCosine", "SamplingOptions",
    "filter_logits", "halton_order", "image_generators", "sample_masked", "sample_masked_window",
    "sample_tokens", "sample_window", "window_nll",
]
