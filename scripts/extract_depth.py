#!/usr/bin/env python
"""Make depth maps of a folder of images: `taming extract-depth` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("extract-depth", __name__)
