"""How well weights or losses separate wrong pairs from right ones: measures and figures."""

import textwrap

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

LOWEST = 10  # pairs in the figure


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
    writer.add_figure("w/lowest", pairs_figure(pairs, lowest, weights[lowest]), step)


def pairs_figure(pairs, chosen, w):
    """Images of chosen pairs (k,) with their weights w (k,) and captions, red where the caption is
    known to be wrong."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, -(-LOWEST // 2))
    for axis in axes.flat:
        axis.axis("off")
    for axis, i, weight in zip(axes.flat, chosen, w, strict=False):
        axis.imshow(pairs.images[pairs.image_of[i]].permute(1, 2, 0).cpu().numpy())
        wrong = pairs.wrong is not None and pairs.wrong[i]
        lines = textwrap.wrap(f"w {weight:.3f}: {pairs.captions[i]}", 40, max_lines=3)
        axis.set_title("\n".join(lines), fontsize=7, parse_math=False,
                       color="firebrick" if wrong else "black")
    return figure
