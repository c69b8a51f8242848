"""Count, without a clock, what a piece of code does: operators, operations, waits for the device, bytes.

    with Counter() as counter:
        step()
    counter.operators, counter.waits, counter.flops, counter.peak_bytes

On the device "meta" nothing is computed, and a step of any size is counted in seconds.
"""

import math
import weakref
from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

# Their result is a number, or has as many entries as the values say: the host waits for the device.
WAITS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.nonzero_numpy, aten.masked_select,
    aten.equal, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.argwhere,
}
# They give memory or a view, and start no kernel.
WITHOUT_KERNEL = {
    aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.detach,
    aten.detach_, aten._reshape_alias, aten._unsafe_view, aten.lift_fresh,
}
# Operators of the CPU that torch's counter does not know.
ATTENTION, PACKED_LINEAR = "_scaled_dot_product_flash_attention_for_cpu", "_linear_pointwise"


class Counter(TorchDispatchMode):
    """Counts what is run within the block, also by the backward pass.

    Attributes:
        operators: how often each ATen operator ran that starts a kernel, by name. Views do not count.
        waits: the same of operators for which the host waits: `.item()`, a mask as an index, a copy from an
            accelerator to the CPU.
        flops: operations of matrix products, convolutions and attention, by the dtype of the input.
        peak_bytes: the most bytes, of tensors that were made within the block, that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Tally[str] = Tally()
        self.waits: Tally[str] = Tally()
        self.flops: Tally[str] = Tally()
        self.peak_bytes = self._bytes = 0
        self._storages: dict[int, weakref.ref] = {}  # by the address of the storage in C++

    @property
    def total_flops(self) -> int:
        """Operations of all dtypes."""
        return sum(self.flops.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        known = flop_function(packet)
        if known is None and func._can_decompose():  # in inference mode, where composite operators arrive
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for tensor in tensors((args, kwargs)):
            self._notice(tensor, is_new=False)
        name = packet.__name__
        if waits(packet, args, kwargs):
            self.waits[name] += 1
        result = func(*args, **kwargs)
        if known is not None:
            dtype = next((x.dtype for x in tensors(args) if x.is_floating_point()), torch.float32)
            self.flops[str(dtype).removeprefix("torch.")] += known(*args, **kwargs, out_val=result)
        if not (func.is_view or packet in WITHOUT_KERNEL):
            self.operators[name] += 1
        for tensor in tensors(result):
            self._notice(tensor, is_new=True)
        return result

    def _notice(self, tensor: Tensor, is_new: bool) -> None:
        """Count the memory of a tensor that is seen for the first time, until it is freed."""
        if tensor.is_mkldnn:  # weights in an order of their own: no storage is accessible
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        size = storage.nbytes() if is_new else 0
        self._storages[address] = weakref.ref(storage, partial(self._forget, address, size))
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _forget(self, address: int, size: int, _: object) -> None:
        self._storages.pop(address, None)
        self._bytes -= size


def flop_function(packet: Any) -> Any:
    """Return the function that counts an operator's operations, None for one that has no products."""
    name = packet.__name__
    if name == ATTENTION:
        return lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    if name == ATTENTION + "_backward":
        return lambda grad, q, k, v, *_, out_val=None, **__: sdpa_backward_flop_count(
            grad.shape, q.shape, k.shape, v.shape
        )
    if name == PACKED_LINEAR:
        return lambda x, *_, out_val, **__: 2 * x.numel() * out_val.shape[-1]
    return flop_registry.get(packet)


def waits(packet: Any, args: Sequence, kwargs: Mapping[str, Any]) -> bool:
    """Say whether the host would wait for the device if the operator ran on an accelerator."""
    if packet in WAITS:
        return True
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet is aten._to_copy:
        device = kwargs.get("device")
        leaves = device is not None and torch.device(device).type == "cpu" and args[0].device.type != "cpu"
        return leaves and not kwargs.get("non_blocking", False)
    if packet is aten.copy_:
        target, source, *rest = args
        leaves = target.device.type == "cpu" and source.device.type != "cpu"
        return leaves and not (rest and rest[0]) and not kwargs.get("non_blocking", False)
    return False


def tensors(nested: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    return (leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


def gpt_step_flops(
    layers: int, channels: int, vocab: int, tokens: int, batch: int, scored: int | None = None
) -> int:
    """Return the operations of a training step of a GPT: forward, and twice that backward.

    A block has 12 D^2 weights, each of which is one multiplication and one addition a token; attention is two
    products of T x T x D, counted whole although half of it is masked. The backward pass of fused attention
    computes the scores again: five products for the forward pass's two.

    Args:
        layers, channels: L and D.
        vocab: size of the vocabulary V.
        tokens: length T of the sequence.
        batch: sequences B.
        scored: positions whose logits are computed; all of them when None.
    """
    rows, scored = batch * tokens, tokens if scored is None else scored
    products = 2 * rows * layers * 12 * channels**2 + 2 * batch * scored * channels * vocab
    attention = layers * 4 * batch * tokens**2 * channels
    return 3 * products + math.ceil(3.5 * attention)
