#!/usr/bin/env python
"""Encode and decode images, and measure what is lost: `taming reconstruct` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("reconstruct", __name__)
