"""The runs that the page offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taming.checkpoint import WEIGHTS_NAME, find_checkpoint
from taming.config import get_obj_from_str, load_config
from taming.models.cond_transformer import Net2NetTransformer

DEPTH = 3  # folders below the one that is searched


@dataclass(frozen=True)
class Run:
    """A run directory, an exported folder or a checkpoint file; `problem` says why it cannot be used."""

    name: str
    path: Path
    problem: str = ""


def find_runs(places: Sequence[str | Path]) -> list[Run]:
    """List the runs at some places, the newest first; those of a first stage only if they are named directly.

    A place is a run, or a folder of runs.

    Raises:
        FileNotFoundError: a place does not exist, or there is no run at all.
    """
    found: dict[Path, Run] = {}
    for place in (Path(place).expanduser() for place in places):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist: give a run, a checkpoint, or a folder of runs")
        if place.is_file() or _is_run(place):
            found.setdefault(place.resolve(), _described(place, place.resolve().name))
            continue
        for path in sorted(_below(place, DEPTH), key=_age, reverse=True):
            if path.resolve() not in found and not _is_first_stage(path):
                found[path.resolve()] = _described(path, str(path.relative_to(place)))
    if not found:
        where = ", ".join(map(str, places))
        raise FileNotFoundError(
            f"there is no run of a transformer in {where}: train one (make demo), or name one with -r"
        )
    return _with_own_names(list(found.values()))


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("checkpoints", "configs", WEIGHTS_NAME))


def _below(folder: Path, depth: int) -> list[Path]:
    """Return the runs in a folder; these are not searched themselves."""
    runs = []
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            if _is_run(path):
                runs.append(path)
            elif depth > 1:
                runs += _below(path, depth - 1)
    return runs


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, path.name


def _described(path: Path, name: str) -> Run:
    try:
        find_checkpoint(path)
    except FileNotFoundError:
        return Run(name, path, f"{path} has no checkpoint yet: train it further, or choose another run")
    return Run(name, path)


def _is_first_stage(path: Path) -> bool:
    """Tell whether the YAML files of a run, if it has any, name a model that is not a transformer."""
    files = sorted(path.glob("configs/*.yaml")) or sorted(path.glob("config.yaml"))
    try:
        model = get_obj_from_str(load_config(files).model.target) if files else None
    except Exception:  # a broken config, or a package that is not allowed: loading it will say so
        return False
    return isinstance(model, type) and not issubclass(model, Net2NetTransformer)


def _with_own_names(runs: list[Run]) -> list[Run]:
    """Name runs of the same name, from several places, by their whole paths."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else Run(str(run.path), run.path, run.problem) for run in runs]
