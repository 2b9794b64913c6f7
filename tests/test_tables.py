"""Tables of images and captions: columns, odd and broken files. Formats: test_cleaned.py."""

import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cleaned import write_tar
from test_prepare import as_csv, jpeg, lines, put

from dataset import prepare_pairs
from utils.cleaning.source import rows_of
from utils.cleaning.tables import read_rows, table_of
from utils.errors import InputError

IMAGES = [jpeg(i, size=(16, 16)) for i in range(5)]


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
    table = pa.table({"jpg": [jpeg(0, "PNG"), *IMAGES[1:], IMAGES[2], b"no image", None],
                      "alt": [[f"Row {i}", " ", f"Row {i}!"] for i in range(7)] + [["x"]],
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
    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"]}), source)
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
    rng = random.Random(seed)
    whole = write_tar(tmp_path / "good.tar", [
        (f"{i:05d}.{ending}", data) for i in range(3) for ending, data in (
            ("jpg", IMAGES[i]), ("txt", b"a"), ("json", b'{"width": 3}'))]).read_bytes()
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
