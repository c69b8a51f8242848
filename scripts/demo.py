#!/usr/bin/env python
"""Train both stages on built-in landscapes and generate images: `taming demo` under its name of 2021."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("demo", __name__)
