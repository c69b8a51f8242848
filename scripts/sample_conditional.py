#!/usr/bin/env python
"""Draw pictures on a web page: python scripts/sample_conditional.py -r logs/RUN

Opens a page on this machine (http://127.0.0.1:7860) to choose a run, upload or paint its condition, complete
a picture, and watch it being drawn; see docs/webpage.md. As in 2021, items of the run's data set can be
chosen as conditions: other YAML files (-b) and data.sub=value words are merged over the run's own, and
--ignore_base_data leaves its data out. Needs gradio: pip install 'taming[demo]'.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from taming.cli.options import Parser, add_allow, add_data_source
from taming.cli.outputs import check_folder
from taming.config import allow_targets
from taming.inference.dataset import build_dataset, data_section
from taming.inference.decoding import PRECISIONS
from taming.util import exit_status
from taming.web.page import launch, require_gradio
from taming.web.session import Session


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-r", "--resume", action="append", metavar="RUN", help="run directory, checkpoint or exported folder "
        "of a transformer, or a folder of such runs; may be repeated; default: logs")
    add_data_source(parser)
    add("-o", "--outdir", type=Path, help="folder that keeps the pictures; default: a temporary one")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in, without a "
        "password; default: 127.0.0.1")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--max-upload", type=float, default=20.0, metavar="MB", help="size of an uploaded file; default: 20")
    add("--max-pixels", type=int, default=4_000_000, help="of all pictures drawn at once; default: 4000000")
    add("--precision", choices=list(PRECISIONS), default="32", help="of the transformer's weights; bf16 "
        "takes half the memory and time; default: 32")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add_allow(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Find the runs, and serve the page until Ctrl-C."""
    if options.max_upload <= 0 or options.max_pixels < 1:
        raise ValueError("--max-upload and --max-pixels must be above 0")
    if options.outdir is not None:
        check_folder(options.outdir)
    allow_targets(*options.allow)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends, and cleans up, as after Ctrl-C
    options.seed = 0  # of the data set's own random numbers

    def data_of(config: DictConfig):
        return build_dataset(data_section(config, options), options)

    with tempfile.TemporaryDirectory(prefix="taming-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")  # goes with the page
        require_gradio()
        session = Session(
            options.resume or ["logs"], options.outdir or Path(folder) / "drawn", device=options.device,
            data_of=data_of, max_pixels=options.max_pixels, precision=options.precision,
        )
        launch(session, host=options.host, port=options.port, max_upload=options.max_upload)


if __name__ == "__main__":
    sys.exit(main())
