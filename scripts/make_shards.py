#!/usr/bin/env python
"""Pack a folder of images into tar shards: `taming shards` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("shards", __name__)
