"""The memory bank and its files.

Ours is annotations/frozen_memory_bank/{ratio}_mbank.npz: plain arrays, read without pickle. The
authors' are two pickled dictionaries, {ratio}_mbank_img_idx.npy and {ratio}_mbank_txt_idx.npy.
"""

import hashlib
import io
import json
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write
from utils.reading.layout import BANK_FOLDERS, find_by_ratio, ratio_name

SUFFIX = "_mbank.npz"
MAX_SIZE = 2**32  # bytes, unpacked: those of 95 million pairs
RELEASED_IMAGES, RELEASED_CAPTIONS = "_mbank_img_idx.npy", "_mbank_txt_idx.npy"


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


def save_bank(bank, pairs, path, replace=True):
    """Write `bank`, with the fingerprint of `pairs`, to `path` (.npz, no pickle). Without `replace`
    one that another run has written meanwhile stays."""
    info = json.dumps({**bank.info, "fingerprint": fingerprint(pairs)})
    with atomic_write(path, "wb", replace) as f:
        np.savez(f, image_entry=bank.image_entry, caption_entry=bank.caption_entry,
                 clean=bank.clean, loss=bank.loss, posterior=bank.posterior, cosine=bank.cosine,
                 info=np.frombuffer(info.encode(), np.uint8))


def load_bank(dataset_root, noise_ratio, pairs):
    """(bank, path) for `pairs` if one lies in the data folder, ours before the authors'; else None.

    Raises InputError when it is broken, belongs to other captions or points outside the data.
    """
    folders = [Path(dataset_root) / "annotations" / name for name in BANK_FOLDERS]
    for suffix, read in ((SUFFIX, _read), (RELEASED_IMAGES, _read_released)):
        for folder in folders:
            path = find_by_ratio(folder, suffix, noise_ratio)
            if path is not None:
                return _check(read(path, pairs), pairs, path), path
    return None


def _read(path, pairs):
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_SIZE:
                raise ValueError("unpacks to more than any bank holds")
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        info = json.loads(arrays.pop("info").tobytes())
        bank = MemoryBank(**arrays, info=info)
        known = info["fingerprint"]
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"{path} is not a memory bank of ours or is cut short; delete it and run "
                         "get_memorybank.py again") from error
    if known != fingerprint(pairs):
        raise InputError(f"{path} was built for other captions than {pairs.source}; delete it or "
                         "run get_memorybank.py again")
    return bank


# ---- the authors' format -------------------------------------------------------------------------


def save_released(bank, pairs, dataset_root, noise_ratio):
    """Write the authors' two files, dictionaries str(image id) -> pair and str(caption index) ->
    pair, into the folder that their code reads. Returns both paths."""
    folder = Path(dataset_root) / "annotations" / BANK_FOLDERS[1]
    entries = {
        RELEASED_IMAGES: dict(zip(_image_keys(pairs), bank.image_entry.tolist(), strict=True)),
        RELEASED_CAPTIONS: {str(i): e for i, e in enumerate(bank.caption_entry.tolist())},
    }
    paths = []
    for suffix, entry in entries.items():
        paths.append(folder / f"{ratio_name(noise_ratio)}{suffix}")
        with atomic_write(paths[-1], "wb") as f:
            np.save(f, np.array(entry, dtype=object), allow_pickle=True)
    return paths


def _read_released(path, pairs):
    """The authors' bank whose image file is `path`. They carry no fingerprint: only their keys and
    their range tell whether they belong to the data."""
    captions_path = path.with_name(path.name.replace(RELEASED_IMAGES, RELEASED_CAPTIONS))
    return MemoryBank(_entries(path, _image_keys(pairs)),
                      _entries(captions_path, map(str, range(len(pairs)))))


def _numbers(value):
    """A value of a pickled dictionary as an array."""
    if isinstance(value, _Array):
        value = value.value
    return np.asarray(value) if isinstance(value, int | np.ndarray) else np.empty(0)


def _image_keys(pairs):
    """The authors' keys of the images: ids as numbers, without leading zeros."""
    return [str(int(i)) if i.isascii() and i.isdigit() else i for i in pairs.image_ids]


def _entries(path, keys):
    """Pair index (int64) of each key of a pickled dictionary. Values are ints, numpy scalars or
    arrays of one number."""
    try:
        with open(path, "rb") as f:
            entries = {str(key): _numbers(value) for key, value in _load_dictionary(f).items()
                       if isinstance(key, str | int)}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist, but its other half does; a memory bank is two "
                         "files, or run get_memorybank.py") from None
    except Exception as error:  # a broken pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a memory bank of the authors' format ({reason}); run "
                         "get_memorybank.py") from error
    result = []
    for key in keys:
        value = entries.get(key)
        if value is None:
            raise InputError(f"{path} has no entry for '{key}'; it was built for another data set; "
                             "run get_memorybank.py")
        if value.size != 1 or value.dtype.kind not in "iu":
            raise InputError(f"{path}: the entry of '{key}' is not one whole number")
        result.append(int(value.reshape(())))
    return np.array(result, np.int64)


class _DType:
    """Stands for numpy.dtype in a pickle, whose own state could be forged to point anywhere."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1]

    def read(self, data):
        """The numbers (k,) in `data`, bytes."""
        if not re.fullmatch("[iuf][1248]", self.code):
            raise ValueError(f"holds values of type {self.code}")
        return np.frombuffer(data, np.dtype(self.code).newbyteorder(self.order))


class _Array:
    """Stands for numpy.ndarray. value: its numbers, flat, or the list of its objects."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state):
        _, _, dtype, _, data = state
        self.value = list(data) if dtype.code == "O8" else dtype.read(data)


class _Unpickler(pickle.Unpickler):
    """Unpickles numbers, strings, dictionaries and numpy arrays of these, and refuses the rest: no
    function that a file names is called, not even numpy's."""

    NAMES = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType}
    for core in ("core", "_core"):
        NAMES[f"numpy.{core}.multiarray", "_reconstruct"] = _Array
        NAMES[f"numpy.{core}.multiarray", "scalar"] = lambda dtype, data: dtype.read(data)

    def find_class(self, module, name):
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"refused to run {module}.{name}")
        return self.NAMES[module, name]


def _load_dictionary(f):
    """The dictionary in a .npy file of one object, by the restricted unpickler."""
    version = np.lib.format.read_magic(f)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read_header(f)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"an array of {dtype} with shape {shape} instead of one dictionary")
    (entries,) = _Unpickler(f).load().value
    if not isinstance(entries, dict):
        raise ValueError(f"holds a {type(entries).__name__} instead of a dictionary")
    return entries


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
    for name in ("clean", "loss", "posterior", "cosine"):
        value = getattr(bank, name)
        if value is not None and (value.shape != (n,) or value.dtype.kind not in "bf"
                                  or not np.isfinite(value).all()):
            raise InputError(f"{path}: its array '{name}' is not a number for each pair; run "
                             "get_memorybank.py again")
    return bank
