"""Tables of images and captions in every format: read alike, prepared alike, copied whole but for
some rows."""

import io
import json
import os
import random
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import as_csv, jpeg, lines, put, tree

from dataset import prepare_pairs
from utils.cleaning.source import rows_of, source_of
from utils.cleaning.tables import read_rows, table_of
from utils.errors import InputError
from utils.reading.layout import image_names, read_captions, read_ids

COUNT = 12
CAPTIONS = [f'Row {i}, "é"' for i in range(COUNT)]
IMAGES = [jpeg(i, "PNG" if i % 5 == 0 else "JPEG", size=(16, 16)) for i in range(COUNT)]


def table_rows(folder):
    """Rows with further columns, their images as files below `folder`."""
    return [{"image": str(put(folder / f"{i}.jpg", IMAGES[i])), "price": i / 4,
             "caption": CAPTIONS[i], "note": f"a\tb {i}"} for i in range(COUNT)]


def write_csv(folder):
    text = "image,price,caption,note\n" + "".join(
        ",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) + "\n"
        for row in table_rows(folder))
    return put(folder / "t.CSV", text)


def write_tsv(folder):
    text = "image\tcaption\n" + "".join(f"{row['image']}\t{row['caption']}\n"
                                        for row in table_rows(folder))
    return put(folder / "t.tsv", text)


def write_jsonl(folder):
    return put(folder / "t.jsonl", "\n".join(map(json.dumps, table_rows(folder))))


def write_parquet(folder, images=None, name="t.parquet", rows=slice(None)):
    table = pa.Table.from_pylist(table_rows(folder))
    if images is not None:
        table = table.set_column(0, "image", images)
    table = table.replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table[rows], folder / name, row_group_size=5)
    return folder / name


def write_bytes(folder):
    return write_parquet(folder, pa.array(IMAGES))


def write_structs(folder):
    return write_parquet(folder, pa.array([{"bytes": data, "path": f"{i}.jpg"}
                                           for i, data in enumerate(IMAGES)]))


def write_glob(folder):
    write_parquet(folder, pa.array(IMAGES), "0.parquet", slice(0, 7))
    write_parquet(folder, pa.array(IMAGES), "1.parquet", slice(7, None))
    return f"{folder}/*.parquet"


def members(i):
    note = {"caption": "unused" if i % 2 else CAPTIONS[i], "width": i, "key": "other"}
    files = {"jpg" if i % 3 else "png": IMAGES[i], "json": json.dumps(note).encode()}
    return files | ({"txt": CAPTIONS[i].encode()} if i % 2 else {})


def write_tar(folder, name="t.tar", numbers=range(COUNT)):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for i in numbers:
            for extension, content in members(i).items():
                info = tarfile.TarInfo(f"../deep/{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder / name


def write_tars(folder):
    write_tar(folder, "00000.tar", range(7))
    write_tar(folder, "00001.tar", range(7, COUNT))
    put(folder / "00000.parquet", "of no concern")
    return folder


def write_loose(folder):
    for i in range(COUNT):
        for extension, content in members(i).items():
            put(folder / f"{i // 7:05d}" / f"{i:05d}.{extension}", content)
    put(folder / "00000_stats.json", "{}")
    return folder


WRITERS = [write_csv, write_tsv, write_jsonl, write_parquet, write_bytes, write_structs, write_glob,
           write_tar, write_tars, write_loose]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_is_prepared_with_the_rows_that_it_came_from(tmp_path, capsys, write):
    (tmp_path / "source").mkdir()
    table, root = write(tmp_path / "source"), tmp_path / os.fsdecode(b"caf\xe9")  # not UTF-8
    before = tree(tmp_path / "source")
    prepare_pairs.main(["--pairs", str(table), "--root", str(root), "--dev", "2", "--test", "3"])
    assert "left out" not in capsys.readouterr().out and tree(tmp_path / "source") == before
    seen = []
    for split in ("train", "dev", "test"):
        captions = read_captions(root / f"annotations/scan_split/{split}_caps.txt")
        source, (numbers, places) = source_of(root), rows_of(root, [split]).T
        assert source[:4] == (str(table), "image", "caption", COUNT) and not places.any()
        assert captions == [CAPTIONS[i] for i in numbers]
        names = image_names(root, "pairs", read_ids(root, split, len(captions), 1, "caps"))
        assert [(root / "images" / name).read_bytes() for name in names] == [
            IMAGES[i] for i in numbers]
        seen += numbers.tolist()
    assert sorted(seen) == list(range(COUNT))
    assert lines(root, "unusable_rows.csv") == ["row,reason,detail"]


@pytest.mark.parametrize("write", WRITERS)
def test_copy_of_every_format_has_the_kept_rows_with_all_their_columns(tmp_path, write):
    (tmp_path / "source").mkdir()
    table, kept = write(tmp_path / "source"), [0, 4, 5, 8, 11]
    target = tmp_path / f"copy{table_of(table).suffix}"
    table_of(table).copy(target, "caption", dict.fromkeys(kept, [0]))
    if write in (write_tar, write_tars, write_loose):
        shards = {write_tar: ["t.tar"] * 5, write_tars: ["00000.tar"] * 3 + ["00001.tar"] * 2,
                  write_loose: ["00000"] * 3 + ["00001"] * 2}[write]
        assert target.read_text() == "shard,key,caption\n" + "".join(
            f'{shard},{i:05d},"Row {i}, ""é"""\n' for shard, i in zip(shards, kept, strict=True))
        return
    columns = ["image", "caption"] + ["price", "note"] * (write is not write_tsv)
    everything = list(read_rows(table, columns))
    assert list(read_rows(target, columns)) == [everything[i] for i in kept]
    if target.suffix == ".parquet":
        whole, copy = (pq.read_schema(path) for path in
                       (sorted((tmp_path / "source").glob("*.parquet"))[0], target))
        assert copy.equals(whole, check_metadata=True)


@pytest.mark.parametrize("name, text", [
    ("t.csv", '\ufeffimage,caption\na.jpg,"two\nlines, ""quoted"""\n b.jpg, plain \n'),
    ("t.csv", 'image;caption\na.jpg;"a;b"\nb.jpg;a, b\n'),
    ("t.tsv", 'caption\timage\na "dog"\ta.jpg\n"a" cat\tb.jpg\n'),
    ("t.token", 'a.jpg#0\ta "dog"\nb.jpg#1\ta cat\n'),
    ("t.jsonl", '{"image": "a.jpg", "caption": "çé \\"", "n": 1.5}\n'
                '{"caption": "\\ud83d", "image": "b.jpg", "n": null}\n'),
    ("t.json", '[\n{"image": "a.jpg", "caption": "a"},\n{"image": "b.jpg", "caption": "b"}\n]\n')])
def test_text_that_is_plainly_written_is_copied_as_it_is(tmp_path, name, text):
    source, target = put(tmp_path / name, text), tmp_path / f"copy_{name}"
    table_of(source).copy(target, "caption", {0: [0], 1: [0]})
    assert target.read_text(encoding="utf-8") == text


def test_broken_and_empty_lines_of_text_are_rows_or_none(tmp_path):
    source = put(tmp_path / "t.csv", '\n\nimage,caption,caption\r\na.jpg,"two\nlines",x\n\n'
                                     'broken\r\nb.jpg, plain ,no end of line')
    assert list(read_rows(source, ["image", "caption"])) == [
        {"image": "a.jpg", "caption": "two\nlines"}, "1 fields, but the header has 3",
        {"image": "b.jpg", "caption": " plain "}]


def test_columns_by_name_and_the_same_bytes_are_one_image(tmp_path, capsys):
    table = pa.table({"jpg": [*IMAGES[:5], IMAGES[2], b"no image", None],
                      "alt": [[c, " ", f"{c}!"] for c in CAPTIONS[:7]] + [["x"]],
                      "caption": ["?"] * 8})
    pq.write_table(table, tmp_path / "t.parquet")
    argv = ["--pairs", str(tmp_path / "t.parquet"), "--root", str(tmp_path / "r")]
    with pytest.raises(SystemExit):
        prepare_pairs.main(argv)
    assert "no column 'image', only jpg, alt, caption; give --image_c" in capsys.readouterr().err
    prepare_pairs.main([*argv, "--image_column", "jpg", "--caption_column", "alt"])
    assert lines(tmp_path / "r", "image_name.txt") == [
        "00000000.png", *(f"{i:08d}.jpg" for i in range(1, 5))]
    assert lines(tmp_path / "r", "unusable_rows.csv")[1:] == [
        "6,image cannot be read,no image that Pillow knows", "7,no image,"]
    rows = {s: rows_of(tmp_path / "r", [s]).tolist() for s in ("train", "dev", "test")}
    assert sorted(sum(rows.values(), [])) == [[i, place] for i in range(6) for place in (0, 2)]
    of_two = next(own for own in rows.values() if [2, 0] in own)
    assert [5, 0] in of_two  # both of its rows are in one split


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    source = write_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="t.parquet needs the package pyarrow: pip install"):
        list(read_rows(source, ["image"]))


def test_files_of_two_kinds_are_no_table(tmp_path):
    as_csv(tmp_path / "a.csv", [])
    put(tmp_path / "b.jsonl", "")
    with pytest.raises(InputError, match="files of several kinds"):
        list(read_rows(tmp_path / "*", ["image"]))


@pytest.mark.parametrize("seed", range(3))
def test_damaged_tars_are_read_or_one_line(tmp_path, seed):
    """Headers with random bytes and a right checksum, as a fuzzer makes them."""
    rng, whole = random.Random(seed), bytearray(write_tar(tmp_path, numbers=range(3)).read_bytes())
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.sample(headers, rng.choice([1, 2])):
            field, length = rng.choice([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1),
                                        (157, 100), (257, 8), (345, 155), (386, 97), (482, 13)])
            for _ in range(rng.choice([1, 3, length])):
                damaged[at + field + rng.randrange(length)] = rng.choice(
                    [0, 32, 48, 55, 0x80, 0xFF, *b"xgLKSD157", rng.randrange(256)])
            damaged[at + 148 : at + 156] = b" " * 8
            damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])
        path = put(tmp_path / "bad.tar", bytes(damaged[: rng.choice([len(whole), 3000])]))
        try:
            for row in read_rows(path, ["image", "caption"]):
                if not isinstance(row, str) and row["image"]:
                    row["image"].read()
        except InputError as error:
            refused += 1
            assert "bad.tar" in str(error) and "\n" not in str(error)
    assert 0 < refused < 150
