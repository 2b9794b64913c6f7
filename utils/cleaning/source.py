"""The table that dataset/prepare_pairs.py made a data set from: what it noted, whether the table is
still the same, and the table without wrong captions.

Beside the caption files lie source.json, a `Source`, and {split}_rows.txt: for each caption line
the row of the table that it is from and its place among the captions of that row, both from 0.
"""

import hashlib
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cleaning.captions import captions_in
from utils.cleaning.tables import Member, Shards, copy_rows, read_rows, table_of
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
    """Passes rows of `read_rows` on; then `rows` is their number and `sha256` that of two columns
    of them all."""

    def __init__(self, read, columns):
        self.read, self.columns, self.rows, self.sha256 = read, columns, 0, hashlib.sha256()

    def __iter__(self):
        for row in self.read:
            for value in [row] if isinstance(row, str) else [row[name] for name in self.columns]:
                if isinstance(value, Member):  # hundreds of gigabytes, perhaps
                    value = Path(value.file).name, value.offset, value.size
                self.sha256.update(hashlib.sha256(repr(value).encode(errors="replace")).digest())
            self.rows += 1
            yield row


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


def rows_of(root, split):
    """(n, 2) int64: row of the table and place of each caption of a split."""
    path = split_folder(root) / f"{split}_rows.txt"
    with parsing(path, "a list of rows and places", "prepare the data set again"):
        return np.array([[*line.split(), 0][:2] for line in read_lines(path)],
                        np.int64).reshape(-1, 2)


def require_unchanged(source):
    """Raise InputError unless the table is as it was when the data set was prepared."""
    now = Digest(read_rows(source.table, source.columns), source.columns)
    for _ in now:
        pass
    if (now.rows, now.sha256.hexdigest()) != (source.rows, source.sha256):
        raise InputError(f"{source.table} has changed since the data set was prepared from it (it "
                         f"had {source.rows} rows and has {now.rows}, or their order or content is "
                         "another); prepare the data set again, or give back the table as it was")


def copy_cleaned(source, target, rows, captions):
    """Write the table without wrong captions, and without rows that are left with none, to the file
    `target`, and read it back. Returns the number of rows written.

    rows (n, 2): as of `rows_of`, of the pairs that stay; captions: n str, theirs. Raises InputError
    when what was written does not hold exactly these.
    """
    keep = defaultdict(dict)  # {row: {place: caption}}
    for (row, place), caption in zip(rows.tolist(), captions, strict=True):
        keep[row][place] = caption
    copy_rows(source.table, target, source.caption_column, keep)
    columns = ("key", "caption") if isinstance(table_of(source.table), Shards) else source.columns
    originals = read_rows(source.table, (columns[0], source.caption_column))
    originals = (pair for pair in enumerate(originals) if pair[0] in keep)
    for original, copy in itertools.zip_longest(originals, read_rows(target, columns)):
        number, row = original or (None, {})
        if not (row and isinstance(copy, dict) and copy[columns[0]] == row[columns[0]] and
                [caption for _, caption in captions_in(copy[columns[1]])]
                == [caption for _, caption in sorted(keep[number].items())]):
            raise InputError(f"{source.table}, row {number}: its copy in {target.name} would not "
                             "hold the pairs that are kept, so none is written; save the table in "
                             "another format and prepare the data set from that")
    return len(keep)
