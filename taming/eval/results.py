"""Results of evaluations: numbers with the protocol that made them, as JSON; tables; comparisons."""

import dataclasses
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import taming
from taming.util import atomic_write, read_text

FILE_NAME = "evaluations.jsonl"  # in a run directory: one result a line
MAX_BYTES = 64 << 20  # of such a file
VERSION = 1  # of the protocols: raised when the same settings would give other numbers

# Metrics of which less is better; more is better for all others.
LOWER = re.compile(r"[gr]?(s?FID|FD-)|KID|SWD|(ST-)?LPIPS|L1|nats per code|bits per dim")


@dataclass
class Result:
    """The outcome of one evaluation.

    Attributes:
        protocol: its name and all settings on which the numbers depend, besides the model: results compare
            only where it is equal.
        metrics: the numbers.
        errors: standard errors of some of them, over images.
        subject: what was evaluated: checkpoint, its hash, the model.
        sampling: how images were sampled, which may differ between results that are compared.
        more: versions, device, seconds, date, counts: the numbers do not depend on it.
    """

    protocol: dict[str, Any]
    metrics: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    subject: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return one line of JSON; numbers that are not finite become null."""
        return json.dumps(_finite(dataclasses.asdict(self)), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Result":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        content = json.loads(line)
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(content, dict) or not {"protocol", "metrics"} <= set(content) <= names or not all(
            isinstance(value, dict) for value in content.values()
        ):
            raise ValueError("not the result of an evaluation")
        content["metrics"] = {k: math.nan if v is None else v for k, v in content["metrics"].items()}
        return cls(**content)

    @property
    def label(self) -> str:
        """How images were sampled, in a few words: what differs from the defaults."""
        return ", ".join(f"{key} {value}" for key, value in self.sampling.items())


def environment(started: float, device: torch.device) -> dict[str, Any]:
    """Return what a result tells of its making, `started` being `time.time()` then."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "taming": taming.__version__, "torch": torch.__version__, "device": f"{device.type} ({name})",
        "seconds": round(time.time() - started, 1), "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def append_result(result: Result, folder: Path) -> Path:
    """Add a result to the file of a folder; return the file.

    Raises:
        ValueError: the file holds something else.
    """
    file = folder / FILE_NAME
    lines = [each.to_json() for each in read_results(file)] if file.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        partial.write_text("".join(f"{line}\n" for line in [*lines, result.to_json()]), encoding="utf-8")
    return file


def read_results(file: Path) -> list[Result]:
    """Read the results in a file, or in that of a folder, in their order.

    Raises:
        OSError: there is no such file.
        ValueError: a line is not a result; it is named.
    """
    file = file / FILE_NAME if file.is_dir() else file
    results = []
    for number, line in enumerate(read_text(file, "results", max_bytes=MAX_BYTES).splitlines(), 1):
        if line.strip():
            try:
                results.append(Result.from_json(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{os.fspath(file)}, line {number}: {error}") from error
    return results


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield each field in which two protocols differ, with both values."""
    for key in dict.fromkeys((*a, *b)):
        left, right, name = a.get(key), b.get(key), f"{path}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from differences(left, right, f"{name}.")
        elif left != right:
            yield f"{name}: {_short(left)} and {_short(right)}"


def check_comparable(results: Mapping[str, Result]) -> None:
    """Raise ValueError, with each field that differs, unless all results have one protocol."""
    (first_name, first), *rest = results.items()
    for name, result in rest:
        if found := list(differences(first.protocol, result.protocol)):
            raise ValueError(
                f"{first_name} and {name} were not evaluated by the same protocol, so that their numbers do "
                f"not compare; {'; '.join(found)}"
            )


def latest(results: Sequence[Result]) -> list[Result]:
    """Return the last result of each protocol's name and way of sampling."""
    return list({(result.protocol.get("name"), result.label): result for result in results}.values())


def table(rows: Mapping[str, Result]) -> str:
    """Return a table of text: a row for each result, a column for each metric, the best ones marked."""
    columns = list(dict.fromkeys(name for result in rows.values() for name in result.metrics))
    best = {}
    for name in columns if len(rows) > 1 else []:
        values = [v for result in rows.values() if math.isfinite(v := result.metrics.get(name, math.nan))]
        if values:
            best[name] = min(values) if is_lower_better(name) else max(values)
    cells = [["", *columns]]
    for row, result in rows.items():
        cells.append([row, *(_cell(result, name, best.get(name)) for name in columns)])
    if len(cells) == 2:  # of one result: a line for each metric
        cells = list(map(list, zip(*cells, strict=True)))[1:]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def is_lower_better(metric: str) -> bool:
    """Tell whether a smaller value of a metric is better."""
    return LOWER.match(metric) is not None


def _cell(result: Result, name: str, best: float | None) -> str:
    if name not in result.metrics:
        return "-"
    value = result.metrics[name]
    text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    text += f" +- {result.errors[name]:.2g}" if name in result.errors else ""
    return f"{text} *" if best is not None and value == best else text


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text[:16] if len(text) == 64 and " " not in text else text[:80]  # a hash


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
