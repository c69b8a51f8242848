#!/usr/bin/env python
"""Train a model: python main.py --base configs/custom_vqgan.yaml -t --gpus 0,1 (see README.md).

YAML files and notebooks of 2021 name classes as main.*, so the package's classes are importable from here.
"""

import sys

from taming.cli.environment import needs_packages

with needs_packages():
    from taming.config import get_obj_from_str, instantiate_from_config
    from taming.data.datamodule import DataModuleFromConfig, WrappedDataset
    from taming.training.arguments import build_parser as get_parser
    from taming.training.callbacks import ImageLogger, SetupCallback
    from taming.training.command import main

__all__ = [
    "DataModuleFromConfig", "ImageLogger", "SetupCallback", "WrappedDataset", "get_obj_from_str",
    "get_parser", "instantiate_from_config", "main",
]

if __name__ == "__main__":
    sys.exit(main())
