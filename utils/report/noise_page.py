"""The page of suspicious pairs: one HTML file that needs no server and no network."""

import base64
import io
import math
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

TEMPLATE = Path(__file__).with_suffix(".html")
BINS = 60
WIDTH, HEIGHT, BOTTOM = 1100, 230, 26  # of the histogram; BOTTOM: room for the axis


class Suspect(NamedTuple):
    """A pair as the page shows it. Images are uint8 (3, S, S), RGB; `wrong` is None if unknown."""

    rank: int
    pair: int
    score: float
    posterior: float
    file: str
    image: np.ndarray
    caption: str
    best_caption: str  # what the model would rather pair the image with
    best_image: np.ndarray  # what it would rather pair the caption with
    best_file: str
    wrong: bool | None


def noise_page(suspects, score_name, about, findings, losses, mixture, wrong):
    """The page as text.

    suspects: `Suspect`s, worst first. about: line on data and model; findings: lines of text.
    losses: (n,) of all pairs; mixture: (weight, mean, variance) of the clean and of the noisy
    component; wrong: (n,) bool or None. All text is escaped.
    """
    low, high = bounds([suspect.score for suspect in suspects])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        about=escape(about), num_pairs=len(losses), score_name=escape(score_name),
        histogram=histogram(losses, mixture, wrong),
        findings="\n".join(f"<p>{escape(line)}</p>" for line in findings),
        low=low, high=high, cards="\n".join(map(card, suspects)))


def bounds(scores):
    """Lowest and highest score as text, rounded outwards to about a thousandth of their distance:
    a slider rounds longer numbers, and would then hide what lies at its ends."""
    low, high = float(min(scores)), float(max(scores))
    decimals = max(0, 3 - math.floor(math.log10(high - low or 1)))
    unit = 10**-decimals
    return (f"{math.floor(low / unit) * unit:.{decimals}f}",
            f"{math.ceil(high / unit) * unit:.{decimals}f}")


def card(suspect):
    """One pair as an <article>."""
    s, mark = suspect, ""
    if s.wrong is not None:
        mark = ('<span class="mark">wrong</span>' if s.wrong
                else '<span class="mark clean">right</span>')
    return f"""<article data-score="{s.score!r}">
<header><b>{s.rank}</b><span>score {s.score:.4g}</span><span>posterior {s.posterior:.3f}</span>
<span class="soft">pair {s.pair}</span>{mark}</header>
<div class="sides">
<div class="side">{picture(s.image)}<div class="words">
<q dir="auto">{escape(s.caption)}</q><br><small class="file">{escape(s.file)}</small></div></div>
<div class="rather">
<div class="words"><h2>best caption for this image</h2>
<q dir="auto">{escape(s.best_caption)}</q></div>
<div>{picture(s.best_image)}<div class="words"><h2>best image for this caption</h2>
<small class="file">{escape(s.best_file)}</small></div></div>
</div></div></article>"""


def picture(pixels):
    """uint8 (3, S, S) as an <img> that holds its own data."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def histogram(losses, mixture, wrong=None):
    """Losses (n,) as an <svg> histogram with the components of the mixture, scaled to the bars.

    With `wrong` (n,) bool the bars are split into right pairs and, on top, wrong ones.
    """
    edges = np.histogram_bin_edges(losses, BINS)
    parts = {"": np.ones(len(losses), bool)} if wrong is None else {"clean": ~wrong, "noisy": wrong}
    counts = {name: np.histogram(losses[part], edges)[0] for name, part in parts.items()}
    top = 1.12 * sum(counts.values()).max()

    def x(loss):
        return (loss - edges[0]) / (edges[-1] - edges[0]) * WIDTH

    def y(count):
        return (HEIGHT - BOTTOM) * (1 - np.minimum(count / top, 1))

    shapes, base = [], np.zeros(BINS)
    for name, count in counts.items():
        path = "".join(f"M{x(left):.1f} {y(b):.1f}H{x(right) - 1:.1f}V{y(b + c):.1f}H{x(left):.1f}z"
                       for left, right, b, c in zip(edges, edges[1:], base, count, strict=False))
        shapes.append(f'<path class="bars {name}" d="{path}"/>')
        base = base + count
    grid = np.linspace(edges[0], edges[-1], 400)
    for name, (weight, mean, variance) in zip(("clean", "noisy"), mixture, strict=True):
        density = np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        curve = weight * density * len(losses) * (edges[1] - edges[0])
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(grid), y(curve), strict=True))
        shapes.append(f'<polyline class="curve {name}" points="{points}"/>')
    shapes.append(f'<path class="axis" d="M0 {HEIGHT - BOTTOM}H{WIDTH}"/>')
    for loss in MaxNLocator(9).tick_values(edges[0], edges[-1]):
        if 15 < x(loss) < WIDTH - 15:  # room for half the number
            shapes.append(f'<text x="{x(loss):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                          f'text-anchor="middle">{loss:.4g}</text>')
    legend = ["component of low loss", "component of high loss"]
    legend += [] if wrong is None else ["bars: right pairs, wrong pairs on top"]
    colours = ("var(--clean)", "var(--noisy)", "var(--soft)")
    for k, (text, colour) in enumerate(zip(legend, colours, strict=False)):
        shapes.append(f'<text x="{WIDTH - 8}" y="{16 + 17 * k}" text-anchor="end" '
                      f'style="fill: {colour}">{text}</text>')
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="histogram of the losses">'
            f'{"".join(shapes)}</svg>')
