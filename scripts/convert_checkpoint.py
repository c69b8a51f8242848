#!/usr/bin/env python
"""Convert a checkpoint to safetensors and YAML, or back: `taming convert` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("convert", __name__)
