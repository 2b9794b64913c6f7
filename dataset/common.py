"""What the preparation commands share: names of images, and the files of a split.

A split is (ids, captions): one id per image and, per image, its list of captions.
"""

import os
from pathlib import Path

from params import path
from utils.reading.layout import SPLITS, split_folder, write_lines, write_split

SPLIT_OF = {"train": "train", "training": "train", "restval": "train", "dev": "dev", "val": "dev",
            "valid": "dev", "validation": "dev", "test": "test", "testing": "test"}


def as_path(text):
    """An argparse type: a path with ~ expanded, as `Path`."""
    return Path(path(text))


def inner_name(name):
    """`name` as a plain path below a folder ("a/b.jpg"). Raises ValueError when the path leads out
    of the folder or does not fit on a line of UTF-8 text."""
    name.encode()
    if name != name.strip() or not {*"\n\r\0"}.isdisjoint(name):
        raise ValueError(f"image name {name!r} does not fit on a line of image_name.txt")
    plain = os.path.normpath(name)
    if os.path.isabs(name) or plain.split("/")[0] in (".", ".."):
        raise ValueError(f"image {name!r} does not lie inside the images folder")
    return plain


def write_splits(folder, splits, names=None):
    """Write the id and caption files of `splits` {"train" | "dev" | "test": split} to a folder, and
    image_name.txt when `names` are given."""
    if names is not None:
        write_lines(Path(folder) / "image_name.txt", names)
    for split in SPLITS:
        write_split(folder, split, *splits[split])


def print_sizes(root, splits):
    """Print how many images and captions each split has, and where they are."""
    for split in SPLITS:
        ids, captions = splits[split]
        print(f"{split:>5}: {len(ids):7d} images, {sum(map(len, captions)):7d} captions")
    print(f"written to {split_folder(root)}")
