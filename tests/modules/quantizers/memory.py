"""Memory that a function needs: bytes of all tensors that are alive at once."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts what operations inside the context allocate, in the forward and in the backward pass.

    What an operation allocates and frees itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        known = {StorageWeakRef(x.untyped_storage()) for x in given}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and (storage := StorageWeakRef(x.untyped_storage())) not in known:
                self.alive[storage] = x.untyped_storage().nbytes()
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
