#!/usr/bin/env python
"""Take one part out of a model, by default its first stage: `taming convert` with a part."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.cli import script

main = script("convert", __name__, default_part="first_stage_model")
