"""How well weights or losses separate wrong pairs from right ones: measures and figures."""

import textwrap
import warnings

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

LOWEST = 10  # pairs in TensorBoard's figure
COLUMNS = 5
warnings.filterwarnings("ignore", "Glyph .* missing from font")  # such a letter is drawn as a box


def noise_measures(suspicion, wrong):
    """How well high values of suspicion (n,) mark the wrong pairs, (n,) bool: a dict of floats,
    None if all pairs are right or all are wrong.

    Keys: `auc`; `average_precision`; `mean_noise_rank`, the mean rank of the wrong pairs when pairs
    are sorted from most to least trusted (equal pairs share a rank); its `optimum`, when all wrong
    pairs come last; its value by `chance`.
    """
    n, num_wrong = len(wrong), int(wrong.sum())
    if not 0 < num_wrong < n:
        return None
    return {"auc": roc_auc_score(wrong, suspicion),
            "average_precision": average_precision_score(wrong, suspicion),
            "mean_noise_rank": rankdata(suspicion)[wrong].mean(),
            "optimum": n - (num_wrong - 1) / 2, "chance": (n + 1) / 2}


def show_weights(writer, step, weights, pairs):
    """Write histograms of an epoch's weights (n,), NaN where not drawn, and a figure of the pairs
    of lowest weight to TensorBoard at `step`. Where the clean captions are known, the histograms
    are split into clean and noisy pairs and the AUC is written too."""
    drawn = np.flatnonzero(np.isfinite(weights))
    w = weights[drawn]
    writer.add_histogram("w/all", w, step)
    if pairs.wrong is not None:
        wrong = pairs.wrong[drawn]
        for name, kind in (("noisy", wrong), ("clean", ~wrong)):
            if kind.any():
                writer.add_histogram(f"w/truly_{name}", w[kind], step)
        measures = noise_measures(-w, wrong)
        if measures:
            writer.add_scalar("noise/auc_of_w", measures["auc"], step)
    lowest = drawn[np.argsort(w, kind="stable")[:LOWEST]]
    words = [f"w {weights[i]:.3f}: {pairs.captions[i]}" for i in lowest]
    known_wrong = None if pairs.wrong is None else pairs.wrong[lowest]
    figure = pictures([pairs.images[pairs.image_of[i]] for i in lowest], words, known_wrong)
    writer.add_figure("w/lowest", figure, step)


def pictures(images, words, marked=None):
    """Figure of images, uint8 (3, H, W) tensors, in rows of `COLUMNS`. Each is below its words,
    which are red where `marked` (bool) is set."""
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(2.2 * COLUMNS, 2.6 * rows))
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.5 / (2.6 * rows), 0.05, 0.3)
    for k, (image, text) in enumerate(zip(images, words, strict=True)):
        axis = figure.add_subplot(rows, COLUMNS, k + 1)
        axis.axis("off")
        axis.imshow(image.permute(1, 2, 0).cpu().numpy())
        axis.set_title("\n".join(textwrap.wrap(text, 40, max_lines=3)), fontsize=7,
                       parse_math=False,
                       color="firebrick" if marked is not None and marked[k] else "black")
    return figure
