"""Tables of images and captions in the formats that people have them in, read a row at a time.

    .csv .tsv  a header, then a row a line; a .csv may quote its fields, a .tsv stands as it is read
    .jsonl     an object a line
    .parquet   needs pyarrow
    .tar       shards of img2dataset or webdataset; the files KEY.jpg, KEY.txt and KEY.json are one
               row: columns key, image, caption (of the .txt, else the .json) and the .json's own

A table is one file, or a glob of files of one kind, or a folder of shards: of .tar files, or of the
same as loose files. Its rows are counted from 0 over all its files; a header is none.
"""

import csv
import glob
import io
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write, reading, require_regular
from utils.reading.layout import read_lines, split_folder

SOURCE = "source.json"
KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".tar")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
DIALECTS = {".csv": {"strict": True}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}


class Member(NamedTuple):
    """A file inside a tar, or one of its own: where its bytes lie. Nothing is unpacked by name."""

    file: str
    offset: int
    size: int

    def read(self):
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)


def read_rows(path, columns):
    """Rows of a table: yields a dict of the `columns`, or a str that says why a row has none.

    An image is what its column holds, a `Member` in shards. Raises InputError when the table cannot
    be read, or its first row lacks a column.
    """
    first = True
    for file in files(path):
        for _, row in _rows(file, columns):
            if row is None:  # a header
                continue
            if isinstance(row, dict):
                absent = [column for column in columns if column not in row]
                if first and absent:
                    raise InputError(f"{file} has no column '{absent[0]}', only {', '.join(row)}; "
                                     "give --image_column and --caption_column")
                first = False
                row = f"no '{absent[0]}'" if absent else {name: row[name] for name in columns}
            yield row


def copy_rows(source, target, keep):
    """Write the rows of the table `source` whose numbers are in `keep`, with all their columns, to
    the file `target` in the same format; of shards, a .csv of shard and key. Text stays as it is,
    byte for byte. `copy_suffix(source)` is how the name of `target` must end."""
    keep, parts = set(map(int, keep)), files(source)
    if _kind(parts[0]) == ".parquet":
        return _copy_parquet(parts, target, keep)
    number, begun = 0, False
    with atomic_write(target) as f:
        for file in parts:
            for text, row in _rows(file):
                header, number = row is None, number + (row is not None)
                if (header and not begun) or (not header and number - 1 in keep):
                    f.write(text if text.endswith(("\n", "\r")) else f"{text}\n")
                begun = True


def copy_suffix(source):
    """How the name of a copy of a table ends: ".csv", ".tsv", ".jsonl" or ".parquet"."""
    kind = _kind(files(source)[0])
    return kind if kind in KINDS[:-1] else ".csv"


def source_of(root, split="train"):
    """(number (n,) int64 of the row in the user's table that each caption of a split is from, dict
    with the "table" and its "image_column" and "caption_column"), as dataset/prepare_pairs.py noted
    it; None where it did not make the data set."""
    path = split_folder(root) / SOURCE
    if not path.exists():
        return None
    with reading(path, "the source of a data set", "prepare the data set again"):
        source = json.loads(path.read_text(encoding="utf-8"))
        numbers = np.array(read_lines(split_folder(root) / f"{split}_rows.txt"), np.int64)
        return numbers, {key: source[key] for key in ("table", "image_column", "caption_column")}


def files(path):
    """Files, or folders of loose shards, that a table consists of, in order: a list of Path."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.rglob("*.tar"))
        if not found:
            return sorted(Path(parent) for parent, _, _ in os.walk(path))
    else:
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    for file in found or [path]:
        require_regular(file, "give a table of images and captions")
    if len({_kind(file) for file in found}) > 1 or _kind(found[0]) not in KINDS:
        raise InputError(f"{path} must end in one of {', '.join(KINDS)}, which says how it is "
                         "read, or be a folder of .tar files")
    return found


def _rows(file, columns=None):
    """Rows of one file: yields (text as in the file, dict or what is wrong with the row); first the
    header, if there is one, with None."""
    if file.is_dir() or _kind(file) == ".tar":
        return _shard(file)
    if _kind(file) == ".parquet":
        return (("", row) for row in _parquet(file, columns))
    return _jsonl(file) if _kind(file) == ".jsonl" else _delimited(file)


def _kind(file):
    return file.suffix.lower()


def _delimited(file):
    advice = "put fields with commas, quotes or line ends in double quotes, and save it as UTF-8"
    with reading(file, f"a {_kind(file)} table", advice), open(file, encoding="utf-8",
                                                               newline="") as f:
        raw = []

        def lines():
            for line in f:
                raw.append(line)
                yield line.removeprefix("\ufeff")  # Excel's mark of UTF-8

        table = csv.reader(lines(), **DIALECTS[_kind(file)])
        header = None
        try:
            for fields in table:
                text = "".join(raw)
                raw.clear()
                if header is None:
                    header = fields
                    yield text, None
                elif len(fields) == len(header):
                    yield text, dict(zip(header, fields, strict=True))
                elif fields:  # not an empty line
                    yield text, "not as many fields as the header"
        except csv.Error as error:
            raise ValueError(f"line {table.line_num}: {error}") from None


def _jsonl(file):
    with (reading(file, "UTF-8 text", "save it as UTF-8"),
          open(file, encoding="utf-8-sig", newline="") as f):
        for line in filter(str.strip, f):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield line, row if isinstance(row, dict) else "no JSON object"


def _parquet(file, columns):
    pq = _pyarrow(file)
    with reading(file, "a Parquet file", "write it anew"), pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        known = columns is None or set(columns) <= set(names)
        for batch in table.iter_batches(256, columns=columns if known else names):
            yield from batch.to_pylist()


def _copy_parquet(parts, target, keep):
    pq, start, writer = _pyarrow(target), 0, None
    with atomic_write(target, "wb") as f:
        for file in parts:
            with reading(file, "a Parquet file", "write it anew"), pq.ParquetFile(file) as table:
                writer = writer or pq.ParquetWriter(f, table.schema_arrow)
                for group in range(table.num_row_groups):
                    rows = table.read_row_group(group)
                    start, numbers = start + len(rows), range(start, start + len(rows))
                    writer.write_table(rows.filter([number in keep for number in numbers]))
        writer.close()


def _pyarrow(file):
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file} needs the package pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


def _shard(file):
    """Rows of a .tar, or of the loose files in a folder; their text is a line of a .csv."""
    yield "shard,key\n", None
    samples = {}  # key with its folders: {extension: Member}
    for name, member in _loose(file) if file.is_dir() else _members(file):
        folder, _, base = name.rpartition("/")
        key, _, extension = base.partition(".")  # webdataset's rule: up to the first dot
        extension = "image" if extension.lower() in IMAGES else extension.lower()
        if key and extension in ("image", "txt", "json"):
            samples.setdefault((folder, key), {}).setdefault(extension, member)
    for (_, key), parts in samples.items():
        if file.is_dir() and "image" not in parts and key.endswith("_stats"):
            continue  # img2dataset's own notes
        row = {"key": key, "image": parts.get("image"), "caption": None}
        if "json" in parts:
            try:
                row |= json.loads(parts["json"].read()) | {"key": key, "image": row["image"]}
            except (ValueError, TypeError, RecursionError):  # no JSON, or no object
                pass
        if "txt" in parts:
            row["caption"] = parts["txt"].read().decode(errors="replace")
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow((file.name, key))
        yield line.getvalue(), row


def _loose(folder):
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path.name, Member(str(path), 0, path.stat().st_size)


def _members(path):
    with (reading(path, "a whole, uncompressed tar", "download the shard again or move it away"),
          tarfile.open(path, "r:") as tar):
        for member in tar:
            if member.size < 0:  # some versions of tarfile would run in circles
                raise ValueError("a member of negative size")
            if member.isreg() and not member.issparse():
                yield member.name, Member(str(path), member.offset_data, member.size)
