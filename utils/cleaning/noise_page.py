"""The page of suspicious pairs: one HTML file that needs no server and no network."""

import base64
import hashlib
import io
import json
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm

from utils.cleaning.labels import COLUMNS

TEMPLATE = Path(__file__).with_suffix(".html")
BINS = 60
SOFT, CLEAN, NOISY, BARS = "#647083", "#1f8a70", "#d1495b", "#b9c2ce"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "", "axes.xmargin": 0, "legend.frameon": False,
         **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
         **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "legend.labelcolor"),
                         SOFT)}


class Suspect(NamedTuple):
    """A pair as the page shows it. Images are uint8 (3, S, S), RGB. worst, sample: its place, from
    1, in these two lists of the page, or None. row: its cells of decisions.csv, without the answer.
    """

    worst: int | None
    sample: int | None
    row: tuple
    answer: str
    score: float
    posterior: float
    file: str
    image: np.ndarray
    caption: str
    best_caption: str  # what the model would rather pair the image with
    best_image: np.ndarray  # what it would rather pair the caption with
    best_file: str


def noise_page(suspects, score_name, about, findings, verdict, key):
    """The page as text.

    suspects: `Suspect`s, worst first. about: line on data and model; findings: lines of text.
    verdict: the judge's `Verdict` on all pairs; key: name under which the browser keeps the
    answers. All text is escaped.
    """
    script = TEMPLATE.with_suffix(".js").read_text(encoding="utf-8")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        about=escaped(about), num_pairs=len(verdict.score), key=key, columns=" ".join(COLUMNS),
        score_name=f"{escape(score_name)} ({measured_in(verdict, score_name)})",
        histogram=histogram(verdict),
        findings="\n".join(f"<p>{escaped(line)}</p>" for line in findings),
        num_worst=sum(bool(s.worst) for s in suspects),
        num_sample=sum(bool(s.sample) for s in suspects),
        cards="\n".join(map(card, suspects)), script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


def escaped(text):
    """A text in HTML. A path in it may hold bytes that are no UTF-8; they are spelled out."""
    return escape(text.encode("utf-8", "backslashreplace").decode())


def measured_in(verdict, score_name="judge"):
    """Unit of a `--score`. The judge's score is a loss, or a sum of standard scores."""
    if score_name == "judge":
        score_name = "loss" if np.array_equal(verdict.score, verdict.loss) else "combined"
    return {"loss": "nats", "combined": "standard deviations", "cosine": "from -1 to 1",
            "npc": "mean w"}[score_name]


def card(s):
    """A `Suspect` as an <article>."""
    return f"""<article tabindex="0" data-score="{s.score!r}" data-worst="{s.worst or ''}"
 data-sample="{s.sample or ''}" data-row="{escape(json.dumps(s.row))}" data-answer="{s.answer}">
<header><b class="score">{s.worst or ''}</b><span class="score">score {s.score:.4g}</span>
<span class="score">posterior {s.posterior:.3f}</span>
<span class="soft">pair {s.row[0]}</span></header>
<div class="sides">
<div class="side">{picture(s.image)}<div class="words">
<q dir="auto">{escape(s.caption)}</q><br><small class="file">{escape(s.file)}</small></div></div>
<div class="rather">
<div class="words"><h2>best caption for this image</h2>
<q dir="auto">{escape(s.best_caption)}</q></div>
<div class="side">{picture(s.best_image)}<div class="words"><h2>best image for this caption</h2>
<small class="file">{escape(s.best_file)}</small></div></div>
</div></div>
<div class="answers"><button value="right">right</button><button value="wrong">wrong</button>
<button value="skip">skip</button></div></article>"""


def picture(pixels):
    """uint8 (3, S, S) as an <img> that holds its data."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


@matplotlib.rc_context(STYLE)
def histogram(verdict):
    """The scores of a `Verdict` as an <svg> histogram, with the components of the judge's mixture,
    or with its mismatches, drawn as high as the highest bar."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots()
    counts, edges, _ = axes.hist(verdict.score, BINS, color=BARS, rwidth=0.9)
    grid, highest = np.linspace(edges[0], edges[-1], 400), counts.max()
    for (weight, center, variance), colour, side in zip(
            verdict.components or (), (CLEAN, NOISY), ("low", "high"), strict=False):
        density = norm.pdf(grid, center, variance**0.5) * (edges[1] - edges[0])
        axes.plot(grid, weight * density * len(verdict.score), color=colour, lw=2,
                  label=f"component of {side} loss")
    if verdict.mismatches is not None:
        heights = np.histogram(verdict.mismatches, edges)[0]
        axes.stairs(heights * highest / max(1, heights.max()), edges, lw=2, color=NOISY,
                    label="mismatches made of these images and captions, at their own scale")
    unit = measured_in(verdict)
    of = "loss" if unit == "nats" else "loss less agreement with neighbours"
    axes.set(ylim=(0, 1.12 * highest), yticks=[], ylabel="pairs",
             xlabel=f"score of the judge: {of} ({unit})")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg"):]
