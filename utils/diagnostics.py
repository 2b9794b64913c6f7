"""What TensorBoard shows of the weights after each epoch: do they tell clean pairs from noisy ones?"""

import textwrap

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

LOWEST = 10  # pairs in the figure


def noise_auc(w, wrong):
    """Area under the ROC curve of low weights w (n,) as a sign of wrong pairs (n,) bool: 1 if every
    wrong pair weighs less than every right one, 0.5 for chance, None if all are of one kind."""
    if wrong.all() or not wrong.any():
        return None
    return roc_auc_score(wrong, -w)


def show_weights(writer, epoch, weights, pairs):
    """Write histograms of an epoch's weights (n,), NaN where not drawn, split by truly clean and
    truly noisy where that is known, their AUC, and a figure of the pairs that weigh least."""
    drawn = np.flatnonzero(np.isfinite(weights))
    w = weights[drawn]
    writer.add_histogram("w/all", w, epoch)
    if pairs.wrong is not None:
        wrong = pairs.wrong[drawn]
        for name, kind in (("noisy", wrong), ("clean", ~wrong)):
            if kind.any():
                writer.add_histogram(f"w/truly_{name}", w[kind], epoch)
        auc = noise_auc(w, wrong)
        if auc is not None:
            writer.add_scalar("noise/auc_of_w", auc, epoch)
    lowest = drawn[np.argsort(w, kind="stable")[:LOWEST]]
    writer.add_figure("w/lowest", pairs_figure(pairs, lowest, weights[lowest]), epoch)


def pairs_figure(pairs, chosen, w):
    """Images of chosen pairs (k,) with their weights w (k,) and captions, red where the caption is
    known to be wrong."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, -(-LOWEST // 2))
    for axis in axes.flat:
        axis.axis("off")
    for axis, i, weight in zip(axes.flat, chosen, w, strict=False):
        axis.imshow(pairs.images[pairs.image_of[i]].permute(1, 2, 0).numpy())
        wrong = pairs.wrong is not None and pairs.wrong[i]
        lines = textwrap.wrap(f"w {weight:.3f}: {pairs.captions[i]}", 40, max_lines=3)
        axis.set_title("\n".join(lines), fontsize=7, parse_math=False,
                       color="firebrick" if wrong else "black")
    return figure
