"""Inception score: sharp and diverse classifications (Salimans et al. 2016).

N samples, C classes, S splits.
"""

import torch
from torch import Tensor


def inception_scores(logits: Tensor, *, splits: int = 10, seed: int | None = None) -> Tensor:
    """Return exp(mean KL(p(y|x) || p(y))) of each split, (S,), float64; its mean is called IS.

    Args:
        logits: of a classifier, (N, C).
        splits: parts of the set, in order: S.
        seed: shuffle the set first; None keeps the order, as the evaluator of ADM does.

    Raises:
        ValueError: more splits than samples.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits}: give 1 to {len(logits)}, the number of samples")
    log_p = logits.double().log_softmax(1)  # (N, C)
    if seed is not None:
        log_p = log_p[torch.randperm(len(log_p), generator=torch.Generator().manual_seed(seed))]
    n, scores = len(log_p), []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = part.exp()
        scores.append((p * (part - p.mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores)
