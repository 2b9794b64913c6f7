"""The table that dataset/prepare_pairs.py made a data set from, as it noted it, and whether it is
still the same.

Beside the caption files lie source.json, a `Source`, and {split}_rows.txt: for each caption line
the row of the table that it is from and its place among the captions of that row, both from 0.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cleaning.tables import Member, read_rows
from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.reading.layout import read_lines, split_folder

SOURCE = "source.json"


class Source(NamedTuple):
    """A table's path, its two columns, its number of rows and the SHA-256 of the two columns."""

    table: str
    image_column: str
    caption_column: str
    rows: int = 0
    sha256: str = ""  # also of data sets that were prepared before these were noted

    @property
    def columns(self):
        return self.image_column, self.caption_column


class Digest:
    """The number of rows that were added, and the hash of two columns of them all."""

    def __init__(self, columns):
        self.columns, self.rows, self.sha256 = columns, 0, hashlib.sha256()

    def add(self, row):
        for value in [row] if isinstance(row, str) else [row[name] for name in self.columns]:
            if isinstance(value, Member):  # hundreds of gigabytes, perhaps
                value = Path(value.file).name, value.offset, value.size
            self.sha256.update(hashlib.sha256(repr(value).encode(errors="replace")).digest())
        self.rows += 1


def save_source(source, folder):
    """Write a `Source` into the folder of the caption files."""
    with atomic_write(Path(folder) / SOURCE) as f:
        json.dump(source._asdict(), f, indent=1)


def source_of(root):
    """The `Source` of a data set, None where dataset/prepare_pairs.py did not make it."""
    path = split_folder(root) / SOURCE
    if not path.exists():
        return None
    with parsing(path, "the source of a data set", "prepare the data set again"):
        return Source(**json.loads(path.read_text(encoding="utf-8")))


def rows_of(root, splits):
    """(n, 2) int64: row of the table and place of each caption of some splits."""
    rows = []
    for split in splits:
        path = split_folder(root) / f"{split}_rows.txt"
        with parsing(path, "a list of rows and places", "prepare the data set again"):
            rows += [tuple(map(int, [*line.split(), 0][:2])) for line in read_lines(path)]
    return np.array(rows, np.int64).reshape(-1, 2)


def require_unchanged(source):
    """Raise InputError unless the table is as it was when the data set was prepared."""
    now = Digest(source.columns)
    for row in read_rows(source.table, source.columns):
        now.add(row)
    if (now.rows, now.sha256.hexdigest()) != (source.rows, source.sha256):
        raise InputError(f"{source.table} has changed since the data set was prepared from it (it "
                         f"had {source.rows} rows and has {now.rows}, or their order or content is "
                         "another); prepare the data set again, or give back the table as it was")
