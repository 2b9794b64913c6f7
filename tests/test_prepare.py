"""The data preparation commands under dataset/, on small made files."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import run

from dataset import MSCOCO_rename, prepare_karpathy, prepare_pairs
from dataset.common import inner_name
from utils.errors import InputError
from utils.reading.layout import find_images, image_names, read_captions, read_ids

REPOSITORY = Path(__file__).resolve().parents[1]


def jpeg(shade, form="JPEG", size=(8, 8)):
    """Bytes of a small image; another shade gives other bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade * 40 % 256, 7)).save(buffer, form)
    return buffer.getvalue()


def put(path, content):
    """Write bytes or text to a path whose folders are made; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tree(folder):
    """{relative path: content} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(root, name):
    return (root / "annotations/scan_split" / name).read_text(encoding="utf-8").splitlines()


@pytest.fixture
def ok(capsys):
    """Run a command; returns what it printed."""
    def run(module, *args):
        module.main([str(a) for a in args])
        return capsys.readouterr().out
    return run


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; returns its one line on stderr."""
    def run(module, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.main([str(a) for a in args])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        return error
    return run


# ---------------------------------------------------------------- shared


def test_names_inside_a_folder():
    assert inner_name("./a//b/../c d.jpg") == "a/c d.jpg"
    for name in ("../a.jpg", "a/../../b.jpg", "/etc/a.jpg", "", ".", "a\nb.jpg", "a\rb.jpg",
                 " a.jpg", "\udcff.jpg"):
        with pytest.raises(ValueError):
            inner_name(name)


def refuse_links(*_):
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("linked", [True, False])
def test_an_image_is_placed_once_and_never_overwritten(tmp_path, monkeypatch, linked):
    """It is copied where hard links are refused."""
    if not linked:
        monkeypatch.setattr(os, "link", refuse_links)
    source, target = put(tmp_path / "s.jpg", jpeg(1)), tmp_path / "images/a/t.jpg"
    assert prepare_pairs.put_image(source, target) is True
    assert prepare_pairs.put_image(source, target) is False
    assert target.read_bytes() == jpeg(1) and os.path.samefile(source, target) == linked
    for other in (put(tmp_path / "other.jpg", jpeg(2)), jpeg(2)):
        with pytest.raises(InputError, match="not the same image"):
            prepare_pairs.put_image(other, target)
    assert target.read_bytes() == jpeg(1)
    target.unlink()
    target.symlink_to("nowhere")  # a broken link is in the way, too
    with pytest.raises(InputError, match="exists"):
        prepare_pairs.put_image(jpeg(1), target)


def test_runs_as_script_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "dataset/prepare_pairs.py", "--pairs",
                           "p.csv", "--images", "犬", "--root", "r"], cwd=tmp_path,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: --images \\u72ac is not a folder")


# ---------------------------------------------------------------- MSCOCO_rename


@pytest.mark.parametrize("where", [("images/train2014", "images/val2014"),
                                   ("train2014", "val2014"), ("images", "images")])
def test_rename(tmp_path, ok, fails, where):
    put(tmp_path / where[0] / "notes.txt", "x")
    assert "no COCO_train2014" in fails(MSCOCO_rename, "--root", tmp_path)
    put(tmp_path / where[0] / "COCO_train2014_000000000009.jpg", jpeg(1))
    put(tmp_path / where[1] / "COCO_val2014_000000000042.jpg", jpeg(2))
    before = tree(tmp_path)
    out = ok(MSCOCO_rename, "--root", tmp_path, "--dry_run")
    assert "would move 2 images" in out and "images/COCO_2014_000000000009.jpg" in out
    assert tree(tmp_path) == before
    for moved in (2, 0):
        assert f"moved {moved} images" in ok(MSCOCO_rename, "--root", tmp_path)
        assert tree(tmp_path) == {
            "images/COCO_2014_000000000009.jpg": jpeg(1),
            "images/COCO_2014_000000000042.jpg": jpeg(2), f"{where[0]}/notes.txt": b"x"}


def test_rename_continues_after_a_kill(tmp_path, ok, monkeypatch):
    for i in range(4):
        put(tmp_path / f"train2014/COCO_train2014_{i:012d}.jpg", jpeg(i))
    rename, calls = os.rename, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rename(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "rename", killed)
        MSCOCO_rename.main(["--root", str(tmp_path)])
    assert len(list(tmp_path.glob("images/*"))) == 2
    assert "moved 2 images" in ok(MSCOCO_rename, "--root", tmp_path)
    assert tree(tmp_path) == {f"images/COCO_2014_{i:012d}.jpg": jpeg(i) for i in range(4)}


def test_rename_never_overwrites(tmp_path, ok):
    """What is there already stays, and so does the second of two sources of one name."""
    for i, place in enumerate(["train2014/COCO_train2014_000000000001.jpg",
                               "val2014/COCO_val2014_000000000001.jpg",
                               "train2014/COCO_train2014_000000000002.jpg",
                               "images/COCO_2014_000000000002.jpg"]):
        put(tmp_path / place, jpeg(i))
    before = tree(tmp_path)
    out = ok(MSCOCO_rename, "--root", tmp_path)
    assert out.startswith("moved 1 images") and "left 2 images whose new name is taken" in out
    before["images/COCO_2014_000000000001.jpg"] = before.pop(
        "train2014/COCO_train2014_000000000001.jpg")
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- prepare_karpathy


def karpathy(dataset="coco", captions=5):
    """A JSON as Karpathy's, its images not in the order of imgid."""
    images = []
    for i, split in enumerate(["train", "test", "restval", "val", "train"]):
        images.append({"imgid": 4 - i, "cocoid": 100 + i, "split": split, "filepath": "val2014",
                       "filename": f"{1000 + i}.jpg",
                       "sentences": [{"raw": f" Image {i},\n caption\t{c} "}
                                     for c in range(captions)]})
        if dataset != "coco":
            del images[-1]["cocoid"], images[-1]["filepath"]
    return {"images": images, "dataset": dataset}


def test_karpathy_coco(tmp_path, ok):
    content = karpathy()
    content["images"][0]["sentences"].append({"raw": "a sixth one"})
    source, root = put(tmp_path / "c.json", json.dumps(content)), tmp_path / "r"
    put(root / "images/COCO_2014_000000000100.jpg", jpeg(1))
    out = ok(prepare_karpathy, "--json", source, "--root", root)
    assert lines(root, "train_ids.txt") == ["100", "102", "104"]
    assert lines(root, "train_caps.txt") == [f"Image {i}, caption {c}" for i in (0, 2, 4)
                                             for c in range(5)]
    assert lines(root, "dev_ids.txt") == ["103"] * 5
    assert lines(root, "test_ids.txt") == ["101"] * 5
    assert not (root / "annotations/scan_split/image_name.txt").exists()
    assert "4 of 5 images are not in" in out and "COCO_2014_000000000102.jpg" in out
    assert "1 captions beyond the first 5" in out


def test_karpathy_f30k(tmp_path, ok, fails):
    source, root = put(tmp_path / "f.json", json.dumps(karpathy("flickr30k"))), tmp_path / "r"
    for i in range(5):
        put(root / f"images/{1000 + i}.jpg", jpeg(i))
    assert "warning" not in ok(prepare_karpathy, "--json", source, "--root", root)
    assert lines(root, "image_name.txt") == [f"{1000 + i}.jpg" for i in (4, 3, 2, 1, 0)]
    captions = read_captions(root / "annotations/scan_split/train_caps.txt")
    ids = read_ids(root, "train", len(captions), 5, "train_caps.txt")
    names = image_names(root, "f30k", ids)
    for name, caption in zip(names, captions, strict=True):  # each caption is with its own image
        assert caption.startswith(f"Image {int(name[:4]) - 1000},")
    assert lines(root, "dev_ids.txt") == ["1"] * 5
    find_images(root, names)
    assert "scan_split exists already" in fails(prepare_karpathy, "--json", source, "--root", root)


@pytest.mark.parametrize("content, change, message", [
    ("coco", lambda c: c["images"][1]["sentences"][2].update(raw=" \n"), "1001.jpg has an empty"),
    ("coco", lambda c: c["images"][1]["sentences"].pop(), "1001.jpg has an empty caption or fewer"),
    ("coco", lambda c: c["images"][1].pop("split"), "'split'"),
    ("coco", lambda c: c["images"][1].update(split="holdout"), "'holdout'"),
    ("coco", lambda c: c["images"][1].update(cocoid="x7"), "'x7'"),
    ("coco", lambda c: c["images"][1].update(cocoid=-7), "image id '-7'"),
    ("coco", lambda c: c.update(dataset="flickr8k"), "neither coco nor flickr30k"),
    ("coco", lambda c: c.pop("images"), "'images'"),
    ("flickr30k", lambda c: c["images"][1].update(filename="../../evil.jpg"), "not lie inside"),
    ("flickr30k", lambda c: c["images"].append(3), "not subscriptable"),
    ("{", None, ""), ("[" * 100_000, None, ""), ('{"images": ' + "1" * 5000 + "}", None, ""),
    ("\udcff", None, ""), ("[]", None, "")], ids=lambda value: str(value)[:9])
def test_karpathy_refuses(tmp_path, fails, content, change, message):
    if change:
        content = karpathy(content)
        change(content)
        content = json.dumps(content)
    source = put(tmp_path / "c.json", content.encode(errors="surrogateescape"))
    error = fails(prepare_karpathy, "--json", source, "--root", tmp_path / "r")
    assert message in error and len(error) < 500
    assert f"{source} is not Karpathy's" in error or message == "image id '-7'"
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- prepare_pairs


def photos(folder, count=10, captions=lambda i: 2):
    """Images "sub/photo i.jpg", every third a PNG, and their rows: [(name, caption)]."""
    found = []
    for i in range(count):
        name = f"sub{i % 2}/photo {i}.{'jpg' if i % 3 else 'png'}"
        put(folder / name, jpeg(i, "JPEG" if i % 3 else "PNG"))
        found += [(name, f'Photo {i}, "caption"  {c}') for c in range(captions(i))]
    return found


def as_csv(path, found):
    quoted = ((n, c.replace('"', '""')) for n, c in found)
    return put(path, "\ufeffimage,caption\n" + "".join(f'{n},"{c}"\n' for n, c in quoted))


def own(tmp_path, count=4, **more):
    """Options that read a table of photos."""
    source = as_csv(tmp_path / "p.csv", photos(tmp_path / "photos", count, **more))
    return "--pairs", source, "--images", tmp_path / "photos", "--root", tmp_path / "r"


def check_pairs(root, num_anns, total):
    """Every caption is with its own image and no image is in two splits; returns the names."""
    seen = {}
    count = 0
    for split in ("train", "dev", "test"):
        captions = read_captions(root / f"annotations/scan_split/{split}_caps.txt")
        ids = read_ids(root, split, len(captions), num_anns, "caps")
        for name, caption in zip(image_names(root, "pairs", ids), captions, strict=True):
            assert caption.startswith(f'Photo {Path(name).stem.split()[1]}, "caption" ')
            assert seen.setdefault(name, split) == split
            count += 1
    assert count == total
    find_images(root, seen)
    return sorted(seen)


def test_pairs(tmp_path, ok):
    """Dev and test stay the same whatever --train is; images that were not drawn are not placed."""
    args, roots = [*own(tmp_path, 20), "--dev", 3, "--test", 2], {}
    for name, more, count in (("my data", (), 15), ("few", ("--train", 6), 6),
                              ("all", ("--train", 15), 15), ("seed", ("--seed", 1), 15)):
        root = roots[name] = tmp_path / name
        out = ok(prepare_pairs, *args, "--root", root, *more)
        names = check_pairs(root, 2, 2 * (5 + count))
        assert lines(root, "image_name.txt") == names and len(names) == 5 + count
        assert sorted(tree(root / "images")) == names and f"placed {5 + count} images" in out
        assert len(lines(root, "train_ids.txt")) == count
        assert len(lines(root, "dev_ids.txt")) == 6 and len(lines(root, "test_ids.txt")) == 4
        assert ("did not draw 9 images" in out) == (name == "few")
        for file in names:
            assert os.path.samefile(root / "images" / file, tmp_path / "photos" / file)
        assert f"train: {count:7} images, {2 * count:7} captions" in out
        assert f" --dataset_root {shlex.quote(str(root))} --experiments mine\n" in out
    assert tree(roots["my data"]) == tree(roots["all"])
    for name in ("dev_caps.txt", "test_caps.txt"):
        assert lines(roots["few"], name) == lines(roots["all"], name)
        assert lines(roots["seed"], name) != lines(roots["all"], name)
    source = as_csv(tmp_path / "q.csv", photos(tmp_path / "photos", 20)[::-1])
    ok(prepare_pairs, *args, "--pairs", source, "--root", tmp_path / "b")  # captions turn round
    assert lines(tmp_path / "b", "train_ids.txt") == lines(roots["all"], "train_ids.txt")


def test_pairs_varying_captions(tmp_path, ok):
    ok(prepare_pairs, *own(tmp_path, 10, captions=lambda i: 1 + i % 4))
    assert len(check_pairs(tmp_path / "r", 1, 23)) == 10
    assert len(lines(tmp_path / "r", "train_ids.txt")) > 8  # one per caption, of 8 images


def test_pairs_columns_and_places(tmp_path, ok, fails):
    found = photos(tmp_path / "disk", 4)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / found[0][0]).rename(tmp_path / "disk" / f"{found[0][0]} ")
    absolute = [(tmp_path / "r/images" / name, caption) for name, caption in found]
    source = put(tmp_path / "p.csv", as_csv(tmp_path / "q.csv", absolute).read_text().replace(
        "image,caption", "file,text"))
    args = ("--pairs", source, "--images", tmp_path / "r/images", "--root", tmp_path / "r")
    error = fails(prepare_pairs, *args)
    assert "no column 'image', only file, text; give --image_column" in error
    before = tree(tmp_path / "disk")
    out = ok(prepare_pairs, *args, "--image_column", "file", "--caption_column", "text")
    assert "placed 0 images" in out
    check_pairs(tmp_path / "r", 2, 8)
    assert tree(tmp_path / "disk") == before


def test_pairs_counts_and_lists_what_it_leaves_out(tmp_path, ok):
    found = photos(tmp_path / "photos", 8)
    put(tmp_path / "photos" / found[0][0], "not an image")
    (tmp_path / "photos" / found[2][0]).unlink()
    os.mkfifo(tmp_path / "photos" / found[2][0])  # would block whoever opens it
    found[4] = (found[4][0], " ")
    found[7:7] = [("../secret.jpg", "x"), ("/etc/passwd", "x"), ("x" * 5000, "x"), ("", "x")]
    source = as_csv(tmp_path / "p.csv", found)
    source.write_text(source.read_text() + "a.jpg\na.jpg,b,c\n", encoding="utf-8")
    out = ok(prepare_pairs, "--pairs", source, "--images", tmp_path / "photos", "--root",
             tmp_path / "r")
    listed = [line.split(",")[:2] for line in lines(tmp_path / "r", "unusable_rows.csv")]
    expected = {0: "image cannot be read", 1: "image cannot be read", 2: "image does not exist",
                3: "image does not exist", 4: "no caption", 7: OUTSIDE, 8: OUTSIDE,
                9: "image does not exist", 10: "no image", 20: '"1 fields', 21: '"3 fields'}
    assert listed == [["row", "reason"], *([str(row), reason] for row, reason in expected.items())]
    assert "left out 11 rows, listed in unusable_rows.csv: 3 rows: image does not exist; " in out
    assert len(check_pairs(tmp_path / "r", 1, 11)) == 6
    assert not (tmp_path / "r/images" / found[0][0]).exists()


OUTSIDE = "image is outside the images folder or its name is no text"


@pytest.mark.parametrize("name, text, message", [
    ("p.csv", "image,caption\n", "it has none"),
    ("p.csv", "", "it has none"),
    ("p.csv", "image,caption\na.jpg,a dog\nb.jpg,a cat\n", "used: 2 rows: image does not exist"),
    ("p.csv", "file;caption\na.jpg;a dog\n", "has no column 'image', only file, caption; give"),
    ("p.csv", b"image,caption\na.jpg,\xff\n", "save it as UTF-8"),
    ("p.jsonl", '{"image": "a.jpg", "caption": 3}\n', "1 rows: no caption"),
    ("p.jsonl", '{"image": "a.jpg", "caption": []}\n', "1 rows: no caption"),
    ("p.jsonl", '{"image": 7, "caption": "a"}\n', "1 rows: no image"),
    ("p.jsonl", '{"image": "a.jpg", "text": 7}\n', "no column 'caption', only image, text"),
    ("p.jsonl", "[1]\n{\n" + "[" * 100_000 + "\n" + "1" * 5000, "4 rows: no JSON object"),
    ("p.csv", "image,caption\nhttp://a.org/1.jpg,a dog\n",
     "1 rows: image is a URL; download the images first"),
    ("p.json", '{"images": [{"id": 1}], "annotations": [{"caption": "a"}]}',
     "is one object, with images, annotations; give an array"),
    ("p.xlsx", b"PK\3\4 and more", "a spreadsheet or another zip archive; save it as CSV"),
    ("p.csv.gz", b"\x1f\x8b\x08", "compressed; unpack it"),
    ("p.arrow", b"\xff\xff\xff\xff\0\0", "give what to_parquet"),
    ("p.arrow", b"ARROW1\0\0", "an Arrow file; save it as Parquet"),
    ("p.txt", "image\tcaption\n".encode("utf-16"), "is UTF-16, as spreadsheets save"),
    ("p.csv", 'image,caption\na.jpg,fine\nb.jpg,"a dog\nc.jpg,x\nd.jpg,y\n',
     "(line 3: unexpected end of data; a quote that opens there is not closed)"),
    ("p.csv", "image,caption\n" + 'a.jpg,"' + "x,y\n" * 40_000,
     "(line 2: field larger than field limit (131072); a quote that opens there is not closed)"),
    ("p.parquet", "PAR1 no more", "is not a Parquet file or is damaged"),
    ("p.tar", "no tar", "is not a whole, uncompressed tar or is damaged"),
    ("p.xls", "x", "must end in .csv, .tsv, .txt, .json,")], ids=lambda value: str(value)[:20])
def test_pairs_refuses(tmp_path, fails, name, text, message):
    (tmp_path / "photos").mkdir()
    assert message in fails(prepare_pairs, "--pairs", put(tmp_path / name, text), "--images",
                            tmp_path / "photos", "--root", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("option, make, suffix", [
    ("--pairs", os.mkfifo, ".csv"), ("--pairs", os.mkfifo, ".tar"), ("--pairs", os.mkdir, ".csv"),
    ("--pairs", None, ""), ("--images", os.mkfifo, ".csv")])
def test_pairs_needs_a_regular_file(tmp_path, fails, option, make, suffix):
    other = tmp_path / (f"odd{suffix}" if make else "x" * 5000)
    if make:
        make(other)
    fails(prepare_pairs, *own(tmp_path), option, other)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("sizes, message", [
    *((sizes, "only 4 can be used") for sizes in (
        ["--dev=2", "--test=2"], ["--dev=4", "--test=1"], ["--dev=1", "--test=1", "--train=3"])),
    *(([f"--dev={size}"], "--dev") for size in ("0", "0.5", "-1", "many", "nan", "1" * 5000))])
def test_pairs_refuses_sizes(tmp_path, fails, sizes, message):
    assert message in fails(prepare_pairs, *own(tmp_path), *sizes)


def test_pairs_never_overwrites(tmp_path, ok, fails, monkeypatch):
    args = own(tmp_path)
    put(tmp_path / "r/images/sub1/photo 1.jpg", jpeg(99))
    assert "not the same image" in fails(prepare_pairs, *args)
    assert (tmp_path / "r/images/sub1/photo 1.jpg").read_bytes() == jpeg(99)
    assert not (tmp_path / "r/annotations/scan_split").exists()
    put(tmp_path / "r/images/sub1/photo 1.jpg", jpeg(1))
    ok(prepare_pairs, *args)
    before = tree(tmp_path / "r")
    monkeypatch.setattr(prepare_pairs, "Usable", lambda _: pytest.fail("the images are read"))
    assert "scan_split exists already" in fails(prepare_pairs, *args, "--seed", 5)
    assert tree(tmp_path / "r") == before


def test_pairs_split_is_whole_or_absent_and_of_one_run(tmp_path, ok, monkeypatch):
    args = own(tmp_path)
    put_image, said = prepare_pairs.put_image, []

    def interrupted(*of_place):
        if said:
            raise KeyboardInterrupt
        said.append(run(prepare_pairs.main, list(map(str, args)), tmp_path / "out", 2))
        return put_image(*of_place)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_pairs, "put_image", interrupted)
        with pytest.raises(SystemExit):
            prepare_pairs.main(list(map(str, args)))
    assert "is being written by another process" in said[0]
    assert list((tmp_path / "r/annotations").iterdir()) == []
    assert "placed 3 images" in ok(prepare_pairs, *args)
