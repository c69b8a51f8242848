"""The identity of a network: a hash of its weights, the same whatever file they came from."""

import hashlib
import re

import torch
from torch import nn

# Entries of a state dict that change nothing that a trained network computes: losses, the colours of 2021,
# and what a codebook counts in training.
OF_TRAINING = re.compile(r"(.*\.)?(loss\..*|colorize|idle_batches|has_begun|cluster_size|embed_avg)")


@torch.no_grad()
def content_hash(module: nn.Module, *more: object) -> str:
    """Return the SHA-256 of all tensors that matter, with their names, shapes and types, as 64 digits.

    Args:
        module: the network, on any device; training it further changes the hash.
        more: values that identify it as well, by their `repr`: those of a network without weights.
    """
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if OF_TRAINING.fullmatch(name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
