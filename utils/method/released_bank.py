"""The authors' memory banks: two pickled dictionaries, {ratio}_mbank_img_idx.npy from str(image id)
and {ratio}_mbank_txt_idx.npy from str(caption index) to a pair, read without running a pickle's
code."""

import pickle

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.reading.layout import ratio_name

IMAGES, CAPTIONS = "_mbank_img_idx.npy", "_mbank_txt_idx.npy"
ADVICE = "run get_memorybank.py"


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, dictionaries and numpy arrays of these. Raises KeyError for all
    else. The dtypes are numpy's own, which ignore a state in the file: a forged one would make
    pointers of bytes."""

    DTYPES = {code: np.dtype(code) for code in ("O8", "i8", "i4", "i2", "i1", "u8", "u4")}
    NAMES = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": lambda code, *_: RestrictedUnpickler.DTYPES[code],
        "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
        "numpy.core.multiarray.scalar": np.int64(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        return self.NAMES[f"{module}.{name}".replace("numpy._core", "numpy.core")]  # numpy 2's name


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
    captions_path, n = path.with_name(path.name.replace(IMAGES, CAPTIONS)), len(pairs)
    return (read_entries(path, image_keys(pairs), n),
            read_entries(captions_path, map(str, range(n)), n))


def image_keys(pairs):
    """The authors' keys of the images: ids as numbers, without leading zeros."""
    return [str(int(i)) if i.isascii() and i.isdigit() else i for i in pairs.image_ids]


def read_entries(path, keys, num_pairs):
    """Pair (int64), of 0 to num_pairs - 1, of each key of a pickled dictionary. Values are ints,
    numpy scalars or arrays of one number."""
    with (parsing(path, "a memory bank of the authors' format, which is two files", ADVICE),
          open(path, "rb") as f):
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        entries = RestrictedUnpickler(f).load().item()  # an array of one object
        entries = {str(key): value for key, value in entries.items() if isinstance(key, str | int)}
    result = []
    for key in keys:
        if key not in entries:
            raise InputError(f"{path} has no entry for '{key}'; it was built for another data set; "
                             f"{ADVICE}")
        value = entries[key]
        if isinstance(value, np.ndarray | np.integer) and value.size == 1 and value.dtype != "O":
            value = value.item()
        if type(value) is not int or not 0 <= value < num_pairs:
            raise InputError(f"{path}: the entry of '{key}' is no pair of 0 to {num_pairs - 1}; "
                             f"{ADVICE}")
        result.append(value)
    return np.array(result, np.int64)
