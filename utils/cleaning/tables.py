"""Tables of images and captions in the formats that people have them in, read row by row.

    text      .csv .tsv .txt .token: a header, then a row a line, with commas, tabs, semicolons or
              bars between fields. Without a header: name.jpg or name.jpg#0, then the caption
    JSON      .jsonl, an object a line; .json, an array of objects, or an object that holds one
    columns   Parquet and Arrow files, which need pyarrow
    shards    .tar files of img2dataset or webdataset, or the same as loose files: KEY.jpg, KEY.txt
              and KEY.json are one row, with the columns key, image, caption and those of the .json

A table is a file, a glob of files of one kind, or a folder. Its rows are counted from 0 over all
its files; a header is not counted. Columns go by name, whatever their order in a file.

Columns are read by pyarrow.dataset, which unifies the types of several files. Text, JSON and tars
are read by Python's own modules: a broken row must be skipped alone and listed by its number.
duckdb, pyarrow.csv, pyarrow.json and Hugging Face's datasets, when tried, swallowed the rows behind
a broken one or did not number it. webdataset reads a tar once, as a stream, but images are needed
twice.
"""

import contextlib
import csv
import fnmatch
import glob
import itertools
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from utils.cleaning.captions import as_json, captions_in, from_json, without
from utils.errors import InputError
from utils.files import atomic_write, parsing, require_regular

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IN_FOLDERS = (".tar.gz", ".tgz", ".tar", *(f".{ending}" for ending in IMAGES), ".parquet", ".arrow")
NO_HEADER = re.compile(rf"[^,\t;|]+\.(?:{'|'.join(IMAGES)})(?:#\d+)?([,\t;|])", re.I)
URL = re.compile(r"(^|[\t,;|\"])\s*https?://", re.I)  # in no header
BARE = ["image", "number", "caption"]  # columns of a file without a header
BYTE_ORDER_MARKS = b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"  # of UTF-8 and of UTF-16
NO_TABLES = {b"\xff\xff\xff\xff": "an Arrow stream, as save_to_disk of Hugging Face's datasets "
                                  "writes it; give what to_parquet('FILE.parquet') writes",
             b"PK\3\4": "a spreadsheet or another zip archive; save it as CSV, or unpack it",
             b"\x1f\x8b": "compressed; unpack it, and all others beside it, with gunzip"}


class Member(NamedTuple):
    """Where the bytes of a file lie: in a tar, or in a file of its own. Nothing is unpacked by its
    name."""

    file: str
    offset: int
    size: int

    def read(self):
        """The bytes."""
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)


def read_rows(path, columns, advice="give --image_column and --caption_column ('caption_*' for "
                                    "several)"):
    """Yield the rows of a table: for each a dict of the `columns`, or a str that says what is wrong
    with the row.

    An image is what its column holds; in shards, a `Member`. A column may be a pattern, as
    "caption_*"; its cell is then a list. Raises InputError when the table cannot be read, or, with
    `advice`, when its first row lacks a column.
    """
    first = True
    for row in table_of(path).rows(columns):
        if isinstance(row, dict):
            absent = next((column for column in columns if not matching(row, column)), None)
            if first and absent:
                raise InputError(f"{path} has no column '{absent}', only {', '.join(row)}; "
                                 f"{advice}")
            first = False
            row = f"no '{absent}'" if absent else {
                column: cell(row, column) for column in columns}
        yield row


def table_of(path):
    """The table at a path: `Text`, `Json`, `Columns` or `Shards`."""
    path = Path(path)
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        by_ending = ([file for file in inside if file.name.lower().endswith(ending)]
                     for ending in IN_FOLDERS)
        found = next(filter(None, by_ending), None)
        if found is None:
            raise InputError(f"{path} holds no images, nor .tar, .parquet or .arrow files; "
                             "give a table of images and captions")
        if found[0].suffix[1:].lower() in IMAGES:
            return Shards(sorted({file.parent for file in inside}))
    for file in found or [path]:
        require_regular(file, "give a table of images and captions")
    kinds = {_kind(file) for file in found}
    if len(kinds) > 1:
        raise InputError(f"{path} holds files of several kinds; give files of one kind")
    return kinds.pop()(found)


def _kind(file):
    """The class that reads a file: by the file's first bytes if they tell, else by its ending."""
    start, ending = _start(file), file.suffix.lower()
    for magic, what in NO_TABLES.items():
        if start.startswith(magic):
            raise InputError(f"{file} is {what}")
    if start.startswith((b"PAR1", b"ARROW1")) or ending in (".parquet", ".arrow", ".feather"):
        return Columns
    if start[257:262] == b"ustar" or ending == ".tar":
        return Shards
    if ending in (".json", ".jsonl", ".ndjson"):
        return Json
    if ending in (".csv", ".tsv", ".txt", ".token", ".tab"):
        return Text
    raise InputError(f"{file} must end in .csv, .tsv, .txt, .json, .jsonl, .parquet or .tar, which "
                     "says how it is read")


def _start(file):
    with open(file, "rb") as f:
        return f.read(512)


def matching(names, wanted):
    """List of the names that equal `wanted` or, if it is a pattern as "caption_*", fit it."""
    return [wanted] if wanted in names else fnmatch.filter(names, wanted)


def cell(row, column):
    """Value of a row in a column. For a pattern: the list of the values of all columns that fit."""
    return row[column] if column in row else [row[name] for name in matching(row, column)]


def edited(row, column, places):
    """A row whose `column` keeps only the captions at `places`."""
    gone = {place for place, _ in captions_in(cell(row, column))}.difference(places)
    if column in row:
        return {**row, column: without(row[column], gone)} if gone else row
    return row | {matching(row, column)[place]: "" for place in gone}


class Table:
    """Files of one kind. `rows` yields, for each row, a dict or a str that says what is wrong with
    it. `write` writes rows to a file. suffix: ending of the name of a copy."""

    def __init__(self, parts):
        self.parts, self.suffix = parts, parts[0].suffix.lower()

    def count(self):
        """Number of rows."""
        return sum(1 for _ in self.rows())

    def copy(self, target, column, keep):
        """Write rows, with all their columns, to the file `target` in this format. For shards: a
        .csv of shard, key and caption. keep: {number of a row: places of the captions in `column`
        that stay, as `captions_in` counts them}. Values stay as they are; quotes, line ends and
        white space in JSON may change."""
        with atomic_write(target) as f:
            self.write(f, (edited(row, column, keep[number])
                           for number, row in enumerate(self.rows()) if number in keep), column)


class Text(Table):
    """Fields between commas, tabs, semicolons or bars."""

    def __init__(self, parts):
        super().__init__(parts)
        with _opened(parts[0], "a text table") as f:
            _, self.names, self.dialect = _header(parts[0], f)

    def rows(self, columns=()):
        for part in self.parts:
            with _opened(part, f"a {part.suffix.lower()} table") as f:
                table, names, dialect = _header(part, f)
                if (sorted(names), dialect) != (sorted(self.names), self.dialect):
                    raise InputError(f"{part} has other columns than {self.parts[0]}, or other "
                                     "characters between them; give tables of one form")
                try:
                    begin = table.line_num + 1  # of the row at hand
                    for fields in table:
                        if names == BARE and fields:
                            fields[:1] = re.fullmatch(r"(.*?)(#\d+)?", fields[0]).groups("")
                        if len(fields) == len(names):
                            yield dict(zip(names, fields, strict=True))
                        elif fields:  # not an empty line
                            yield f"{len(fields)} fields, but the header has {len(names)}"
                        begin = table.line_num + 1
                except csv.Error as error:
                    quote = "; a quote that opens there is not closed" * (table.line_num > begin)
                    raise ValueError(f"line {begin}: {error}{quote}") from None

    def write(self, f, rows, column):
        table = csv.writer(f, lineterminator="\n", **self.dialect)
        f.write("\ufeff" * _start(self.parts[0]).startswith(BYTE_ORDER_MARKS))  # for Excel
        if self.names == BARE:
            table.writerows([row["image"] + row["number"], row["caption"]] for row in rows)
        else:
            table.writerow(self.names)
            table.writerows([row[name] for name in self.names] for row in rows)


def _header(file, f):
    """(csv.reader of the rows of a file, names of its columns, the csv dialect). Raises InputError
    for a first line that holds a URL: it is no header, and a URL is no image."""
    start = next(filter(str.strip, f), "")
    f.seek(0)
    if URL.search(start):
        raise InputError(f"{file} has a URL in its first line, which should name the columns; "
                         "Conceptual Captions' lists of captions and URLs have no header and no "
                         "images: download the images, as with img2dataset, and give the folder")
    bare, ending = NO_HEADER.match(start), file.suffix.lower()
    likely_first = "\t,;|" if ending in (".tsv", ".tab") else ",\t;|"
    dialect = {"delimiter": bare[1] if bare else max(likely_first, key=start.count), "strict": True}
    if dialect["delimiter"] == "\t" and ending != ".csv":  # quotes are text
        dialect |= {"quoting": csv.QUOTE_NONE, "quotechar": None}
    table = csv.reader(f, **dialect)
    names = BARE if bare else next(filter(None, table), [])
    return table, [name.strip() if name not in names[:i] else f"{name} {i}"
                   for i, name in enumerate(names)], dialect


@contextlib.contextmanager
def _opened(file, what):
    """The open text file: UTF-8, or UTF-16 if it begins with that byte order mark."""
    with parsing(file, what, "put fields that hold the characters between fields, quotes or line "
                             "ends in double quotes, and save it as UTF-8"):
        wide = _start(file).startswith(BYTE_ORDER_MARKS[1:])
        with open(file, encoding="utf-16" if wide else "utf-8-sig", newline="") as f:
            yield f


class Json(Table):
    """An object a line, or an array of objects."""

    def rows(self, columns=()):
        for part in self.parts:
            with _opened(part, "a JSON file") as f:
                found = None
                if self.suffix == ".json" or f.read(64).lstrip().startswith("["):
                    f.seek(0)
                    found = _the_list(part, from_json(f.read()))
                f.seek(0)
                for row in map(from_json, filter(str.strip, f)) if found is None else found:
                    yield row if isinstance(row, dict) else "no JSON object"

    def write(self, f, rows, column):
        if self.suffix == ".json":
            f.write("[\n" + ",\n".join(map(as_json, rows)) + "\n]\n")
        else:
            f.writelines(f"{as_json(row)}\n" for row in rows)


def _the_list(file, content):
    """The list in the content of a JSON file: the content itself, or its only list; None where the
    file is no JSON."""
    if not isinstance(content, dict):
        return content
    lists = [name for name, value in content.items() if isinstance(value, list) and value]
    if len(lists) > 1:
        raise InputError(f"{file} is an object with the lists {', '.join(lists)}; make it an array "
                         "of objects, each with an image and its captions")
    return content[lists[0]] if lists else [content]


class Shards(Table):
    """Tars, or folders of loose files. A file's key is its name without a known ending."""

    suffix = ".csv"

    def __init__(self, parts):
        self.parts = parts

    def rows(self, columns=()):
        unknown, found = set(), False
        for part in self.parts:
            samples = {}  # {key with its folders: its images, texts and JSON files}
            for name, member in _loose(part) if part.is_dir() else _members(part):
                key, _, ending = name.rpartition(".")
                kind = "image" if ending.lower() in IMAGES else ending.lower()
                if Path(key).name and kind in ("image", "txt", "json"):
                    files = samples.setdefault(key, {"image": [], "txt": [], "json": []})
                    files[kind].append(member)
                else:
                    unknown.add(ending)
            for key, files in samples.items():
                if part.is_dir() and not files["image"] and key.endswith("_stats"):
                    continue  # img2dataset's own notes
                for image, text, about in itertools.zip_longest(*files.values()):
                    found = True
                    about = from_json(about.read()) if about else None
                    row = {"caption": None} | (about if isinstance(about, dict) else {})
                    if text:
                        row["caption"] = text.read().decode(errors="replace")
                    yield row | {"key": Path(key).name, "image": image, "shard": part.name}
        if unknown and not found:
            raise InputError(f"{self.parts[0]} holds files that end in "
                             f"{', '.join(sorted(unknown))}; needed are KEY.jpg (or .png, .webp, "
                             "...) with KEY.txt or KEY.json")

    def write(self, f, rows, column):
        table = csv.writer(f, lineterminator="\n")
        table.writerow(("shard", "key", "caption"))
        for row in rows:
            caption = cell(row, column)
            caption = caption if isinstance(caption, str) else as_json(caption)
            table.writerow((row["shard"], row["key"], caption.encode("utf-8", "replace").decode()))


def _loose(folder):
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path.name, Member(str(path), 0, path.stat().st_size)


def _members(path):
    with (parsing(path, "a whole, uncompressed tar", "download the shard again or move it away"),
          tarfile.open(path, "r:") as tar):
        for member in tar:
            if member.size < 0:  # some versions of tarfile would run in circles
                raise ValueError("a member of negative size")
            if member.isreg() and not member.issparse():
                yield member.name, Member(str(path), member.offset_data, member.size)


class Columns:
    """Parquet or Arrow files, whose types are unified. A copy is one Parquet file."""

    suffix = ".parquet"

    def __init__(self, parts):
        try:
            import pyarrow as pa
            from pyarrow import dataset
        except ImportError:
            raise InputError(f"{parts[0]} needs the package pyarrow: pip install pyarrow") from None
        arrow = _start(parts[0]).startswith(b"ARROW1")
        what, form = ("an Arrow file", "ipc") if arrow else ("a Parquet file", "parquet")
        self.schema = None
        for part in parts:
            with parsing(part, what, "write it anew"):
                own = dataset.dataset([part], format=form).schema
                self.schema = pa.unify_schemas([self.schema or own, own],
                                               promote_options="permissive")
            what = f"a file with columns of the same types as {parts[0]}"
        self.data = dataset.dataset(parts, self.schema, form)

    def count(self):
        """Number of rows."""
        return self.data.count_rows()

    def batches(self, columns=None, **size):
        for fragment in self.data.get_fragments():
            with parsing(fragment.path, "a whole file of columns", "write it anew"):
                yield from fragment.to_batches(self.schema, columns, use_threads=False, **size)

    def rows(self, columns=()):
        names = [name for column in columns for name in matching(self.schema.names, column)]
        known = all(matching(self.schema.names, column) for column in columns)
        for batch in self.batches(names if known else None, batch_size=256):
            yield from batch.to_pylist()

    def copy(self, target, column, keep):
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, names = 0, matching(self.schema.names, column)
        with atomic_write(target, "wb") as f, pq.ParquetWriter(f, self.schema) as writer:
            for batch in self.batches():
                numbers = [n for n in range(start, start + len(batch)) if n in keep]
                rows = batch.take(pa.array([n - start for n in numbers], pa.int64()))
                start += len(batch)
                cells = [edited(row, column, keep[n]) for n, row
                         in zip(numbers, rows.select(names).to_pylist(), strict=True)]
                for name in names:
                    field = self.schema.field(name)
                    rows = rows.set_column(rows.schema.get_field_index(name), field,
                                           pa.array([row[name] for row in cells], field.type))
                writer.write_batch(rows)
