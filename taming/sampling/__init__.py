"""Drawing codes from a transformer: pure functions of tensors, with the random numbers passed in."""

from taming.sampling.decode import CachedTransformer, image_generators, sample_tokens
from taming.sampling.filters import filter_logits
from taming.sampling.window import sample_window

__all__ = ["CachedTransformer", "filter_logits", "image_generators", "sample_tokens", "sample_window"]
