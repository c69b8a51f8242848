#!/usr/bin/env python
"""Show images and conditions of a data set on one sheet: `taming preview` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("preview", __name__)
