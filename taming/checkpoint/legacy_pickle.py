"""Read files of torch.save without running anything in them, those of 2020-21 included.

Lightning 1.0 keyed callback states by class object and kept OmegaConf nodes and numpy scalars beside the
weights. To read such a file none of that has to be imported: each known name is given an empty class of ours
for the time of the read, and `to_plain` turns the result into dicts, lists, numbers and strings. Names that
are not in STAND_INS stay forbidden.
"""

import pickle
import pickletools
import re
import struct
import threading
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

_ZIP_MAGIC = b"PK\x03\x04"
_OLD_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number at the start of a file of torch before 1.6
_SEARCH_LIMIT = 1 << 26  # bytes of a refused pickle that are searched for names
_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}
# What torch's reader accepts, or refuses by itself with a message that names it.
_TORCH_KNOWS = ("collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set")
_permission = threading.Lock()  # safe_globals holds for all threads, until the first exit


class StandIn:
    """Takes the place of a class in a pickle: accepts any arguments and state, and does nothing with them."""

    path = ""

    def __new__(cls, *args: Any):
        return object.__new__(cls)

    def __init__(self, *args: Any):
        self.args = args
        self.state: dict = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class PlainDict(StandIn):
    """Takes the place of a dict subclass, and is an ordinary empty dict from the start."""

    def __new__(cls, *args: Any):
        return {}


class PlainPath(StandIn):
    """Takes the place of a pathlib class, and is an ordinary string from the start."""

    def __new__(cls, *parts: Any):
        return str(PurePosixPath(*map(str, parts)))


class NumpyScalar(StandIn):
    """Takes the place of numpy's scalar constructor, and is an ordinary number, or None, from the start."""

    def __new__(cls, dtype: Any = None, data: Any = b"", *_: Any):
        code = dtype.args[0] if isinstance(dtype, StandIn) and dtype.args else None
        number = _NUMBERS.get(code) if isinstance(code, str) else None
        fits = number is not None and isinstance(data, bytes) and len(data) == struct.calcsize(number)
        return struct.unpack(number, data)[0] if fits else None


def _stand_in(path: str, base: type = StandIn) -> tuple[type, str]:
    """Make a class of ours, and pair it with the name that it answers to, as safe_globals wants it."""
    return type(path.rpartition(".")[2], (base,), {"path": path}), path


STAND_INS = (
    *map(
        _stand_in,
        (
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
            "typing.Any",  # this and the following: OmegaConf records the types of its nodes
            "builtins.dict",
            "builtins.list",
            "builtins.tuple",
            "builtins.int",
            "builtins.float",
            "builtins.str",
            "builtins.bool",
        ),
    ),
    _stand_in("collections.defaultdict", PlainDict),
    _stand_in("pytorch_lightning.utilities.parsing.AttributeDict", PlainDict),
    _stand_in("pathlib.PosixPath", PlainPath),
    _stand_in("pathlib.WindowsPath", PlainPath),
    _stand_in("numpy.core.multiarray.scalar", NumpyScalar),
    _stand_in("numpy._core.multiarray.scalar", NumpyScalar),  # its name since numpy 2
)


def read_pickled(path: Path, map_location: str | torch.device = "cpu", mmap: bool = True) -> Any:
    """Read a file of torch.save; stand-ins are let in only where a file asks for more than tensors.

    Raises ValueError with the reason for a file that asks for code, is damaged, or is of another kind.
    """
    with path.open("rb") as file:
        head = file.read(32)
    if not head.startswith(_ZIP_MAGIC):
        raise _not_a_zip(path, head)

    def load(mmap: bool = mmap) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)

    try:
        try:
            return load()
        except pickle.UnpicklingError:
            with _permission, torch.serialization.safe_globals(list(STAND_INS)):
                return to_plain(load())
        except RuntimeError as error:
            if not mmap or "mmap" not in str(error):
                raise
            return load(mmap=False)  # some network file systems cannot map files
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a reader's answer to damaged or hostile bytes can be anything
        raise _explain(path, error) from error


def to_plain(value: Any) -> Any:
    """Replace stand-ins at any depth: OmegaConf nodes by values, classes by names, objects by their state.

    Dicts are changed in place, so that a state dict keeps its type and the versions that it carries.
    """
    if isinstance(value, dict):
        items = [(to_plain(key), to_plain(item)) for key, item in value.items()]
        value.clear()
        value.update(items)
        return value
    if type(value) in (list, tuple):  # a torch.Size stays one
        return type(value)(map(to_plain, value))
    if isinstance(value, type) and issubclass(value, StandIn):
        return value.path
    if isinstance(value, StandIn):
        for key in ("_content", "_val"):  # an OmegaConf container, an OmegaConf leaf
            if key in value.state:
                return to_plain(value.state[key])
        return to_plain(value.state)
    return value


def foreign_globals(pickled: bytes) -> list[str]:
    """List what a pickle would import, besides tensors and STAND_INS, without running it: `["posix.system"]`.

    It serves error messages; what refuses is torch's own reader. Of damaged data, the sound beginning counts.
    """
    known = {*_TORCH_KNOWS, *(path for _, path in STAND_INS)}
    names = (name for name in _globals(pickled) if name not in known and not name.startswith("torch."))
    return list(dict.fromkeys(names))


def _globals(pickled: bytes) -> list[str]:
    names: list[str] = []
    strings: list[str] = []  # what STACK_GLOBAL takes its two names from
    memo: dict[int, Any] = {}
    last: Any = None
    try:
        for opcode, value, _ in pickletools.genops(pickled):
            name = opcode.name
            if name == "MEMOIZE" or "PUT" in name:
                memo[len(memo) if value is None else value] = last
                continue  # what is on top of the stack stays there
            if name in ("GLOBAL", "INST"):
                names.append(_modern(*value.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                names.append(_modern(*strings[-2:]))
            elif "GET" in name:
                value = memo.get(value)
            if isinstance(value, str) and name not in ("GLOBAL", "INST"):
                strings.append(value)
            last = value if name not in ("GLOBAL", "INST") else None
    except Exception:  # not a pickle, or a damaged one; either way it was not run
        pass
    return names


def _modern(module: str, name: str) -> str:
    """Translate Python 2's names, which pickle protocol 2 writes: `__builtin__ eval` -> `builtins.eval`."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _explain(path: Path, error: Exception) -> ValueError:
    """Say why a zip file of torch.save was not read: it asks for code, or it is damaged."""
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        names = foreign_globals(_pickle_in(path)) or ([named[1]] if named else [])
        if names:
            return _refusal(path, names)
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    return ValueError(
        f"{path} is truncated, damaged or not a checkpoint ({reason}); get it again and compare its size"
    )


def _pickle_in(path: Path) -> bytes:
    """Return the pickle inside a zip file of torch.save, or nothing where the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(name) as file:
                return file.read(_SEARCH_LIMIT)
    except (OSError, EOFError, StopIteration, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return b""


def _refusal(path: Path, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"refused: {path} asks for {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}, which weights "
        "do not need and which could run code here; nothing was loaded. Get the weights as .safetensors, or "
        "as a file that holds tensors, numbers and strings only"
    )


def _not_a_zip(path: Path, head: bytes) -> ValueError:
    """Say what a file is that does not start as today's checkpoints do; nothing in it is unpickled."""
    with path.open("rb") as file:
        names = foreign_globals(file.read(_SEARCH_LIMIT))
    if names:
        return _refusal(path, names)
    if _OLD_MAGIC in head:
        return ValueError(
            f"{path} is in the file format of torch before 1.6, which is not read here; rewrite it once: "
            "torch.save(torch.load(old, weights_only=True), new)"
        )
    return ValueError(f"{path} is not a checkpoint: neither a file of torch.save nor named .safetensors")
