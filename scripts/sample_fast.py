#!/usr/bin/env python
"""Generate images with a transformer: `taming sample` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("sample", __name__)
