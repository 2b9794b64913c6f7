"""weights.npz: the weight w that NPC gave each pair in each epoch of a run."""

import io
from pathlib import Path

import numpy as np

from utils.errors import InputError


def read_weights(path):
    """w (epochs, pairs) float64, NaN where a pair was not drawn. Raises InputError when the file is
    absent or broken, or holds no weight at all."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as data:
            w = data["w"].astype(np.float64)
    except Exception as error:  # a damaged archive can raise anything
        reason = error.strerror if isinstance(error, OSError) else "broken, or of another program"
        raise InputError(f"cannot read the weights {path}: {reason}; main_NPC.py writes a "
                         "weights.npz to the folder of its run") from error
    if w.ndim != 2 or np.isnan(w).all():
        raise InputError(f"{path} holds no weight of any pair")
    return w
