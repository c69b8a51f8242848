"""Find a checkpoint, and read it as data: nothing in it is executed.

Files of torch.save and safetensors, in one piece or in several with an index, and files of flax. Names and
shapes are read first; tensors are read when they are asked for.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from taming.checkpoint.files import MAX_HEADER, FormatError, TensorFile
from taming.checkpoint.pickles import (
    Finisher,
    ForbiddenNameError,
    Placeholder,
    StoredBytes,
    StoredTensor,
    module_tensors,
)
from taming.checkpoint.save import LARGE, WEIGHTS_NAME, absolute_paths, run_of
from taming.checkpoint.state_dict import some_of
from taming.config import one_line
from taming.util import read_bytes

# Names under which projects publish weights, in the order in which they are looked for in a folder.
PUBLISHED_NAMES = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt",
    "flax_model.msgpack",
)
INDEX = ".index.json"  # ends the name of the list of a checkpoint's pieces
SUBFOLDERS = ("vqvae", "movq", "vae")  # of a pipeline, where its tokenizer is
# Entries that hold a state dict in files of other projects; the first that is there is taken.
CONTAINERS = ("ema", "model", "model_state_dict", "avg_gen_state_dict", "gen_state_dict")
MAX_PIECES = 1000


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint file that a path stands for: a file, a run directory, or a folder with weights.

    Of a run directory it is `checkpoints/last.ckpt`, else the newest `checkpoints/*.ckpt`; of an exported
    folder `model.safetensors`. Folders of other projects have one of PUBLISHED_NAMES, or an index of several
    files, themselves or in one of SUBFOLDERS.

    Raises:
        FileNotFoundError: there is none; the message lists what was looked for.
        ValueError: it is a pipe or a device.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    if not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device, not a file")
    by_age = sorted(path.glob("checkpoints/*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name))
    names = [each for name in (WEIGHTS_NAME, *PUBLISHED_NAMES) for each in (name, name + INDEX)]
    candidates = [path / "checkpoints" / "last.ckpt", *reversed(by_age)]
    candidates += [folder / name for folder in (path, *map(path.joinpath, SUBFOLDERS)) for name in names]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no checkpoint in {path}: looked for checkpoints/last.ckpt and checkpoints/*.ckpt (a run "
        f"directory), for {WEIGHTS_NAME} (an exported folder), and for {', '.join(PUBLISHED_NAMES)}, also in "
        f"the folders {', '.join(SUBFOLDERS)}; give such a folder, or a checkpoint file itself"
    )


def read_checkpoint(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    *,
    mmap: bool = False,
    tensors: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint file into a dict with at least the key `state_dict`; nothing in it is executed.

    Takes Lightning checkpoints of today and of 2020-21, bare state dicts, state dicts in one of CONTAINERS,
    safetensors, the index of a checkpoint in several files, files of flax, and the pickled networks of
    DALL-E. Tensors get memory of their own, and are compared with the file's checksums.

    Args:
        path: the file.
        map_location: device for the tensors.
        mmap: leave tensors in the file until they are used, without comparing checksums. Writing to the file
            while they are in use ends the process; replacing it by another one does not.
        tensors: the entries whose tensors are wanted, `("state_dict",)` for instance; those of others are on
            the meta device, shapes without data. None stands for all.

    Raises:
        ValueError: the file is empty, damaged, not a checkpoint, or asks for code; the message says which.
    """
    with CheckpointFile(path, mmap=mmap) as file:
        return file.read(map_location, tensors)


class CheckpointFile:
    """An open checkpoint, for a `with` statement: its structure is known, its tensors are still in the file.

    Args:
        path, mmap: see `read_checkpoint`.
    """

    def __init__(self, path: str | Path, *, mmap: bool = False):
        self.path, self.mmap = Path(path).expanduser(), mmap
        self._open = ExitStack()
        self._about: dict[str, str] = {}
        self._files: dict[StoredBytes, TensorFile] = {}  # of a checkpoint in pieces: where each tensor is

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.path.name.endswith(INDEX):
                with _explained(self.path):
                    self._content = self._pieces(stack)
            else:
                self._file = stack.enter_context(TensorFile(self.path, self.mmap))
                if self._file.size == 0:
                    raise ValueError(
                        f"{self.path} is empty (0 bytes): it was not written completely; get it again"
                    )
                with _explained(self.path):
                    content, self._about = self._file.structure()
                    self._content = _as_checkpoint(content)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(
        self, map_location: str | torch.device = "cpu", tensors: Collection[str] | None = None,
        prefix: str = "",
    ) -> dict[str, Any]:
        """Return the entries of the checkpoint; see `read_checkpoint`.

        Of the state dict only tensors are read whose names begin with `prefix`; the others are left out.
        """

        def data(stored: StoredTensor) -> Tensor:
            return self._files.get(stored.data, self._file).tensor(stored).to(map_location)

        def shape_only(stored: StoredTensor) -> Tensor:
            return torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype, device="meta")

        content = dict(self._content)
        if prefix:
            named = content["state_dict"].items()
            content["state_dict"] = {k: v for k, v in named if isinstance(k, str) and k.startswith(prefix)}
        with _explained(self.path):
            finishers = {wanted: Finisher(data if wanted else shape_only) for wanted in (True, False)}
            found = {
                key: finishers[tensors is None or key in tensors].finish(value)[0]
                for key, value in content.items() if isinstance(key, str)
            }
        _check_entries(found["state_dict"], self.path)
        step = str(self._about.get("step"))
        if step.isdecimal() and len(step) < 16:
            found["batches_seen"] = int(step)
        run = run_of(self.path)
        return {key: value if key in LARGE else absolute_paths(value, run) for key, value in found.items()}

    def _pieces(self, stack: ExitStack) -> dict[Any, Any]:
        """Open the files that an index names, all in its own folder, and put their tensors together."""
        index = json.loads(read_bytes(str(self.path), "index of a checkpoint", max_bytes=MAX_HEADER))
        places: dict[str, str] = index["weight_map"]
        names = sorted(set(places.values()))
        if not names or len(names) > MAX_PIECES or any(Path(name).name != name for name in names):
            raise FormatError(f"it must name 1 to {MAX_PIECES} files, which lie beside it")
        state: dict[str, Any] = {}
        for name in names:
            if not (self.path.parent / name).is_file():
                raise FormatError(f"a piece of it is missing, {name}: get all {len(names)} files")
            file = stack.enter_context(TensorFile(self.path.parent / name, self.mmap))
            piece = _as_checkpoint(file.structure()[0])["state_dict"]
            self._files |= {value.data: file for value in piece.values() if isinstance(value, StoredTensor)}
            self._file = file
            state |= piece
        if missing := [name for name in places if name not in state]:
            raise FormatError(f"its files do not hold {some_of(missing)}")
        return {"state_dict": state}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever damaged or hostile bytes cause into a ValueError that names the file."""
    try:
        yield
    except ForbiddenNameError as error:
        names = ", ".join(error.names[:5]) + (", ..." if len(error.names) > 5 else "")
        raise ValueError(
            f"{path} asks for {names}, which weights do not need and which could run code here, so nothing "
            "was loaded. Get the weights as .safetensors, or as a file that holds tensors, numbers and "
            "strings only"
        ) from error
    except FormatError as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged or hostile bytes can be the cause of any
        raise ValueError(
            f"{path} is truncated, damaged or not a checkpoint ({one_line(error)}); get it again and "
            "compare its size"
        ) from error


def _as_checkpoint(content: Any) -> dict[Any, Any]:
    """Return what a file holds if it is a checkpoint; other forms of a state dict as one."""
    if (tensors := module_tensors(content)) is not None:
        return {"state_dict": tensors}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        return content
    if _is_state(content):
        return {"state_dict": content}
    if isinstance(content, dict):
        for key in CONTAINERS:
            if _is_state(content.get(key)):
                others = {name: value for name, value in content.items() if name != key}
                return {**others, "state_dict": content[key]}
    kind = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
    found = f"keys: {some_of(content)}" if isinstance(content, dict) else f"a {kind}"
    raise FormatError(f"there is no state_dict in it (it holds {found})")


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and {*map(type, value.values())} == {StoredTensor}


def _check_entries(state: Mapping[Any, Any], path: Path) -> None:
    """Raise unless keys are names, and tensors are ordinary ones, which a module can take over."""
    for key, value in state.items():
        unusual = isinstance(value, Placeholder)
        if not isinstance(key, str) or unusual:
            kind = "a tensor without data, or a sparse one" if unusual else "not the name of a weight"
            raise ValueError(f"{path} is not a checkpoint of weights: {key!r} in its state_dict is {kind}")
