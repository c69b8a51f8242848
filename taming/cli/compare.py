"""Put evaluations of several runs side by side.

    taming compare logs/A logs/B

Reads evaluations.jsonl of each run (`taming evaluate` writes it) and prints a table for each protocol: a row
for each run and way of sampling, the best of each column marked with a star. Of several evaluations alike,
the last one counts. Numbers of different protocols do not compare: the command then names each field that
differs.
"""

import argparse
from pathlib import Path

from taming.cli.options import one_of, path
from taming.eval.results import Result, check_comparable, latest, read_results, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("runs", nargs="+", type=path, metavar="RUN", help="run directories, or files of evaluations")
    add(
        "--protocol",
        **one_of("reconstruction", "generation", "likelihood", "images"),
        help="compare this one only; default: all that every run was evaluated by",
    )


def run(options: argparse.Namespace) -> None:
    """Read, check, print."""
    found = {place: latest(read_results(place)) for place in dict.fromkeys(options.runs)}
    names = [{str(each.protocol.get("name")) for each in results} for results in found.values()]
    common = set.intersection(*names)
    protocols = [options.protocol] if options.protocol else sorted(common)
    if not set(protocols) & common:
        each = "; ".join(
            f"{place}: {', '.join(sorted(has)) or 'none'}" for place, has in zip(found, names, strict=True)
        )
        raise ValueError(f"the runs were not evaluated by a common protocol: {each}")
    for name in protocols:
        rows: dict[str, Result] = {}
        for place, results in found.items():
            for result in results:
                if result.protocol.get("name") == name:
                    rows[f"{label(place, found)} {result.label}".strip()] = result
        check_comparable(rows)
        print(f"\n{name}\n{table(rows)}")


def label(place: Path, all_places: dict) -> str:
    """Return the name of a run; its path where two have the same name."""
    names = [each.name for each in all_places]
    return place.name if names.count(place.name) == 1 else str(place)
