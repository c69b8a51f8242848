"""Read pickles as data: nothing is imported, nothing is called.

A pickle is a program for a small stack machine. This file interprets its instructions with a fixed table of
the names that weights, Lightning 1.0 and OmegaConf use; each name stands for a function of this file that
makes numbers, strings, lists, dicts and `StoredTensor`s. Any other name is an error, which is raised before a
value is returned. `finish` replaces what is left of OmegaConf nodes and of classes by plain values.

Source of the instructions: the module `pickletools` of Python's standard library.
"""

import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

MAX_INSTRUCTIONS = 2_000_000  # about 4 s; a checkpoint of 1,000 tensors with optimizer states has 150,000
MAX_VALUES = 1_000_000  # in the result, where an object counts each time that it is referred to
MAX_DEPTH = 200  # levels of lists and dicts inside each other
MAX_COPIED = 1 << 25  # characters, bytes and items that calls copy, all together


class ForbiddenNameError(ValueError):
    """A pickle asks for names that are not in the table; `names` lists them."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"asks for {', '.join(names)}")
        self.names = tuple(names)


@dataclass(eq=False, slots=True)
class StoredBytes:
    """A piece of a file: its start, its length in bytes, and its CRC-32, begun at `seed`, if there is one."""

    name: str
    start: int
    size: int
    crc: int | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor whose data are still in the file: strides and offset count elements of `dtype`."""

    data: StoredBytes
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where a part of the tensor lies outside of its data."""
        numbers = (self.offset, *self.shape, *self.stride)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a tensor's shape, strides and offset must be whole numbers of at least 0")
        if len(self.shape) != len(self.stride) or len(self.shape) > 64:
            raise ValueError(f"a tensor has {len(self.shape)} dimensions and {len(self.stride)} strides")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (last + 1) * self.dtype.itemsize > self.data.size:
            raise ValueError(f"a tensor of shape {self.shape} does not lie within its {self.data.size} bytes")


@dataclass(eq=False, slots=True)
class _Name:
    """A class that a pickle names; `make` stands for calling it."""

    path: str
    make: Callable[..., Any]


@dataclass(eq=False, slots=True)
class Placeholder:
    """An object of a known class, with its arguments and state only."""

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None


def unpickle(program: BytesIO, storage: Callable[[tuple[Any, ...]], Any]) -> Any:
    """Interpret the pickle at the current position of `program`, which then is behind it.

    Args:
        program: the bytes.
        storage: turns the persistent identifier of a tensor's data into (StoredBytes, dtype).

    Raises:
        ForbiddenNameError: the pickle asks for a name that is not in the table; all such names are listed.
        ValueError, TypeError, LookupError, ...: it is damaged or no pickle.
    """
    machine = _Machine(storage)
    result: Any = None
    damage: Exception | None = None
    try:
        result = machine.run(program)
    except Exception as error:  # forbidden names before the damage are the more important news
        damage = error
    if machine.forbidden:
        raise ForbiddenNameError(list(dict.fromkeys(machine.forbidden))) from damage
    if damage is not None:
        raise damage
    return result


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, storage: Callable[[tuple[Any, ...]], Any]):
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.forbidden: list[str] = []
        self.copied = 0

    def run(self, program: BytesIO) -> Any:
        for count, (code, argument, _) in enumerate(pickletools.genops(program)):
            if count >= MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS:,} instructions in its pickle")
            if code.name == "STOP":
                return self.stack.pop()
            self.step(code.name, argument)
        raise EOFError("the pickle ends too early")

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in _COLLECTIONS:
            stack.append(_COLLECTIONS[name](self.pop_to_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            if not isinstance(stack[-1], Placeholder):
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            if not isinstance(stack[-1], Placeholder):
                (stack[-1].update if isinstance(stack[-1], set) else stack[-1].extend)(items)
        elif name == "GLOBAL":
            stack.append(self.find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.find(*self.pop(2)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            function, args = self.pop(3 if name == "NEWOBJ_EX" else 2)[:2]
            self.copied += sum(len(arg) for arg in args if isinstance(arg, Sized))
            if self.copied > MAX_COPIED:
                raise ValueError("its pickle copies strings or lists again and again")
            stack.append(function.make(*args))
        elif name == "BUILD":
            (state,) = self.pop(1)
            self.build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self.storage(*self.pop(1)))
        elif name == "POP":
            self.pop(1)
        elif name == "INST":
            self.pop_to_mark()
            stack.append(self.find(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the instruction {name}, which no checkpoint needs")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("its pickle takes more from the stack than is there")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def find(self, module: str, name: str) -> Any:
        """Return what the table has for a name; an unknown one is noted, and the rest is read for more."""
        # Python 2's names, which pickle protocol 2 writes: __builtin__ eval -> builtins.eval
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"[:200]
        value = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(value, torch.dtype):
            return value
        if path in STORAGES or path in FUNCTIONS:
            return _Name(path, FUNCTIONS.get(path, _nothing))
        if path not in CLASSES:
            self.forbidden.append(path)
        return _Name(path, lambda *args: Placeholder(path, args))

    @staticmethod
    def build(target: Any, state: Any) -> None:
        """Give an object its state; of real ones, only the versions that a state dict carries are taken."""
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, OrderedDict) and isinstance(state, dict) and "_metadata" in state:
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]


def _nothing(*_args: Any) -> None:
    raise ValueError("its pickle calls a type of storage")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *options: Any) -> StoredTensor:
    """Stand for torch._utils._rebuild_tensor_v2 and _v3; the options of the latter include a dtype."""
    data, dtype = storage
    if not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor's shape and strides must be tuples")
    for option in options:
        if isinstance(option, torch.dtype):
            dtype = option
        elif isinstance(option, dict) and any(option.values()):  # conj, neg: bits that are applied lazily
            raise ValueError(f"a tensor with {', '.join(map(str, option))} cannot be read: save a copy of it")
    return StoredTensor(data, dtype, offset, shape, stride)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _scalar(dtype: Any = None, data: Any = b"", *_rest: Any) -> float | int | bool | None:
    """A number of numpy as an ordinary one; None for other types."""
    code = dtype.args[0] if isinstance(dtype, Placeholder) and dtype.args else None
    number = _NUMBERS.get(code) if isinstance(code, str) else None
    fits = number is not None and isinstance(data, bytes) and len(data) == struct.calcsize(number)
    return struct.unpack(number, data)[0] if number is not None and fits else None


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "ascii", "utf-8"):
        raise ValueError(f"its pickle has bytes in the encoding {encoding!r}")
    return text.encode(encoding)


def _path(*parts: Any) -> str:
    return str(PurePosixPath(*map(str, parts)))


_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}

# Instructions that push their argument, a constant, a tuple of so many values, or a collection of those since
# MARK.
_PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict,
    "EMPTY_LIST": list, "EMPTY_SET": set,
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_COLLECTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple, "LIST": list, "FROZENSET": frozenset,
    "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}

# Names that pickles may use. Types of storages, which say what elements a tensor has:
STORAGES: dict[str, torch.dtype] = {
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in {
            "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
            "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
            "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
            "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
        }.items()
    },
    "torch.storage.UntypedStorage": torch.uint8,
}
# ... names whose call makes a plain value:
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): OrderedDict(items),
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda items=(): dict(items),
    "pytorch_lightning.utilities.parsing.AttributeDict": lambda items=(): dict(items),
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "builtins.complex": lambda *parts: complex(*parts),
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "pathlib.PosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib.PurePosixPath": _path,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,  # its name since numpy 2
}
# ... classes of networks that are published as whole modules, those of DALL-E: their tensors are taken, see
# `module_tensors`,
MODULES = (
    *(f"dall_e.encoder.{name}" for name in ("Encoder", "EncoderBlock")),
    *(f"dall_e.decoder.{name}" for name in ("Decoder", "DecoderBlock")),
    "dall_e.utils.Conv2d",
    *(f"torch.nn.modules.{name}" for name in (
        "container.Sequential", "activation.ReLU", "pooling.MaxPool2d", "linear.Identity",
        "upsampling.Upsample",
    )),
)
# ... and classes whose objects are kept as their state.
CLASSES = frozenset((
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "argparse.Namespace",
    "numpy.dtype",
    *MODULES,
    "typing.Any",  # this and the following: OmegaConf records the types of its nodes
    "builtins.dict",
    "builtins.list",
    "builtins.tuple",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "torch._utils._rebuild_sparse_tensor",  # this and the following: tensors that a state dict cannot hold
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch.serialization._get_layout",
))


def module_tensors(value: Any) -> dict[str, StoredTensor] | None:
    """Return the state dict of a pickled module, tensors still in the file; None for anything else.

    Raises:
        ValueError: modules inside each other without end, or parts that no module has.
    """
    return _module_tensors(value, "", 0) if _is_module(value) else None


def _is_module(value: Any) -> bool:
    return isinstance(value, Placeholder) and value.path in MODULES


def _module_tensors(module: Placeholder, prefix: str, depth: int) -> dict[str, StoredTensor]:
    if depth > MAX_DEPTH:
        raise ValueError(f"modules are nested more than {MAX_DEPTH} levels deep")
    if not isinstance(module.state, dict):
        raise ValueError(f"the module {prefix or module.path} has no state")
    found: dict[str, StoredTensor] = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, part in (module.state.get(kind) or {}).items():
            if _is_module(part) and kind == "_modules":
                found |= _module_tensors(part, f"{prefix}{name}.", depth + 1)
            elif isinstance(part, StoredTensor):
                found[f"{prefix}{name}"] = part
            elif part is not None:
                raise ValueError(f"{prefix}{name} is neither a tensor nor a module")
            if len(found) > MAX_VALUES:
                raise ValueError(f"it stands for more than {MAX_VALUES:,} values")
    return found


class Finisher:
    """Turns what `unpickle` returns into plain values; what is shared stays shared.

    Args:
        tensor: makes a tensor of a `StoredTensor`.
    """

    def __init__(self, tensor: Callable[[StoredTensor], Tensor]):
        self.tensor = tensor
        self._done: dict[int, tuple[Any, Any, int]] = {}  # id -> the object itself, its plain value, its size
        self._open: set[int] = set()

    def finish(self, value: Any, depth: int = 0) -> tuple[Any, int]:
        """Return the plain value, and how many values it would be if nothing were shared.

        OmegaConf nodes become their values, classes their names, other objects their state.

        Raises:
            ValueError: it contains itself, is nested too deeply or too large.
        """
        if value is None or isinstance(value, str | int | float | bytes | complex | torch.dtype | torch.Size):
            return value, 1
        if id(value) in self._done:
            return self._done[id(value)][1:]
        if id(value) in self._open:
            raise ValueError("it holds a list or dict that contains itself")
        if depth > MAX_DEPTH:
            raise ValueError(f"lists and dicts are nested more than {MAX_DEPTH} levels deep")
        self._open.add(id(value))
        plain, size = self._convert(value, depth + 1)
        self._open.remove(id(value))
        if size > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES:,} values")
        self._done[id(value)] = value, plain, size
        return plain, size

    def _convert(self, value: Any, depth: int) -> tuple[Any, int]:
        if isinstance(value, StoredTensor):
            return self.tensor(value), 1
        if isinstance(value, Placeholder):
            state = value.state if isinstance(value.state, dict) else {}
            for key in ("_content", "_val"):  # an OmegaConf container, an OmegaConf leaf
                if key in state:
                    return self.finish(state[key], depth)
            if value.path.startswith("torch."):
                return value, 1
            return self.finish(state, depth)
        if isinstance(value, _Name):
            return value.path, 1
        if isinstance(value, dict):
            pairs = [(self.finish(key, depth), self.finish(item, depth)) for key, item in value.items()]
            plain: Any = type(value)((key[0], item[0]) for key, item in pairs)
            if hasattr(value, "_metadata"):
                plain._metadata = self.finish(value._metadata, depth)[0]
            return plain, 1 + sum(item[1] for _, item in pairs)
        if isinstance(value, list | tuple | set | frozenset):
            found = [self.finish(item, depth) for item in value]
            return type(value)(item for item, _ in found), 1 + sum(size for _, size in found)
        return value, 1
