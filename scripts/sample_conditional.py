#!/usr/bin/env python
"""Serve a web page to generate images on: `taming page` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("page", __name__)
