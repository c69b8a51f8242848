"""Serve a web page to paint conditions and generate images on.

    taming page                  the runs in logs/
    taming page -r logs/RUN      one run, a checkpoint file, an exported folder, or another folder of runs

Opens on this machine (http://127.0.0.1:7860): choose a run, upload or paint its condition, complete an image,
and watch it being generated; see docs/webpage.md. Items of the run's data set can be taken as conditions:
other configurations (-b) and data.sub=value words are merged over the run's own, and --ignore-base-data
leaves its data out. Needs gradio: pip install 'taming[demo]'.
"""

import argparse
import os
import signal
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from taming.cli.dataset_options import add_data_source, load_dataset
from taming.cli.options import (
    add_allow,
    add_device,
    add_outdir,
    check_folder,
    one_of,
    path,
)
from taming.data.sampler import SeededDataset
from taming.inference.loading import PRECISIONS
from taming.util import number
from taming.web.page import launch, require_gradio
from taming.web.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("-r", "--run", action="append", type=path, metavar="RUN", help="a transformer: run directory, "
        "checkpoint file or exported folder; or a folder of these; may be repeated; default: logs")
    add_data_source(parser)
    add_outdir(parser, "folder that keeps the images; default: a temporary one")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in, without a "
        "password")
    add("--port", type=number(int, 1, 65535), help="default: the first free one from 7860")
    add("--max-upload", type=float, default=20.0, metavar="MB", help="largest uploaded file, in megabytes")
    add("--max-pixels", type=int, default=4_000_000, help="of all images that are generated at once")
    add("--precision", default="32", help="of the transformer's weights; bf16 takes half the memory and time",
        **one_of(*PRECISIONS))
    add_device(parser)
    add_allow(parser)


def run(options: argparse.Namespace) -> None:
    """Find the runs, and serve the page until Ctrl-C."""
    if options.max_upload <= 0 or options.max_pixels < 1:
        raise ValueError("--max-upload and --max-pixels must be above 0")
    if options.outdir is not None:
        check_folder(options.outdir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends, and cleans up, as after Ctrl-C
    options.seed = 0  # of the data set's own random numbers

    def data_of(config: DictConfig) -> SeededDataset:
        return load_dataset(config, options)[0]

    with tempfile.TemporaryDirectory(prefix="taming-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")  # goes with the page
        require_gradio()
        session = Session(
            options.run or ["logs"], Path(folder) / "images", keep=options.outdir, device=options.device,
            data_of=data_of, max_pixels=options.max_pixels, precision=options.precision,
        )
        launch(session, host=options.host, port=options.port, max_upload=options.max_upload)
