"""The table that dataset/prepare_pairs.py made a data set from, and whether it has changed.

Beside the caption files lie source.json, a `Source`, and {split}_rows.txt: for each caption line
the row of the table that it is from and its place among the captions of that row, both from 0.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cleaning.tables import Member, read_rows
from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.progress import progress
from utils.reading.layout import read_lines, split_folder

SOURCE = "source.json"


class Source(NamedTuple):
    """A table's path, its two columns, its number of rows and the SHA-256 of the two columns."""

    table: str
    image_column: str
    caption_column: str
    rows: int
    sha256: str


def read_source(table, image_column, caption_column):
    """The `Source` of a table, of which all rows are read."""
    columns, rows, sha256 = (image_column, caption_column), 0, hashlib.sha256()
    for row in progress(read_rows(table, columns), desc="hashing", unit="row"):
        for value in [row] if isinstance(row, str) else [row[name] for name in columns]:
            if isinstance(value, Member):  # its bytes are not read: there may be terabytes
                value = Path(value.file).name, value.offset, value.size
            sha256.update(hashlib.sha256(repr(value).encode(errors="replace")).digest())
        rows += 1
    return Source(os.path.abspath(table), *columns, rows, sha256.hexdigest())


def save_source(source, folder):
    """Write a `Source` into the folder of the caption files."""
    with atomic_write(Path(folder) / SOURCE) as f:
        json.dump(source._asdict(), f, indent=1)


def source_of(root):
    """The `Source` of a data set; None if dataset/prepare_pairs.py did not make it."""
    path = split_folder(root) / SOURCE
    if not path.exists():
        return None
    with parsing(path, "the source of a data set", "prepare the data set again"):
        return Source(**json.loads(path.read_text(encoding="utf-8")))


def rows_of(root, splits):
    """(n, 2) int64: the row in the table, and the place there, of each caption of some splits."""
    rows = []
    for split in splits:
        path = split_folder(root) / f"{split}_rows.txt"
        with parsing(path, "a list of rows and places", "prepare the data set again"):
            rows += [(int(row), int(place)) for row, place in map(str.split, read_lines(path))]
    return np.array(rows, np.int64).reshape(-1, 2)


def require_unchanged(source):
    """Raise InputError if the table has changed since the data set was prepared from it."""
    now = read_source(*source[:3])
    if now != source:
        raise InputError(f"{source.table} has changed since the data set was prepared from it (it "
                         f"had {source.rows} rows and has {now.rows}, or their order or content "
                         "differs); prepare the data set again, or restore the table")
