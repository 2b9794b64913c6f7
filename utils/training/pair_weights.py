"""weights.npz: the weight w that NPC gave each pair in each epoch of a run."""

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write, parsing


def write_weights(path, w, pairs):
    """Write w (epochs, pairs) float32, NaN where a pair was not drawn, and the hash of `pairs`."""
    from utils.method.pairs import fingerprint  # with torch, which table.py does without

    with atomic_write(path, "wb") as f:
        np.savez_compressed(f, w=w, pairs=fingerprint(pairs))


def read_weights(path, pairs=None):
    """w (epochs, pairs) float64, NaN where a pair was not drawn. Raises InputError when the file is
    absent or broken, holds no weight at all or an infinite one, or belongs to other pairs than
    `pairs`."""
    advice = "main_NPC.py writes a weights.npz to the folder of its run"
    with parsing(path, "a file of weights", advice), np.load(path, allow_pickle=False) as data:
        w = data["w"].astype(np.float64)
        belongs_to = str(data["pairs"]) if "pairs" in data else None
    if w.ndim != 2 or np.isnan(w).all():
        raise InputError(f"{path} holds no weight of any pair; {advice}")
    if np.isinf(w).any():
        raise InputError(f"{path} holds infinite weights, which NPC never gives; {advice}")
    if pairs is not None:
        from utils.method.pairs import fingerprint

        if w.shape[1] != len(pairs):
            raise InputError(f"{path} holds weights of {w.shape[1]} pairs, but {pairs.source} has "
                             f"{len(pairs)}; they belong to another data set")
        if belongs_to not in (None, fingerprint(pairs)):
            raise InputError(f"{path} holds weights of other captions than {pairs.source}; give "
                             "the --dataset_root and --noise_ratio of that run")
    return w


def mean_weights(w):
    """Mean (n,) over the epochs of w (epochs, n), NaN where a pair was never drawn."""
    drawn = ~np.isnan(w)
    total, count = np.where(drawn, w, 0).sum(axis=0), drawn.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
