"""Tables of images and captions in the formats that people have them in, read a row at a time.

    text      .csv .tsv .txt .token: a header, then a row a line; commas, tabs, semicolons or bars
              between its fields. Without a header: name.jpg or name.jpg#0, then the caption
    JSON      .jsonl, an object a line; .json, an array of objects, or an object that holds one
    columns   Parquet and Arrow files, which need pyarrow
    shards    .tar files of img2dataset or webdataset, or the same as loose files: KEY.jpg, KEY.txt
              and KEY.json are one row, of columns key, image, caption and those of the .json

A table is a file, a glob of files of one kind, or a folder. Its rows are counted from 0 over all
its files; a header is none. Columns go by name, whatever their order in a file.

pyarrow.dataset reads columns: it brings the types of several files together. Text, JSON and tars
are read by Python's own modules: a broken row must cost this row and not the file, and a row that
is copied must stay as it was, byte for byte, which readers of typed columns (pyarrow.csv, duckdb)
do not offer; webdataset reads tars as a stream, and images are needed twice.
"""

import contextlib
import csv
import fnmatch
import glob
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from utils.cleaning.captions import captions_in, without
from utils.errors import InputError
from utils.files import atomic_write, parsing, require_regular

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
NO_HEADER = re.compile(rf"\ufeff?[^,\t;|]+\.(?:{'|'.join(IMAGES)})(?:#\d+)?([,\t;|])", re.I)
NO_TABLES = {b"\xff\xff\xff\xff": "an Arrow stream, as save_to_disk of Hugging Face's datasets "
                                  "writes it; give what to_parquet('FILE.parquet') writes",
             b"PK\3\4": "a spreadsheet or another zip archive; save it as CSV, or unpack it",
             b"\x1f\x8b": "compressed; unpack it with gunzip"}


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

    An image is what its column holds, a `Member` in shards. A column may be a pattern, as
    "caption_*", and its cell is then a list. Raises InputError when the table cannot be read, or
    its first row lacks a column.
    """
    first = True
    for _, row in table_of(path).rows(columns):
        if isinstance(row, dict):
            absent = next((column for column in columns if not matching(row, column)), None)
            if first and absent:
                raise InputError(f"{path} has no column '{absent}', only {', '.join(row)}; give "
                                 "--image_column and --caption_column ('caption_*' for several)")
            first = False
            row = f"no '{absent}'" if absent else {
                column: cell(row, column) for column in columns}
        yield row


def copy_rows(source, target, column, keep):
    """Write rows of the table `source`, with all their columns, to the file `target`, in the format
    of the source; of shards, a .csv of shard, key and caption. `copy_suffix` is how the name of
    `target` must end.

    keep: {number of a row: places of the captions in `column` that stay, as `captions_in` counts
    them}. A row of text that keeps all it has stays as it is, byte for byte.
    """
    table_of(source).copy(target, column, keep)


def copy_suffix(source):
    """How the name of a copy of a table ends: ".csv", ".tsv", ".jsonl", ".parquet", ..."""
    return table_of(source).suffix


def table_of(path):
    """The table at a path: `Text`, `Json`, `Columns` or `Shards`."""
    path, found = Path(path), []
    if path.is_dir():
        kinds = (".tar", *(f".{ending}" for ending in IMAGES), ".parquet", ".arrow")
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        there = {file.suffix.lower() for file in inside}
        kind = next((kind for kind in kinds if kind in there), None)
        if kind is None:
            raise InputError(f"{path} holds no images, nor .tar, .parquet or .arrow files; "
                             "give a table of images and captions")
        if kind[1:] in IMAGES:
            return Shards(sorted({file.parent for file in inside}))
        found = [file for file in inside if file.suffix.lower() == kind]
    else:
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    for file in found or [path]:
        require_regular(file, "give a table of images and captions")
    kinds = {_kind(file) for file in found}
    if len(kinds) > 1:
        raise InputError(f"{path} are files of several kinds; give those of one")
    return kinds.pop()(found)


def _kind(file):
    """The class that reads a file, by its content, where that tells, or else by its ending."""
    start = _start(file)
    for magic, what in NO_TABLES.items():
        if start.startswith(magic):
            raise InputError(f"{file} is {what}")
    ending = file.suffix.lower()
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
    """The names that are `wanted`, or fit it where it is a pattern as "caption_*"."""
    return [wanted] if wanted in names else fnmatch.filter(names, wanted)


def cell(row, column):
    """What a row has in a column; where that is a pattern, the list of what fits it."""
    return row[column] if column in row else [row[name] for name in matching(row, column)]


def edited(row, column, places):
    """A row with the captions at these places of `column` alone."""
    gone = {place for place, _ in captions_in(cell(row, column))}.difference(places)
    if column in row:
        return {**row, column: without(row[column], gone)} if gone else row
    return row | {matching(row, column)[place]: "" for place in gone} if gone else row


# ---- formats that are copied as text -------------------------------------------------------------


class Lines:
    """A table whose copy is text. `rows` yields (its text as in the file, or None; a dict, or what
    is wrong with it) of each row, `line` makes text of a dict."""

    head = between = tail = ""

    def __init__(self, parts):
        self.parts, self.suffix = parts, parts[0].suffix.lower()

    def copy(self, target, column, keep):
        between = ""
        with atomic_write(target) as f:
            for number, (text, row) in enumerate(self.rows()):
                if number == 0:
                    f.write(self.head)
                if number not in keep:
                    continue
                new = edited(row, column, keep[number])
                if text is None or new is not row:
                    text = self.line(new, column)
                f.write(between + (text if text.endswith(("\n", "\r")) else f"{text}\n"))
                between = self.between
            f.write(self.tail)


class Text(Lines):
    """Fields between commas, tabs, semicolons or bars."""

    def rows(self, columns=()):
        first = None
        for part in self.parts:
            records = _records(part)
            text, names, dialect = next(records, ("", [], {}))
            if first is None:
                first, self.head, self.names, self.dialect = part, text, names, dialect
            if (sorted(names), dialect) != (sorted(self.names), self.dialect):
                raise InputError(f"{part} has other columns than {first}, or other characters "
                                 "between them; give tables of one form")
            for text, fields, _ in records:
                if len(fields) == len(names):
                    yield (text if names == self.names else None,
                           dict(zip(names, fields, strict=True)))
                elif fields:  # not an empty line
                    yield text, f"{len(fields)} fields, but the header has {len(names)}"

    def line(self, row, column):
        return _csv_line([row[name] for name in self.names], **self.dialect)


def _records(file):
    """Records of a file: yields (text, fields, dialect), that of the header first; the text of one
    that is not there is empty."""
    tabs = file.suffix.lower() in (".tsv", ".tab")
    with _opened(file, f"a {file.suffix.lower()} table", "put fields that hold the characters "
                 "between fields, quotes or line ends in double quotes, and save it as UTF-8",
                 "utf-8") as f:
        raw, before = [], []  # lines of the record at hand, and up to the header

        def lines():
            for line in itertools.chain(before, f):
                raw.append(line)
                yield line.removeprefix("\ufeff")  # Excel's mark of UTF-8

        while not "".join(before).strip() and (line := f.readline()):
            before.append(line)
        start = "".join(before)
        bare = NO_HEADER.match(start)
        delimiter = bare[1] if bare else max("\t,;|" if tabs else ",\t;|", key=start.count)
        plain = delimiter == "\t" and file.suffix.lower() != ".csv"  # tabs stand without quotes
        dialect = {"delimiter": delimiter, "strict": True,
                   "quoting": csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL}
        table, names = csv.reader(lines(), **dialect), None
        try:
            for fields in table:
                text = "".join(raw)
                raw.clear()
                if names is None and fields:
                    names = ["image", "caption"] if bare else [
                        name.strip() if name not in fields[:i] else f"{name} {i}"
                        for i, name in enumerate(fields)]
                    yield "" if bare else text, names, dialect
                    if not bare:
                        continue
                if fields and bare:
                    fields[0] = re.sub(r"#\d+$", "", fields[0])
                yield text, fields, dialect
        except csv.Error as error:
            line, opened = table.line_num - len(raw), None  # where the quote that is open began
            for number, text in enumerate(raw, line + 1):
                if text.count('"') % 2:
                    opened = None if opened else number
            said = f"; the quote that opens in line {opened} is not closed" if opened else ""
            raise ValueError(f"line {opened or line + 1}: {error}{said}") from None


def _csv_line(fields, **dialect):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n", **dialect).writerow(fields)
    return line.getvalue()


@contextlib.contextmanager
def _opened(file, what, advice, utf_8="utf-8-sig"):
    """A text file, UTF-8 or with the mark of UTF-16."""
    with parsing(file, what, advice):
        wide = _start(file).startswith((b"\xff\xfe", b"\xfe\xff"))
        with open(file, encoding="utf-16" if wide else utf_8, newline="") as f:
            yield f


class Json(Lines):
    """An object a line, or an array of objects."""

    def __init__(self, parts):
        super().__init__(parts)
        if self.suffix == ".json":
            self.head, self.between, self.tail = "[\n", ",", "]\n"

    def rows(self, columns=()):
        for part in self.parts:
            with _opened(part, "UTF-8 text", "save it as UTF-8") as f:
                found = _document(part, f)
                for line in filter(str.strip, f) if found is None else found:
                    row = _json(line) if isinstance(line, str) else line
                    text = line if found is None else None
                    yield text, row if isinstance(row, dict) else "no JSON object"

    def line(self, row, column):
        text = json.dumps(row, ensure_ascii=False)
        return json.dumps(row) if re.search("[\ud800-\udfff]", text) else text


def _document(file, f):
    """The list that a file `f` is, or holds alone; None for one with an object a line."""
    start = f.read(64).lstrip()
    f.seek(0)
    if not (start.startswith("[") or file.suffix.lower() == ".json"):
        return None
    content = _json(f.read())
    f.seek(0)
    if isinstance(content, dict):
        lists = [name for name, value in content.items() if isinstance(value, list) and value]
        if len(lists) > 1:
            raise InputError(f"{file} is an object with the lists {', '.join(lists)}; make it an "
                             "array of objects, each with an image and its captions")
        content = content[lists[0]] if lists else [content]
    return content


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- shards --------------------------------------------------------------------------------------


class Shards(Lines):
    """Tars, or folders of loose files, by webdataset's rule: a key goes up to the first dot. Where
    what follows is no ending that is known, up to the last one."""

    head = "shard,key,caption\n"

    def __init__(self, parts):
        super().__init__(parts)
        self.suffix = ".csv"

    def rows(self, columns=()):
        unknown, found = Counter(), False
        for part in self.parts:
            samples = {}  # key with its folders, and how often it was there: {ending: Member}
            for name, member in _loose(part) if part.is_dir() else _members(part):
                folder, _, base = name.rpartition("/")
                for key, _, ending in (base.partition("."), base.rpartition(".")):
                    kind = "image" if ending.lower() in IMAGES else ending.lower()
                    if key and kind in ("image", "txt", "json"):
                        again = 0
                        while kind in samples.setdefault((folder, key, again), {}):
                            again += 1
                        samples[folder, key, again][kind] = member
                        break
                else:
                    unknown[ending] += 1
            for (_, key, _), files in samples.items():
                if part.is_dir() and "image" not in files and key.endswith("_stats"):
                    continue  # img2dataset's own notes
                found = True
                yield None, _sample(part.name, key, files)
        if unknown and not found:
            raise InputError(f"{self.parts[0]} holds files that end in "
                             f"{', '.join(sorted(unknown))}; needed are KEY.jpg (or .png, .webp, "
                             "...) with KEY.txt or KEY.json")

    def line(self, row, column):
        caption = cell(row, column)
        caption = caption if isinstance(caption, str) else json.dumps(caption, ensure_ascii=False)
        return _csv_line([row["shard"], row["key"], caption])


def _sample(shard, key, files):
    row = {"key": key, "image": files.get("image"), "caption": None, "shard": shard}
    if "json" in files:
        about = _json(files["json"].read())
        row = row | about | {"key": key, "image": row["image"], "shard": shard} if isinstance(
            about, dict) else row
    if "txt" in files:
        row["caption"] = files["txt"].read().decode(errors="replace")
    return row


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


# ---- columns -------------------------------------------------------------------------------------


class Columns:
    """Parquet or Arrow files, their types brought together; copied as one Parquet file."""

    suffix = ".parquet"

    def __init__(self, parts):
        try:
            import pyarrow as pa
            from pyarrow import dataset
        except ImportError:
            raise InputError(f"{parts[0]} needs the package pyarrow: pip install pyarrow") from None
        form, schemas = "ipc" if _start(parts[0]).startswith(b"ARROW1") else "parquet", []
        for part in parts:
            with parsing(part, f"a {'Parquet' if form == 'parquet' else 'Arrow'} file",
                         "write it anew"):
                schemas.append(dataset.dataset([part], format=form).schema)
                try:
                    self.schema = pa.unify_schemas(schemas, promote_options="permissive")
                except pa.ArrowException as error:
                    raise InputError(f"{part}: its columns do not fit those of {parts[0]} "
                                     f"({error}); write them with the same types") from None
        self.data = dataset.dataset(parts, self.schema, form)

    def batches(self, columns=None, **size):
        for fragment in self.data.get_fragments():
            with parsing(fragment.path, "a whole file of columns", "write it anew"):
                yield from fragment.to_batches(self.schema, columns, use_threads=False, **size)

    def rows(self, columns=()):
        names = [name for column in columns for name in matching(self.schema.names, column)]
        known = all(matching(self.schema.names, column) for column in columns)
        for batch in self.batches(names if known else None, batch_size=256):
            yield from ((None, row) for row in batch.to_pylist())

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
