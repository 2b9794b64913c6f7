"""A person's table through prepare_pairs.py and find_noise.py: what comes back, in every format."""

import csv
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from test_prepare import as_csv, jpeg, lines, put, tree

import find_noise
from data import all_pairs
from dataset import prepare_karpathy, prepare_pairs
from params import parse_args
from utils.cleaning.captions import captions_in, one_line, with_only
from utils.cleaning.source import rows_of, source_of
from utils.cleaning.tables import Json, read_rows, table_of
from utils.errors import InputError
from utils.reading.layout import image_names, read_captions, read_ids

COUNT = 24
WRONG = {3: [0], 7: [1], 11: [0, 1], 12: [1], 15: [0], 20: [0, 1]}  # places of wrong captions
RIGHT = {i: [c for c in (0, 1) if c not in WRONG.get(i, [])] for i in range(COUNT)}


def captions(i):
    """Two captions of image i, each with the number of the image that it is right for."""
    return [f"thing {i + 5 * (c in WRONG.get(i, [])):03d}, {'çé'[c]} \"{c}\"" for c in (0, 1)]


def features(model, pairs, *_, **__):
    """Stands in for the model: what names the same number is alike."""
    rng = np.random.default_rng(0)
    place = torch.from_numpy(rng.normal(size=(100, 32))).float()
    number = [int(re.search(r"\d+", name)[0]) for name in pairs.images.names]
    named = dict(zip(pairs.text_of, (int(re.search(r"\d+", c)[0]) for c in pairs.captions),
                     strict=True))
    return (F.normalize(place[number], dim=1),
            F.normalize(place[[named[k] for k in range(len(named))]] + .1, dim=1))


@pytest.fixture
def judged(monkeypatch):
    """The numbers of pairs that were judged."""
    seen = []
    monkeypatch.setattr(sys.modules[find_noise.judge_pairs.__module__], "embed_pairs",
                        lambda model, pairs, *a, **k: seen.append(len(pairs)) or features(
                            model, pairs))
    return seen


def prepare(table, root, *more):
    prepare_pairs.main(["--pairs", str(table), "--root", str(root), *map(str, more)])


def find(root, out, *more):
    find_noise.main(["--dataset_root", str(root), "--vision_model", "tiny", "--num_workers", "0",
                     "--device", "cpu", "--out", str(out), "--recipe", "paper", "--batch_size",
                     "200", *map(str, more)])
    with open(out / "suspicious_pairs.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def refused(function, *args):
    """The one line on which a command ends."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2


# ---- formats: each writes a table of `captions` and returns its path -----------------------------


def files(folder):
    return [put(folder / f"{i:03d}.jpg", jpeg(i, size=(40, 40))).name for i in range(COUNT)]


def delimited(folder, name, rows, **dialect):
    with open(folder / name, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, **dialect).writerows(rows)
    return folder / name


def rows(folder, part=range(COUNT)):
    """[[name, caption]] of two captions an image."""
    names = files(folder)
    return [[names[i], caption] for i in part for caption in captions(i)]


def csv_lines(folder):
    return delimited(folder, "t.csv", [["image", "caption"], *rows(folder)], delimiter="\t")


def csvs(folder):
    """Of two files with other orders of columns, with lists of captions."""
    cells = [[name, json.dumps(captions(i)), i] for i, name in enumerate(files(folder))]
    delimited(folder, "0.csv", [["image", "caption", "id"], *cells[:12]], delimiter=";")
    delimited(folder, "1.csv", [["id", "caption", "image"], *(row[::-1] for row in cells[12:])],
              delimiter=";")
    return f"{folder}/*.csv"


def tsvs(folder):
    """Of two files, with quotes that are text."""
    for part in (range(12), range(12, COUNT)):
        put(folder / f"{part[0]:02d}.tsv", "caption\timage\n" + "".join(
            f"{caption}\t{name}\n" for name, caption in rows(folder, part)))
    return f"{folder}/*.tsv"


def jsonl(folder):
    return put(folder / "t.jsonl", "".join(
        json.dumps({"image": name, "caption": ["", *captions(i)], "n": i}) + "\n\n"
        for i, name in enumerate(files(folder))))


def json_array(folder):
    return put(folder / "t.json", json.dumps(
        [{"image": name, "caption": captions(i)} for i, name in enumerate(files(folder))],
        indent=1))


def parquet(folder, images=None):
    table = pa.table({"image": images or files(folder),
                      "caption": [captions(i) for i in range(COUNT)],
                      "time": pa.array(range(COUNT), pa.timestamp("ns"))})
    pq.write_table(table, folder / "t.parquet", row_group_size=5)
    return folder / "t.parquet"


def parquet_bytes(folder):
    return parquet(folder, [jpeg(i, size=(40, 40)) for i in range(COUNT)])


def parquet_bytes_in_structs(folder):
    return parquet(folder, [{"bytes": jpeg(i, size=(40, 40)), "path": f"{i:03d}.jpg"}
                            for i in range(COUNT)])


def parquets(folder):
    """Of two files with other orders and types of columns."""
    one = pa.table({"image": files(folder)[:12], "caption": [captions(i) for i in range(12)],
                    "note": pa.array([None] * 12, pa.null())})
    two = pa.table({"note": ["x"] * 12, "image": pa.array(files(folder)[12:], pa.large_string()),
                    "caption": pa.array([captions(i) for i in range(12, COUNT)],
                                        pa.large_list(pa.string()))})
    (folder / "data").mkdir()
    pq.write_table(one, folder / "data/0.parquet")
    pq.write_table(two, folder / "data/1.parquet")
    return folder / "data"


def write_tar(path, members):
    """Write a tar of (name, content) in this order; returns its path."""
    with tarfile.open(path, "w") as f:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            f.addfile(info, io.BytesIO(content))
    return path


def samples(ending=""):
    """[(name, content)] of a shard whose captions end in `ending`."""
    found = []
    for i in range(COUNT):
        name = f"v1.2_{i:03d}" if i % 2 else f"{i:03d}"
        told = [caption + ending for caption in captions(i)]
        found += [(f"{name}.jpg", jpeg(i, size=(40, 40))),
                  (f"{name}.json", json.dumps({"caption": told}).encode())]
    return found


def tar(folder):
    return write_tar(folder / "t.tar", samples())


def loose(folder):
    """As img2dataset writes files, captions in .json and .txt, with its notes beside them."""
    for i in range(COUNT):
        place = folder / f"{i // 10:05d}"
        put(place / f"{i:03d}.jpg", jpeg(i, size=(40, 40)))
        put(place / f"{i:03d}.json", json.dumps({"caption": captions(i), "key": "other"}))
        if i % 5 == 4:
            put(place / f"{i:03d}.txt", json.dumps(captions(i)))
    put(folder / "00000_stats.json", "{}")
    return folder


def tars(folder):
    """Of two shards, with a file of no concern."""
    write_tar(folder / "00000.tar", samples()[:14])
    write_tar(folder / "00001.tar", samples()[14:])
    put(folder / "00000.parquet", "of no concern")
    return folder


SHARDS = [tar, tars, loose]
HAVE_BYTES = [parquet_bytes, parquet_bytes_in_structs, *SHARDS]
FORMATS = [csv_lines, csvs, tsvs, jsonl, json_array, parquet, parquets, *HAVE_BYTES]


def pairs_of(table, image="image"):
    """[(image, caption)] of a table as a person would read them."""
    return [(row[image], text) for row in read_rows(table, (image, "caption"))
            for _, text in captions_in(row["caption"])]


def other_columns(path):
    """Rows of a table without their captions; in Parquet with the types of their values."""
    table = table_of(path)
    if table.suffix == ".parquet":
        return list(zip(*table.data.to_table().drop_columns("caption").columns, strict=True))
    return [{**row, "caption": None} for row in table.rows()]


@pytest.mark.parametrize("form", FORMATS)
def test_every_table_comes_back_without_its_wrong_captions(tmp_path, judged, capsys, form):
    table = form(put(tmp_path / "in/note", "").parent)
    root = tmp_path / os.fsdecode(b"caf\xe9")  # not UTF-8
    before = tree(tmp_path / "in")
    prepare(table, root)
    assert "left out" not in capsys.readouterr().out and tree(tmp_path / "in") == before
    for split in ("train", "dev", "test"):  # each caption with the image of its row
        texts = read_captions(root / f"annotations/scan_split/{split}_caps.txt")
        names = image_names(root, "pairs", read_ids(root, split, len(texts), None, "caps"))
        numbers = rows_of(root, [split])[:, 0] * COUNT // source_of(root).rows
        for text, name, i in zip(texts, names, numbers, strict=True):
            assert text in captions(i)
            assert (root / "images" / name).read_bytes() == jpeg(i, size=(40, 40))

    found = find(root, tmp_path / "out", "--write_clean", tmp_path / "clean")
    assert judged[0] == len(found) == 2 * COUNT  # dev and test too
    wrong = [captions(i)[c] for i, places in WRONG.items() for c in places]
    assert {row["caption"] for row in found[: len(wrong)]} == set(wrong)
    if form is jsonl:  # the place in the list is said
        assert all(captions(int(row["row"]))[int(row["place"]) - 1] == row["caption"]
                   for row in found)
    cleaned = tmp_path / "clean" / f"cleaned{table_of(table).suffix}"
    right = [captions(i)[c] for i in range(COUNT) for c in RIGHT[i]]
    found = pairs_of(cleaned, image="key" if form in SHARDS else "image")
    assert [caption for _, caption in found] == right
    if form in SHARDS:
        assert [key[-3:] for key, _ in found] == [f"{i:03d}" for i in range(COUNT)
                                                  for _ in RIGHT[i]]
    else:  # with all columns and, in Parquet, types
        everything = pairs_of(table)
        assert all(pair in everything for pair in found)
        originals, copies = other_columns(table), other_columns(cleaned)
        assert len(copies) > 20 and all(row in originals for row in copies)
        if form in (parquet, *HAVE_BYTES):
            assert pq.read_schema(cleaned).equals(pq.read_schema(table), check_metadata=True)
    kept = sum((lines(tmp_path / "clean", f"{split}_caps.txt")
                for split in ("train", "dev", "test")), [])
    assert sorted(kept) == sorted(right)
    if form not in HAVE_BYTES:  # it can be prepared and cleaned again, and nothing comes back in
        find(tmp_path / "clean", tmp_path / "out", "--write_clean", tmp_path / "again",
             "--keep_above", 0)
        assert pairs_of(tmp_path / "again" / cleaned.name) == found


@pytest.mark.parametrize("form", FORMATS)
def test_rows_read_are_used_or_listed(tmp_path, form):
    table = form(put(tmp_path / "in/note", "").parent)
    for path in (tmp_path / "in").rglob("00[29].jpg"):
        path.unlink()
    prepare(table, tmp_path / "mine")
    used = {int(line.split()[0]) for split in ("train", "dev", "test")
            for line in lines(tmp_path / "mine", f"{split}_rows.txt")}
    listed = {int(row["row"]) for row in
              csv.DictReader(lines(tmp_path / "mine", "unusable_rows.csv"))}
    read = source_of(tmp_path / "mine").rows
    assert used | listed == set(range(read)) and not used & listed
    assert bool(listed) == (form not in (parquet_bytes, parquet_bytes_in_structs, tar, tars))
    assert read == COUNT * (2 if form in (csv_lines, tsvs) else 1)


def test_half_a_character_is_no_trap(tmp_path, judged):
    """No UTF-8 holds it."""
    prepare(write_tar(tmp_path / "t.tar", samples("\ud83d")), tmp_path / "mine")
    find(tmp_path / "mine", tmp_path / "out", "--write_clean", tmp_path / "clean",
         "--keep_above", 0)
    cleaned = pairs_of(tmp_path / "clean/cleaned.csv", image="key")
    assert [caption for _, caption in cleaned] == [
        f"{caption}?" for i in range(COUNT) for caption in captions(i)]


# ---- a table that is not what it was -------------------------------------------------------------

CHANGES = {"re-sorted": lambda text: "\n\n".join(reversed(text.split("\n\n"))),
           "row added": lambda text: text + '{"image": "000.jpg", "caption": "thing 000 again"}\n',
           "other image": lambda text: text.replace('"000.jpg"', '"001.jpg"'), "gone": None}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_table_is_an_error_before_anything_is_judged(tmp_path, judged, capsys, change):
    table = jsonl(tmp_path)
    prepare(table, tmp_path / "mine")
    before = table.read_text()
    table.write_text(change(before)) if change else table.unlink()
    refused(find, tmp_path / "mine", tmp_path / "out", "--write_clean", tmp_path / "clean")
    assert ("t.jsonl has changed since" if change else "does not exist") in capsys.readouterr().err
    assert not judged and not (tmp_path / "clean").exists()
    table.write_text(before)
    find(tmp_path / "mine", tmp_path / "out", "--write_clean", tmp_path / "clean")
    assert (tmp_path / "clean/cleaned.jsonl").exists()


def test_a_copy_that_is_not_right_leaves_nothing_and_blocks_nothing(tmp_path, judged, capsys,
                                                                    monkeypatch):
    table = jsonl(tmp_path)
    prepare(table, tmp_path / "mine")
    copy, broken = Json.copy, {2: [1, 2]}

    def wrong(table, target, column, keep):
        copy(table, target, column, {**keep, **broken})

    options = tmp_path / "mine", tmp_path / "out", "--write_clean", tmp_path / "clean"
    for broken in ({3: {1: ""}}, {4: {}}, {11: [1]}):  # noqa: B007
        with monkeypatch.context() as patch:
            patch.setattr(Json, "copy", wrong)
            refused(find, *options)
        assert "would not hold the pairs that are kept" in capsys.readouterr().err
        assert not list(tmp_path.glob("*clean*"))
    find(*options)


def test_types_that_cannot_be_one_are_refused_when_preparing(tmp_path, capsys):
    for number, values in enumerate((["a"], [1])):
        pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["x"], "note": values}),
                       tmp_path / f"{number}.parquet")
    refused(prepare, f"{tmp_path}/*.parquet", tmp_path / "mine")
    error = capsys.readouterr().err
    assert "1.parquet is not a file with columns of the same types as" in error and "note" in error
    delimited(tmp_path, "0.csv", [["image", "caption", "note"]])
    delimited(tmp_path, "1.csv", [["image", "caption"]])
    refused(prepare, f"{tmp_path}/*.csv", tmp_path / "mine")
    assert "1.csv has other columns than" in capsys.readouterr().err


def test_what_was_not_judged_is_said(tmp_path, judged, capsys):
    """Scores are of unchecked captions, which matters where many captions are wrong."""
    table = jsonl(tmp_path)
    prepare(table, tmp_path / "mine")
    assert "No caption was checked. If some are wrong, so are some of dev and test" in (
        capsys.readouterr().out)
    n = len(lines(tmp_path / "mine", "train_caps.txt"))
    np.savez(tmp_path / "w.npz", w=np.ones((1, n)))
    find(tmp_path / "mine", tmp_path / "out", "--score", "npc", "--weights", tmp_path / "w.npz",
         "--write_clean", tmp_path / "clean")
    out = capsys.readouterr().out
    assert "Only the training split is judged, neither dev nor test." in out
    share = float(re.search(r"noise share: ([\d.]+)", out)[1])
    assert share > 5 and "every score on them is a score of such captions" in out
    assert "8 captions of dev and test were not judged" in out


def test_a_shard_loses_no_sample(tmp_path):
    names = ["v1.2_001", "v002", "a.b/c.d.003", "004.x", "004.x"]
    table = write_tar(tmp_path / "t.tar", [
        (f"{name}.{ending}", data) for i, name in enumerate(names)
        for ending, data in (("JPG", jpeg(i)), ("txt", b"thing"))])
    rows = list(read_rows(table, ("key", "image", "caption")))
    assert [row["key"] for row in rows] == ["v1.2_001", "v002", "c.d.003", "004.x", "004.x"]
    assert [row["image"].read() for row in rows] == [jpeg(i) for i in range(5)]
    assert all(row["caption"] == "thing" for row in rows)
    write_tar(tmp_path / "u.tar", [(f"1.{ending}", b"") for ending in ("jxl", "caption", "jxl")])
    with pytest.raises(InputError, match="u.tar holds files that end in caption, jxl; needed"):
        list(read_rows(tmp_path / "u.tar", ("image", "caption")))


# ---- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, found", [
    ("a dog", [(0, "a dog")]), ("[]", []), (None, []), (3, []),
    ('["a dog", "a cat"]', [(0, "a dog"), (1, "a cat")]),
    (' ["a dog", "", null, "a cat"]', [(0, "a dog"), (3, "a cat")]),
    (["a", None, 3, " b "], [(0, "a"), (3, "b")])])
def test_captions_in_a_cell(value, found):
    assert captions_in(value) == found
    assert with_only(value, [place for place, _ in found]) is value
    for place, caption in found:
        left = with_only(value, [place])
        assert type(left) is type(value) and [c for _, c in captions_in(left)] == [caption]


@pytest.mark.parametrize("value, reason", [
    ("['a dog', 'a cat']", "looks like a list; write it as JSON"),  # as pandas writes it
    ("['a dog' 'a cat']", "looks like a list"),  # as numpy writes it
    ("[a dog]", "looks like a list"), ('["a", exit()]', "looks like a list"),
    *((value, "is a structure") for value in (
        {"raw": "a dog", "id": 1}, [{"raw": "a dog", "id": 1}], '[["a dog"], "a cat"]'))])
def test_cells_that_are_refused(value, reason):
    with pytest.raises(ValueError, match=reason):
        captions_in(value)


@pytest.mark.parametrize("raw, plain", [
    (" A dog\truns\r\n fast . ", "A dog runs fast ."), ("a\u2028b\x0bc\x85d\0e", "a b c d e"),
    ("half \ud83d character", "half ? character"), ("\t\n ", ""),
    *((text, "") for text in ("&nbsp;", "&amp;nbsp; ", "\x1b[0m", "\u200b\u200d", "\x07",
                              "&#8203;"))])
def test_a_caption_is_one_line_and_none_where_clip_empties_it(raw, plain):
    assert one_line(raw) == plain
    assert one_line(f"{raw}a") != ""


# ---- what was seen, and why ----------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    "http://a.org/1.jpg\ta dog", "https://a.org/x?id=3\ta dog", "a dog\thttp://a.org/1.jpg",
    "a dog\thttp://a.org/1.jpg\tdog,pet\t/m/0bt9lr\t0.9,0.8", 'a dog,"https://a.org/1.jpg"'],
    ids=["CC12M", "CC12M, other names", "CC3M", "CC3M with labels", "csv"])
def test_a_list_of_urls_without_a_header_is_refused(tmp_path, capsys, line):
    """Whatever the order of its columns, and although images of these numbers are at hand."""
    for i in (1, 2, 4):
        put(tmp_path / f"{i}.jpg", jpeg(i))
    table = put(tmp_path / ("t.tsv" if "\t" in line else "t.csv"), f"{line}\n" * 4)
    for more in ((), ("--image_column", "a dog", "--caption_column", "a dog")):
        refused(prepare, table, tmp_path / "mine", *more)
        assert "has a URL in its first line" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name, between", [("results.token", "#0\t"), ("my t.csv", ",")])
def test_a_table_of_images_without_a_header_is_refused_with_the_command_that_writes_one(
        tmp_path, capsys, name, between):
    table = put(tmp_path / name, "".join(f"{image}{between}thing\n" for image in files(tmp_path)))
    refused(prepare, table, tmp_path / "mine")
    command = capsys.readouterr().err.split("numbers behind images: ")[1]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    prepare(tmp_path / command.split()[-1], tmp_path / "mine")
    assert source_of(tmp_path / "mine").rows == COUNT
    assert lines(tmp_path / "mine", "unusable_rows.csv") == ["row,reason,detail"]


def test_compressed_tars_are_refused_until_gunzip_has_unpacked_them(tmp_path, capsys):
    table = tar(tmp_path)
    (tmp_path / "in").mkdir()
    shutil.copy(table, tmp_path / "in/1.tar")  # which alone would be half of the pairs
    for name in ("0.tgz", "0.tar.gz"):
        (tmp_path / "in" / name).write_bytes(gzip.compress(table.read_bytes()))
        refused(prepare, tmp_path / "in", tmp_path / "mine")
        assert f"{name} is compressed; unpack it, and all others beside it, with gunzip" in (
            capsys.readouterr().err)
        if name == "0.tgz":
            (tmp_path / "in" / name).unlink()
    subprocess.run(["gunzip", tmp_path / "in/0.tar.gz"], check=True)
    prepare(tmp_path / "in", tmp_path / "mine")
    assert source_of(tmp_path / "mine").rows == 2 * COUNT


@pytest.mark.parametrize("asked, there", [
    ("A\\1.jpg", "A/1.jpg"), ("a/1.JPG", "A/1.jpg"), ("A/1.jpeg", "A/1.jpg"), ("1.jpg", "A/1.jpg"),
    ("A/1", "A/1.jpg"), ("B/1.jpg", "A/1.jpg")])
def test_an_image_that_would_be_there_under_another_name_is_named(tmp_path, capsys, asked, there):
    put(tmp_path / "A/1.jpg", jpeg(1))
    table = delimited(tmp_path, "t.csv", [["image", "caption"], [asked, "x"]])
    refused(prepare, table, tmp_path / "mine")
    assert (f"1 rows: image does not exist (row 0: {tmp_path}/{asked}; there is {tmp_path}/{there})"
            in capsys.readouterr().err)


@pytest.mark.parametrize("asked, there", [
    ("cafe\u0301.jpg", "caf\xe9.jpg"), ("caf\xe9.jpg", "cafe\u0301.jpg"), (" 1.jpg", " 1.jpg"),
    ("1.jpg", " 1.jpg"), (" 1.jpg", "1.jpg"), ("a/1.jpg ", "a/1.jpg")])
def test_an_image_of_another_spelling_is_taken_where_one_file_fits(tmp_path, capsys, asked, there):
    """Unicode forms and blanks at the ends, in the table and in image_name.txt."""
    put(tmp_path / there, jpeg(7))
    names = files(tmp_path)
    table = delimited(tmp_path, "t.csv", [["image", "caption"], [asked, "odd"], *(
        [name, "x"] for name in names)])
    prepare(table, tmp_path / "r")
    assert "left out" not in capsys.readouterr().out
    (place,) = [p for p in (tmp_path / "r/images").rglob("*") if p.is_file()
                and p.read_bytes() == jpeg(7) and "0" not in p.name]
    assert str(place.relative_to(tmp_path / "r/images")) == asked.strip()
    place.rename(tmp_path / "r/images" / there)
    pairs = all_pairs(parse_args("search", ["--dataset_root", str(tmp_path / "r"), "q"]), None)
    name = pairs.images.names[pairs.image_of[pairs.captions.index("odd")]]
    assert name == there


def test_an_image_of_two_spellings_is_left_out(tmp_path, capsys):
    for name in ("1.jpg", " 1.jpg", "caf\xe9.jpg", "cafe\u0301.jpg"):
        put(tmp_path / name, jpeg(1))
    table = delimited(tmp_path, "t.csv", [["image", "caption"], [" 1.jpg", "x"], ["1.jpg", "y"], *(
        [name, "x"] for name in files(tmp_path))])
    prepare(table, tmp_path / "mine")
    assert lines(tmp_path / "mine", "unusable_rows.csv")[1:] == [
        "0,image name fits several files,\"' 1.jpg', '1.jpg'\""]


def test_why_an_image_cannot_be_read_is_listed(tmp_path, monkeypatch):
    """Also metadata of a PNG that Pillow refuses although its pixels are whole."""
    notes, noise = PngImagePlugin.PngInfo(), io.BytesIO()
    notes.add_itxt("workflow", "x" * 3_000_000, zip=True)
    names = files(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / names[0], "PNG", pnginfo=notes)
    put(tmp_path / names[1], "<html>404</html>")
    put(tmp_path / names[2], jpeg(1, size=(2, 3000)))
    Image.effect_noise((64, 64), 50).save(noise, "JPEG")
    put(tmp_path / names[3], noise.getvalue()[:-500])
    with Image.open(tmp_path / names[3]) as cut:
        assert cut.size == (64, 64)  # only decoding shows that it is cut short
    put(tmp_path / names[4], jpeg(1, size=(64, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 199)  # fewer: a decompression bomb
    prepare(delimited(tmp_path, "t.csv", [["image", "caption"], *([n, "x"] for n in names)]),
            tmp_path / "mine")
    reasons = ["Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
               "no image that Pillow knows", "2 x 3000 pixels are too thin", "image file is trunc",
               "Image size (12800 pixels) exceeds limit of"]
    listed = csv.reader(lines(tmp_path / "mine", "unusable_rows.csv")[1:])
    for row, reason, name in zip(listed, reasons, names, strict=False):
        assert row[:2] == [str(names.index(name)), "image cannot be read"]
        assert row[2].startswith(f"{tmp_path / name}: {reason}")
    assert len(lines(tmp_path / "mine", "unusable_rows.csv")) == 6


# ---- a split of one's own ------------------------------------------------------------------------


def test_a_column_says_the_split(tmp_path, capsys):
    said = ["Train", "restval", "val", "dev", "test", "validation", "unknown", ""]
    table = delimited(tmp_path, "t.csv", [["image", "caption", "part"], *(
        [name, f"thing {i}", said[i % 8]] for i, name in enumerate(files(tmp_path)))])
    for option in ("--train", "--dev", "--test"):
        refused(prepare, table, tmp_path / "mine", "--split_column", "part", option, "3")
        assert "leave out --train, --dev and --test" in capsys.readouterr().err
    prepare(table, tmp_path / "mine", "--split_column", "part")
    of = {"train": {0, 1}, "dev": {2, 3, 5}, "test": {4}}
    for split, kinds in of.items():
        assert {int(line.split()[1]) % 8 for line in lines(tmp_path / "mine", f"{split}_caps.txt")
                } == kinds
    listed = lines(tmp_path / "mine", "unusable_rows.csv")
    assert listed[1] == '6,"split is none of train, dev, test",unknown' and len(listed) == 7


def test_everything_may_be_in_one_split(tmp_path, judged, capsys):
    """And a row without its split is listed; the table has not changed by that."""
    rows = [{"image": name, "caption": captions(i), "split": "test"}
            for i, name in enumerate(files(tmp_path))]
    table = put(tmp_path / "t.json", json.dumps([*rows, {"image": "000.jpg", "caption": "x"}]))
    prepare(table, tmp_path / "mine", "--split_column", "split")
    assert lines(tmp_path / "mine", "unusable_rows.csv")[1:] == [f"{COUNT},no 'split',"]
    find(tmp_path / "mine", tmp_path / "out", "--write_clean", tmp_path / "clean")
    assert judged == [2 * COUNT]
    assert [c for _, c in pairs_of(tmp_path / "clean/cleaned.json")] == [
        captions(i)[c] for i in range(COUNT) for c in RIGHT[i]]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_a_file_like_karpathy_s_becomes_a_table_by_the_command_that_is_advised(tmp_path, capsys):
    images = [{"filename": name, "split": "train", "sentences": [{"raw": c} for c in captions(i)]}
              for i, name in enumerate(files(tmp_path))]
    source = put(tmp_path / "k.json", json.dumps({"images": images, "dataset": "flickr8k"}))
    refused(prepare, source, tmp_path / "r")
    assert "is one object, with images, dataset; give an array" in capsys.readouterr().err
    refused(prepare_karpathy.main, ["--json", str(source), "--root", str(tmp_path / "r")])
    program = re.search(r"--split_column split with what jq '(.*)' makes", capsys.readouterr().err)
    table = put(tmp_path / "t.json", subprocess.check_output(["jq", program[1], source]))
    prepare(table, tmp_path / "r", "--split_column", "split")
    assert len(lines(tmp_path / "r", "train_caps.txt")) == 2 * COUNT


# ---- odd and broken files -----------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [
    ("t.csv", '\ufeffimage,caption\na.jpg,"two\nlines, ""quoted"""\n b.jpg, plain \n'),
    ("t.csv", 'image;caption\na.jpg;"a;b"\nb.jpg;a, b\n'),
    ("t.tsv", 'caption\timage\na "dog"\ta.jpg\n"a" cat\tb.jpg\n'),
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
    images = [jpeg(i, "JPEG" if i else "PNG") for i in range(5)]
    table = pa.table({"jpg": [*images, images[2], b"no image", None],
                      "alt": [[f"Row {i}", " ", f"Row {i}!"] for i in range(7)] + [["x"]],
                      "caption": ["?"] * 8})
    pq.write_table(table, tmp_path / "t.parquet")
    refused(prepare, tmp_path / "t.parquet", tmp_path / "r")
    assert "no column 'image', only jpg, alt, caption; give --image_c" in capsys.readouterr().err
    prepare(tmp_path / "t.parquet", tmp_path / "r", "--image_column", "jpg", "--caption_column",
            "alt")
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
            ("jpg", jpeg(i)), ("txt", b"a"), ("json", b'{"width": 3}'))]).read_bytes()
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
