"""Compare two results of the benchmarks, row by row.

    python -m benchmarks.compare A.json B.json                  B against A
    python -m benchmarks.compare A.json B.json --threshold 1.2

A row has become slower if B takes more than `--threshold` times as long as A, and even B's fastest run takes
longer than A's slowest; or if its memory has grown by that factor. The exit status is then 1. Results of
different machines, or of other numbers of threads, are compared only with `--any-machine`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SAME = ("gpu", "processor", "cores", "torch_threads", "cpu_capability")  # of the machine
LEAST = 0.05  # GB: memory below it is not compared, since the allocator's share in it is large


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each row of both files; return 1 if one has become worse, 2 if nothing can be said."""
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__,
                                     formatter_class=as_is)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="factor of time or memory; default: 1.1")
    parser.add_argument("--any-machine", action="store_true", help="compare results of different machines")
    options = parser.parse_args(argv)
    try:
        before, after = (read(path) for path in (options.before, options.after))
        if not options.any_machine:
            check_machines(before["machine"], after["machine"])
        lines, worse = comparison(rows(before), rows(after), options.threshold)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    print(f"\n{worse} of {len(lines)} rows are worse by more than a factor of {options.threshold}")
    return 1 if worse else 0


def read(path: Path) -> Row:
    """Read a file of results."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"machine", "parts"} <= results.keys():
            raise ValueError
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of results of python -m benchmarks") from error
    return results


def check_machines(before: Row, after: Row) -> None:
    """Raise ValueError unless both were measured on machines of one kind, with as many threads."""
    differing = [key for key in SAME if before.get(key) != after.get(key)]
    if differing:
        said = "; ".join(f"{key}: {before.get(key)} and {after.get(key)}" for key in differing)
        raise ValueError(f"the results are of different machines ({said}): add --any-machine to compare them")


def rows(results: Row) -> dict[tuple[str, str], Row]:
    """Return the rows by part and name."""
    return {(part, row["what"]): row for part, found in results["parts"].items() for row in found}


def comparison(
    before: dict[tuple[str, str], Row], after: dict[tuple[str, str], Row], threshold: float
) -> tuple[list[str], int]:
    """Phrase the rows that both have, and count those that are worse.

    Raises:
        ValueError: they have no row in common.
    """
    both = [key for key in before if key in after]
    if not both:
        raise ValueError("the two files have no row in common: run the same parts with the same sizes")
    width = max(len(f"{part}: {what}") for part, what in both)
    lines, worse = [], 0
    for part, what in both:
        old, new = before[part, what], after[part, what]
        marks = list(regressions(old, new, threshold))
        worse += bool(marks)
        ratio = new["median_s"] / old["median_s"]
        lines.append(
            f"{f'{part}: {what}':{width}} {old['median_s']:10.4f} s {new['median_s']:10.4f} s  x {ratio:.3f}"
            + "".join(f"  {mark}" for mark in marks)
        )
    return lines, worse


def regressions(old: Row, new: Row, threshold: float) -> Iterator[str]:
    """Yield what has become worse in a row."""
    slower = new["median_s"] > threshold * old["median_s"]
    if slower and (min(new["all_s"]) > max(old["all_s"]) or len(new["all_s"]) == 1):
        yield "SLOWER"
    peaks = old.get("peak_gb", 0.0), new.get("peak_gb", 0.0)
    if peaks[1] > max(LEAST, threshold * peaks[0]) and peaks[0] > 0:
        yield f"MEMORY {peaks[0]:.2f} -> {peaks[1]:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
