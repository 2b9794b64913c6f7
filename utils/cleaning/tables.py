"""Tables of images and captions in the formats that people have them in, read row by row.

    text      .csv .tsv .txt .token: a header, then a row a line, with commas, tabs, semicolons or
              bars between fields
    JSON      .jsonl, an object a line; .json, an array of objects
    columns   Parquet files, which need pyarrow
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

import codecs
import contextlib
import csv
import glob
import itertools
import re
import shlex
import tarfile
from pathlib import Path
from typing import NamedTuple

from utils.cleaning.captions import as_json, from_json, one_line, with_only
from utils.errors import InputError
from utils.files import atomic_write, parsing, require_regular

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IN_FOLDERS = (".tar.gz", ".tgz", ".tar", *(f".{ending}" for ending in IMAGES), ".parquet", ".arrow")
NO_HEADER = re.compile(rf"[^,\t;|]+\.(?:{'|'.join(IMAGES)})(?:#\d+)?([,\t;|])", re.I)
URL = re.compile(r"(^|[\t,;|\"])\s*https?://", re.I)  # in no header
NO_TABLES = {b"\xff\xff\xff\xff": "an Arrow stream, as save_to_disk of Hugging Face's datasets "
                                  "writes it; give what to_parquet('FILE.parquet') writes",
             b"ARROW1": "an Arrow file; save it as Parquet",
             b"\xff\xfe": "UTF-16, as spreadsheets save Unicode text; save it as CSV in UTF-8",
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


def read_rows(path, columns, advice="give --image_column and --caption_column; captions of several "
                                    "columns must be a list in one"):
    """Yield the rows of a table: for each a dict of the `columns`, or a str that says what is wrong
    with the row.

    An image is what its column holds; in shards, a `Member`. Raises InputError when the table
    cannot be read, or, with `advice`, when its first row lacks a column.
    """
    first = True
    for row in table_of(path).rows(columns):
        if isinstance(row, dict):
            absent = next((column for column in columns if column not in row), None)
            if first and absent:
                raise InputError(f"{path} has no column '{absent}', only {', '.join(row)}; "
                                 f"{advice}")
            first = False
            row = f"no '{absent}'" if absent else {column: row[column] for column in columns}
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
            raise InputError(f"{path} holds no images, nor .tar or .parquet files; "
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
    if start.startswith(b"PAR1") or ending == ".parquet":
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


class Table:
    """Files of one kind. `rows` yields, for each row, a dict or a str that says what is wrong with
    it. `write` writes rows to a file. suffix: ending of the name of a copy."""

    def __init__(self, parts):
        self.parts, self.suffix = parts, parts[0].suffix.lower()

    def copy(self, target, column, keep):
        """Write rows, with all their columns, to the file `target` in this format. For shards: a
        .csv of shard, key and caption. keep: {number of a row: places of the captions in `column`
        that stay, as `captions_in` counts them}. Values stay as they are; quotes, line ends and
        white space in JSON may change."""
        with atomic_write(target) as f:
            self.write(f, ({**row, column: with_only(row[column], keep[number])}
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
        f.write("\ufeff" * _start(self.parts[0]).startswith(codecs.BOM_UTF8))  # for Excel
        table.writerow(self.names)
        table.writerows([row[name] for name in self.names] for row in rows)


def _header(file, f):
    """(csv.reader of the rows of a file, names of its columns, the csv dialect). Raises InputError
    for a first line that is no header: it holds a URL, or begins with an image."""
    start = next(filter(str.strip, f), "")
    f.seek(0)
    if URL.search(start):
        raise InputError(f"{file} has a URL in its first line, which should name the columns; "
                         "Conceptual Captions' lists of captions and URLs have no header and no "
                         "images: download the images, as with img2dataset, and give the folder")
    ending = file.suffix.lower()
    if bare := NO_HEADER.match(start):
        between = bare[1].replace("\t", "\\t")
        raise InputError(f"{file} has no header, but an image in its first line; write one, and no "
                         f"numbers behind images: sed -e '1i image{between}caption' -e "
                         f"'s/#[0-9]*{between}/{between}/' {shlex.quote(str(file))} > "
                         f"with_header{ending}")
    likely_first = "\t,;|" if ending in (".tsv", ".tab") else ",\t;|"
    dialect = {"delimiter": max(likely_first, key=start.count), "strict": True}
    if dialect["delimiter"] == "\t" and ending != ".csv":  # quotes are text
        dialect |= {"quoting": csv.QUOTE_NONE, "quotechar": None}
    table = csv.reader(f, **dialect)
    names = next(filter(None, table), [])
    return table, [name.strip() if name not in names[:i] else f"{name} {i}"
                   for i, name in enumerate(names)], dialect


@contextlib.contextmanager
def _opened(file, what):
    """The open text file, in UTF-8."""
    advice = ("put fields that hold the characters between fields, quotes or line ends in double "
              "quotes, and save it as UTF-8")
    with parsing(file, what, advice), open(file, encoding="utf-8-sig", newline="") as f:
        yield f


class Json(Table):
    """An object a line, or an array of objects."""

    def rows(self, columns=()):
        for part in self.parts:
            with _opened(part, "a JSON file") as f:
                whole = None
                if self.suffix == ".json" or f.read(64).lstrip().startswith("["):
                    f.seek(0)
                    whole = from_json(f.read())
                if isinstance(whole, dict):
                    raise InputError(f"{part} is one object, with {', '.join(whole)}; give an "
                                     "array of objects, each with an image and its captions")
                f.seek(0)
                for row in map(from_json, filter(str.strip, f)) if whole is None else whole:
                    yield row if isinstance(row, dict) else "no JSON object"

    def write(self, f, rows, column):
        if self.suffix == ".json":
            f.write("[\n" + ",\n".join(map(as_json, rows)) + "\n]\n")
        else:
            f.writelines(f"{as_json(row)}\n" for row in rows)


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
            caption = row[column]
            caption = one_line(caption) if isinstance(caption, str) else as_json(caption)
            table.writerow((row["shard"], row["key"], caption))


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
    """Parquet files, whose types are unified. A copy is one Parquet file."""

    suffix = ".parquet"

    def __init__(self, parts):
        try:
            import pyarrow as pa
            from pyarrow import dataset
        except ImportError:
            raise InputError(f"{parts[0]} needs the package pyarrow: pip install pyarrow") from None
        self.schema, what = None, "a Parquet file"
        for part in parts:
            with parsing(part, what, "write it anew"):
                own = dataset.dataset([part]).schema
                self.schema = pa.unify_schemas([self.schema or own, own],
                                               promote_options="permissive")
            what = f"a file with columns of the same types as {parts[0]}"
        self.data = dataset.dataset(parts, self.schema)

    def batches(self, columns=None, **size):
        for fragment in self.data.get_fragments():
            with parsing(fragment.path, "a whole file of columns", "write it anew"):
                yield from fragment.to_batches(self.schema, columns, use_threads=False, **size)

    def rows(self, columns=()):
        known = columns and set(columns) <= set(self.schema.names)
        for batch in self.batches(list(dict.fromkeys(columns)) if known else None, batch_size=256):
            yield from batch.to_pylist()

    def copy(self, target, column, keep):
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, place = 0, self.schema.get_field_index(column)
        field = self.schema.field(place)
        with atomic_write(target, "wb") as f, pq.ParquetWriter(f, self.schema) as writer:
            for batch in self.batches():
                numbers = [n for n in range(start, start + len(batch)) if n in keep]
                rows = batch.take(pa.array([n - start for n in numbers], pa.int64()))
                start += len(batch)
                cells = [with_only(value, keep[n]) for n, value
                         in zip(numbers, rows[place].to_pylist(), strict=True)]
                writer.write_batch(rows.set_column(place, field, pa.array(cells, field.type)))
