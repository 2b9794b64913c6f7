"""The authors' memory banks: two pickled dictionaries, {ratio}_mbank_img_idx.npy from str(image id)
and {ratio}_mbank_txt_idx.npy from str(caption index) to a pair, read without running a pickle's
code."""

import numpy as np

from clip.formats import RestrictedUnpickler
from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.reading.layout import ratio_name

IMAGES, CAPTIONS = "_mbank_img_idx.npy", "_mbank_txt_idx.npy"
ADVICE = "run get_memorybank.py"


def save_released(bank, pairs, folder, noise_ratio):
    """Write the authors' two files of a bank into `folder`. Returns both paths."""
    entries = {
        IMAGES: dict(zip(image_keys(pairs), bank.image_entry.tolist(), strict=True)),
        CAPTIONS: {str(i): e for i, e in enumerate(bank.caption_entry.tolist())},
    }
    paths = []
    for suffix, entry in entries.items():
        paths.append(folder / f"{ratio_name(noise_ratio)}{suffix}")
        with atomic_write(paths[-1], "wb") as f:
            np.save(f, np.array(entry, dtype=object), allow_pickle=True)
    return paths


def read_released(path, pairs):
    """(image_entry, caption_entry) int64 of the authors' bank whose image file is `path`. It
    carries no hash: only its keys and their range tell whether it belongs to the data."""
    captions_path = path.with_name(path.name.replace(IMAGES, CAPTIONS))
    return (read_entries(path, image_keys(pairs)),
            read_entries(captions_path, map(str, range(len(pairs)))))


def image_keys(pairs):
    """The authors' keys of the images: ids as numbers, without leading zeros."""
    return [str(int(i)) if i.isascii() and i.isdigit() else i for i in pairs.image_ids]


def read_entries(path, keys):
    """Pair index (int64) of each key of a pickled dictionary. Values are ints, numpy scalars or
    arrays of one number."""
    with (parsing(path, "a memory bank of the authors' format, which is two files", ADVICE),
          open(path, "rb") as f):
        entries = {str(key): value for key, value in load_dictionary(f).items()
                   if isinstance(key, str | int)}
    result = []
    for key in keys:
        if key not in entries:
            raise InputError(f"{path} has no entry for '{key}'; it was built for another data set; "
                             f"{ADVICE}")
        value = entries[key]
        if isinstance(value, _Array) and len(value) == 1:
            value = value[0]
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not 0 <= value < 2**63:
            raise InputError(f"{path}: the entry of '{key}' is not one whole number from 0")
        result.append(int(value))
    return np.array(result, np.int64)


class _DType:
    """Stands for numpy.dtype in a pickle, whose own state could claim that pointers are numbers:
    here numpy reads `name` alone."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        self.name = state[1] + self.name  # the order of bytes

    def numbers(self, data):
        """The numbers (k,) in `data`, bytes. Raises ValueError for objects."""
        return np.frombuffer(data, self.name)


class _Array(list):
    """Stands for numpy.ndarray: its elements, flat."""

    def __setstate__(self, state):
        _, _, dtype, _, data = state
        self[:] = data if isinstance(data, list) else dtype.numbers(data)


class _Unpickler(RestrictedUnpickler):
    """Unpickles numbers, strings, dictionaries and numpy arrays of these, and refuses the rest; not
    even functions of numpy are called."""

    NAMES = {"numpy.ndarray": _Array, "numpy.dtype": _DType}
    for core in ("core", "_core"):
        NAMES[f"numpy.{core}.multiarray._reconstruct"] = lambda *_: _Array()
        NAMES[f"numpy.{core}.multiarray.scalar"] = lambda dtype, data: dtype.numbers(data)[0]


def load_dictionary(f):
    """The dictionary in a .npy file of one object, by the restricted unpickler."""
    np.lib.format.read_magic(f)
    np.lib.format.read_array_header_1_0(f)
    (entries,) = _Unpickler(f).load()
    if not isinstance(entries, dict):
        raise ValueError(f"holds a {type(entries).__name__} instead of a dictionary")
    return entries
