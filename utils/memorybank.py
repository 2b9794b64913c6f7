"""The memory bank and its files.

Ours is annotations/frozen_memory_bank/{ratio}_mbank.npz: plain arrays, read without pickle. The
authors' are two pickled dictionaries, {ratio}_mbank_img_idx.npy and {ratio}_mbank_txt_idx.npy.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write
from utils.layout import BANK_FOLDERS, find_by_ratio, ratio_name

SUFFIX = "_mbank.npz"


@dataclass
class MemoryBank:
    """For each training image and caption, a clean pair that resembles it.

    image_entry: (distinct images,) int64, the pair M^I of each image. caption_entry: (pairs,)
    int64, the pair M^T of each caption. The rest is known only of banks that we built, per pair
    and of the initial model: clean (bool, the strict clean set), loss (float32), posterior
    (float32, probability of the mixture's low component), cosine (float32). `info` says how the
    bank was made, and holds `beta`, the mean cosine of random pairs.
    """

    image_entry: np.ndarray
    caption_entry: np.ndarray
    clean: np.ndarray | None = None
    loss: np.ndarray | None = None
    posterior: np.ndarray | None = None
    cosine: np.ndarray | None = None
    info: dict = field(default_factory=dict)


def fingerprint(pairs):
    """SHA-256 (hex) of the captions and of the images they stand beside: what a bank belongs to."""
    digest = hashlib.sha256()
    for row, caption in zip(pairs.image_of, pairs.captions, strict=True):
        digest.update(f"{pairs.image_ids[row]}\t{caption}\n".encode())
    return digest.hexdigest()


def bank_path(dataset_root, noise_ratio):
    """Where we write the bank of a noise ratio."""
    folder = Path(dataset_root) / "annotations" / BANK_FOLDERS[0]
    return folder / f"{ratio_name(noise_ratio)}{SUFFIX}"


def save_bank(bank, pairs, path):
    """Write `bank`, with the fingerprint of `pairs`, to `path` (.npz, no pickle)."""
    info = json.dumps({**bank.info, "fingerprint": fingerprint(pairs)})
    with atomic_write(path, "wb") as f:
        np.savez(f, image_entry=bank.image_entry, caption_entry=bank.caption_entry,
                 clean=bank.clean, loss=bank.loss, posterior=bank.posterior, cosine=bank.cosine,
                 info=np.frombuffer(info.encode(), np.uint8))


def load_bank(dataset_root, noise_ratio, pairs):
    """(bank, path) for `pairs` if one lies in the data folder, ours before the authors'; else None.

    Raises InputError when it is broken, belongs to other captions or points outside the data.
    """
    for name in BANK_FOLDERS:
        folder = Path(dataset_root) / "annotations" / name
        path = find_by_ratio(folder, SUFFIX, noise_ratio)
        if path is not None:
            return _check(_read(path, pairs), pairs, path), path
    return None


def _read(path, pairs):
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        info = json.loads(arrays.pop("info").tobytes())
        bank = MemoryBank(**arrays, info=info)
        known = info["fingerprint"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a memory bank of ours or is cut short; delete it and run "
                         "get_memorybank.py again") from error
    if known != fingerprint(pairs):
        raise InputError(f"{path} was built for other captions than {pairs.source}; delete it or "
                         "run get_memorybank.py again")
    return bank


def _check(bank, pairs, path):
    n = len(pairs)
    for what, entry, length in (("images", bank.image_entry, len(pairs.image_ids)),
                                ("captions", bank.caption_entry, n)):
        if entry.shape != (length,) or entry.dtype.kind != "i":
            raise InputError(f"{path} has entries for {len(np.atleast_1d(entry))} {what}, the data "
                             f"set has {length}; run get_memorybank.py again")
        if length and not (0 <= entry.min() and entry.max() < n):
            outside = entry[(entry < 0) | (entry >= n)][0]
            raise InputError(f"{path} points at pair {outside}, but there are pairs 0 to {n - 1} "
                             "only; run get_memorybank.py again")
    return bank
