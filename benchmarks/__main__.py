"""Measure how fast taming is, beside the way of 2021 and beside what the machine can do.

    python -m benchmarks                      all parts, in some hours on two cores
    python -m benchmarks stage1 decode        two parts
    python -m benchmarks --quick              small sizes, to see that it runs: minutes
    python -m benchmarks --list               the parts

`make bench ARGS="..."` and `taming bench ...` are the same command. README.md in this folder says what each
number means.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import busy, code_cache, data, features, loading, sampling, search, training
from benchmarks.parts import Part, add_arguments, floors, run_parts

PARTS: dict[str, Part] = {
    "floors": floors, **training.PARTS, **search.PARTS, **sampling.PARTS, **data.PARTS, **loading.PARTS,
    **features.PARTS, **code_cache.PARTS, **busy.PARTS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=as_is)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--list", action="store_true", help="list the parts, and stop")
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, help="JPEGs for `data`; default: painted landscapes")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="of `data`")
    options = parser.parse_args(words)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:14}  {(part.__doc__ or '').splitlines()[0]}")
        return 0
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    logging.disable(logging.INFO)
    run_parts(PARTS, options, words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
