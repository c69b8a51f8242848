"""Evaluate the rows of a table: several models or ways of sampling, under one protocol.

    taming table tables/class_conditional run=logs/2026-11-26T10-00-00_cin_transformer
    taming table tables/landscapes_class num_images=512

A table is a YAML file: `title`, `source`, `options` of `taming evaluate` that all rows share, and `rows`,
each with a name, options of its own and, where there are any, published numbers. `OPTION=value` words are set
on top of all rows. The table is printed as Markdown; the results are added to evaluations.jsonl of each run.
"""

import argparse
from typing import Any

from omegaconf import OmegaConf

from taming.cli import evaluate
from taming.cli.options import add_outdir
from taming.cli.parser import Parser, build_parser
from taming.config import find_config, load_config
from taming.eval.results import Result, append_result
from taming.inference.distributed import rank_and_world_size
from taming.training.run_dir import find_run
from taming.util import atomic_write

SECTIONS = {"title", "source", "options", "rows"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("table", help="YAML file, or a name that `taming configs` lists")
    add(
        "overrides",
        nargs="*",
        metavar="OPTION=value",
        help="options of `taming evaluate` for all rows; `run` is what to evaluate",
    )
    add_outdir(parser, "file to write the table to as well", metavar="FILE")


def run(options: argparse.Namespace) -> None:
    """Check all rows, evaluate one after the other, print the table."""
    table = read_table(options.table, options.overrides)
    rows = {name: row_options(name, row) for name, row in table["rows"].items()}
    found: list[tuple[str, dict[str, float], Result]] = []
    for name, (words, published) in rows.items():
        if rank_and_world_size()[0] == 0:
            print(f"\n## {name}", flush=True)
        found += [(name, published, result) for result in evaluate_row(words) if result is not None]
    if rank_and_world_size()[0] == 0:
        text = markdown(table, found)
        print(f"\n{text}")
        if options.outdir is not None:
            with atomic_write(options.outdir) as partial:
                partial.write_text(text, encoding="utf-8")


def read_table(name: str, overrides: list[str]) -> dict[str, Any]:
    """Read a table, with words set on top of each row.

    Raises:
        ValueError: it is not a table.
    """
    table: Any = OmegaConf.to_container(load_config([find_config(name)]), resolve=True)
    unknown = set(table) - SECTIONS
    if unknown or not isinstance(table.get("rows"), dict) or not table["rows"]:
        raise ValueError(f"{name} is not a table: it needs rows, and may have {', '.join(sorted(SECTIONS))}")
    wrong = [word for word in overrides if "=" not in word]
    if wrong:
        raise ValueError(f"{wrong[0]}: give OPTION=value, num_images=512 for instance")
    above = dict(word.split("=", 1) for word in overrides)
    table["rows"] = {
        key: (table.get("options") or {}) | (row or {}) | above for key, row in table["rows"].items()
    }
    return table


def row_options(name: str, row: dict[str, Any]) -> tuple[argparse.Namespace, dict[str, float]]:
    """Return the options of `taming evaluate` of a row, and its published numbers.

    Raises:
        ValueError: an option that does not exist; no run.
    """
    published, target = row.pop("published", {}), row.pop("run", None)
    if target is None:
        raise ValueError(f"the row {name} names no run: give run=logs/...")
    parser = build_parser(evaluate, "taming table")
    words = [str(find_run(str(target)))]
    for key, value in row.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += ["--" + key.replace("_", "-"), *map(str, values)]
    assert isinstance(parser, Parser)
    return parser.read(words), published


def evaluate_row(options: argparse.Namespace) -> list[Result | None]:
    """Evaluate, and add the results to the run's."""
    subject = evaluate.load_subject(options.target, device=options.device)
    results = evaluate.evaluate_run(subject, options)
    for result in results:
        if result is not None:
            append_result(result, options.outdir or subject.run)
    return results


def markdown(table: dict[str, Any], found: list[tuple[str, dict[str, float], Result]]) -> str:
    """Return the table: a line for each row and way of sampling, published numbers in brackets."""
    columns = list(dict.fromkeys(metric for _, _, result in found for metric in result.metrics))
    published = list(dict.fromkeys(name for _, numbers, _ in found for name in numbers))
    lines = [f"**{table['title']}**" + (f" ({table['source']})" if table.get("source") else ""), ""]
    heads = ["", *columns, *(f"{name}, published" for name in published)]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    guidances = {name: [r for n, _, r in found if n == name] for name, _, _ in found}
    for name, numbers, result in found:
        guidance = result.sampling.get("guidance", "1")
        label = f"{name}, guidance {guidance}" if len(guidances[name]) > 1 and result.sampling else name
        cells = [f"{result.metrics[c]:.4g}" if c in result.metrics else "-" for c in columns]
        lines.append(
            "| " + " | ".join([label, *cells, *(str(numbers.get(p, "-")) for p in published)]) + " |"
        )
    protocol = found[0][2].protocol if found else {}
    network = protocol.get("network") or {}
    counts = {
        str((r.protocol.get("images") or {}).get("count", r.protocol.get("count"))) for _, _, r in found
    }
    lines += ["", f"{', '.join(sorted(counts))} images; {network.get('name', 'no network')} "
              f"({str(network.get('sha256'))[:12]})."]
    return "\n".join(lines) + "\n"
