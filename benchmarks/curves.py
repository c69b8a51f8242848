#!/usr/bin/env python
"""Draw curves of a run's metrics.csv as a PNG, a panel for each word:

    python benchmarks/curves.py logs/RUN curves.png train/rec_loss,val/rec_loss log:train/d_weight

A word names one curve, or several with commas between; `log:` before it makes the scale logarithmic.
TensorBoard shows the same curves.
"""

import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN, COLUMNS = 300, 170, 48, 3  # pixels of a panel; panels in a row
COLORS = [(31, 90, 160), (214, 100, 20), (40, 140, 60), (150, 60, 150)]
FONT = ImageFont.load_default(11)

Curve = list[tuple[float, float]]  # (batch, value)


def main() -> None:
    """Read the curves and draw them."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    run, target, *words = sys.argv[1:]
    with open(Path(run) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    last = max(float(row["step"]) for row in rows) + 1
    columns = min(COLUMNS, len(words))
    image = Image.new("RGB", (columns * WIDTH, math.ceil(len(words) / columns) * HEIGHT), "white")
    for i, word in enumerate(words):
        logarithmic, names = word.startswith("log:"), word.removeprefix("log:").split(",")
        curves = {name: curve(rows, name) for name in names}
        image.paste(panel(curves, last, logarithmic), (i % columns * WIDTH, i // columns * HEIGHT))
    image.save(target, optimize=True)


def curve(rows: list[dict[str, str]], name: str) -> Curve:
    """Return the values of a curve by the number of batches."""
    found = [(float(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
    if not found:
        known = sorted({key for row in rows for key, value in row.items() if value})
        sys.exit(f"no curve {name}; there are: {', '.join(known)}")
    return found


def panel(curves: dict[str, Curve], last: float, logarithmic: bool) -> Image.Image:
    """Draw curves over the same axes, with their names in their colours."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    scale = (lambda y: math.log10(max(y, 1e-12))) if logarithmic else (lambda y: y)
    values = [scale(y) for points in curves.values() for _, y in points if math.isfinite(y)]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 1.0, high + 1.0)
    left, right, top, bottom = MARGIN + 8, WIDTH - 8, 22, HEIGHT - 20
    pen.rectangle((left, top, right, bottom), outline=(200, 200, 200))
    for place, value in ((top, high), (bottom, low)):
        text = f"{10**value if logarithmic else value:.3g}"
        pen.text((left - 3, place), text, "black", FONT, anchor="rt" if place == top else "rb")
    pen.text((right, bottom + 4), f"{last:,.0f} batches", "black", FONT, anchor="rt")
    x = left
    for (name, points), color in zip(curves.items(), COLORS, strict=False):
        pen.text((x, 6), name, color, FONT)
        x += round(pen.textlength(name, FONT)) + 10
        places = [
            (left + (right - left) * step / last, bottom - (bottom - top) * (scale(y) - low) / (high - low))
            for step, y in points if math.isfinite(y)
        ]
        for line in pairwise(places):
            pen.line(line, color, 1)
    return image


if __name__ == "__main__":
    main()
