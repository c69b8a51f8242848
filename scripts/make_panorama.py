#!/usr/bin/env python
"""Generate one large image, or complete one: `taming panorama` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("panorama", __name__)
