"""Files that are damaged, of the wrong type or crafted: one clear line, nothing executed, bounded
time and memory."""

import os
import pickle
import random
import shutil
import struct
import sys
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dataset, options, pairs_for, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import BANK, CLIP, NPC, differences, run, save_small

import clip
from data import retrieval_split, training_pairs
from dataset.common import Unusable, image_format
from params import parse_args
from utils.errors import InputError
from utils.method.memorybank import MemoryBank, bank_path, load_bank, save_bank
from utils.reading import layout
from utils.reading.images import Images
from utils.training import checkpoints

PREPROCESS = clip.Preprocess(32)
HARM = "harm_was_done"


class Harm:
    """Unpickled by pickle, it writes a file."""

    def __init__(self, folder):
        self.path = os.path.join(folder, HARM)

    def __reduce__(self):
        return (open, (self.path, "w"))


def quiet(*_):
    """Takes log lines."""


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, a model and the options and checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("hostile")
    data = make_dataset(folder / "data", "f30k")
    model = save_small(folder / "model.pt")
    argv = [*data.options, "--vision_model", str(model), "--context_length", "12", "--batch_size",
            "30", "--epochs", "2", "--num_workers", "0", "--device", "cpu", "--checkpoint_path",
            str(folder / "logs")]
    run(CLIP, [*argv, "--epochs", "1"], folder / "out")
    return SimpleNamespace(argv=argv, path=folder / "logs" / "ex0" / "epoch1.pt", data=data)


STATES = {
    "payload in the options": lambda good, harm: good["args"].update(seed=harm),
    "payload in the optimiser": lambda good, harm: good["optimizer"]["state"][0].update(step=harm),
    "step negative": lambda good, _: good.update(step=-3),
    "lines of numbers": lambda good, _: good["history"].update(lines=[1, 2]),
    "history a list": lambda good, _: good.update(history=[]),
    "history empty": lambda good, _: good.update(history={}),
    "weights a string": lambda good, _: good["history"].update(weights="w"),
    "sums strings": lambda good, _: good["history"].update(sums={"loss": "1"}),
    "optimiser empty": lambda good, _: good.update(optimizer={}),
    "optimiser a tensor": lambda good, _: good.update(optimizer=torch.zeros(3)),
    "moments of other shape": lambda good, _: good["optimizer"]["state"][3].update(
        exp_avg=torch.zeros(1)),
    "moments not tensors": lambda good, _: good["optimizer"]["state"][3].update(exp_avg_sq=1.0),
    "data a number": lambda good, _: good.update(data=7),
}


@pytest.mark.parametrize("how", STATES)
def test_training_state_that_is_not_one(trained, tmp_path, how):
    content = clip.read_checkpoint(trained.path)
    STATES[how](content, Harm(tmp_path))
    torch.save(content, tmp_path / "bad.pt")
    argv = [*trained.argv, "--resume", str(tmp_path / "bad.pt"), "--experiments", how]
    said = run(CLIP, argv, tmp_path / "out", 2).splitlines()
    assert said[-1].startswith("error: ") and "bad.pt" in said[-1], said
    assert not any("Traceback" in line for line in said)
    assert not (tmp_path / HARM).exists()


@pytest.mark.parametrize("name, value", [("vision_model", {"a": 1}), ("lr", torch.zeros(2))])
def test_options_of_a_checkpoint_are_only_compared(trained, tmp_path, name, value):
    content = clip.read_checkpoint(trained.path)
    content["args"][name] = value
    torch.save(content, tmp_path / "odd.pt")
    argv = [*trained.argv, "--resume", str(tmp_path / "odd.pt"), "--experiments", name]
    run(CLIP, argv, tmp_path / "out")


def test_the_payload_of_these_tests_works(tmp_path):
    torch.save(Harm(tmp_path), tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / HARM).exists()


@pytest.mark.parametrize("seed", range(3))
def test_damaged_checkpoints_are_refused_or_whole(trained, tmp_path, seed):
    """Random damage: a CheckpointError, a broken checksum, or a file that reads as before."""
    whole, rng, path = trained.path.read_bytes(), random.Random(seed), tmp_path / "bad.pt"
    good = clip.read_checkpoint(trained.path)
    for _ in range(20):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.choice([0, 1, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            content = clip.read_checkpoint(path)
        except clip.CheckpointError as error:
            assert "bad.pt" in str(error) and "\n" not in str(error)
        else:
            assert not checkpoints.intact(path) or differences(content, good) == []


# ---- banks --------------------------------------------------------------------------------------


NAME = "0.4_mbank_lookup_random_seed99_0123abcd.npz"


def load(root, pairs):
    args = parse_args("memorybank", ["--dataset_root", str(root), "--noise_ratio", "0.4"])
    return load_bank(NAME, pairs, args)


@pytest.fixture
def bank(tmp_path):
    """A good bank of six pairs on disk: (pairs, root, path)."""
    pairs = pairs_for([0, 0, 1, 1, 2, 2], range(6))
    numbers = np.linspace(0, 1, 6).astype(np.float32)
    bank = MemoryBank(np.array([0, 2, 4]), np.arange(6), numbers > 0.2, numbers, numbers, numbers,
                      {"beta": 0.1})
    path = bank_path(tmp_path, NAME)
    save_bank(bank, pairs, path)
    assert load(tmp_path, pairs) is not None
    return pairs, tmp_path, path


def refused_bank(pairs, root):
    with pytest.raises(InputError) as caught:
        load(root, pairs)
    assert "0.4_mbank" in str(caught.value) and "\n" not in str(caught.value)
    assert not (root / HARM).exists()


@pytest.mark.parametrize("name, value", [
    ("image_entry", lambda a: a.astype(float)), ("image_entry", lambda a: a.astype(str)),
    ("image_entry", lambda a: a[None]), ("caption_entry", lambda a: a.astype(bool)),
    ("caption_entry", lambda a: a[:0]), ("posterior", lambda a: a[:3]),
    ("posterior", lambda a: a * np.nan), ("posterior", lambda a: a.astype("S4")),
    ("clean", lambda a: a.astype(complex)), ("cosine", lambda a: np.array(1.0)),
    ("info", lambda a: np.frombuffer(a.tobytes().replace(b"0.1", b'"x"'), np.uint8)),
    ("info", lambda a: np.frombuffer(b"[1, 2]", np.uint8)),
    ("info", lambda a: np.frombuffer(b"{", np.uint8))])
def test_bank_with_a_wrong_array(bank, name, value):
    pairs, root, path = bank
    arrays = dict(np.load(path))
    arrays[name] = value(arrays[name])
    np.savez(path, **arrays)
    refused_bank(pairs, root)


def test_bank_that_is_a_pipe(bank):
    pairs, root, path = bank
    path.unlink()
    os.mkfifo(path)
    refused_bank(pairs, root)


def test_bank_with_a_pickled_member(bank):
    pairs, root, path = bank
    arrays = dict(np.load(path))
    arrays["posterior"] = np.array([Harm(root)] * 6, dtype=object)
    np.savez(path, **arrays)
    refused_bank(pairs, root)
    assert np.load(path, allow_pickle=True)["posterior"] is not None
    assert (root / HARM).exists()  # the payload would have worked


def test_bank_that_is_compressed(bank):
    """Ours are not, so that none unpacks to more than it holds."""
    pairs, root, path = bank
    np.savez_compressed(path, **np.load(path))
    refused_bank(pairs, root)


@pytest.mark.parametrize("content", [b"", b"hello", "w", "no info"])
def test_file_that_is_no_bank(bank, content):
    pairs, root, path = bank
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **{"w": {"w": np.ones(3), "info": np.frombuffer(b"{}", np.uint8)}}.get(
            content, {name: value for name, value in np.load(path).items() if name != "info"}))
    refused_bank(pairs, root)


def test_bank_with_random_damage(bank):
    """It is refused, or reads as before."""
    pairs, root, path = bank
    whole, good, rng = path.read_bytes(), load(root, pairs)[0], random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.choice([0, 1, 3]) if damaged else 0):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load(root, pairs)[0]
        except InputError as error:
            assert NAME in str(error) and "\n" not in str(error)
        else:
            assert all(np.array_equal(getattr(loaded, name), getattr(good, name))
                       for name in ("image_entry", "caption_entry", "clean", "loss", "posterior"))


def released(root, entries, name="img", raw=None):
    """Write a file of the authors' bank: a pickled object array around `entries`."""
    folder = root / "annotations" / "memory_bank"
    folder.mkdir(parents=True, exist_ok=True)
    array = np.empty((), object)
    array[()] = entries
    np.save(folder / f"0.4_mbank_{name}_idx.npy", array)
    if raw is not None:
        header = (folder / f"0.4_mbank_{name}_idx.npy").read_bytes()
        header = header[: header.index(b"\n") + 1]
        (folder / f"0.4_mbank_{name}_idx.npy").write_bytes(header + raw)


GOOD_IMAGES, GOOD_CAPTIONS = {str(k): 2 * k for k in range(3)}, {str(k): k for k in range(6)}


@pytest.fixture
def authors(tmp_path):
    released(tmp_path, GOOD_IMAGES)
    released(tmp_path, GOOD_CAPTIONS, "txt")
    pairs = pairs_for([0, 0, 1, 1, 2, 2], range(6))
    assert load(tmp_path, pairs)[0].image_entry.tolist() == [0, 2, 4]
    return pairs, tmp_path


def nested(depth):
    value = [0]
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize("value", [
    "text", None, 0.5, True, 6, -1, 10**30, [1], (1,), b"\0" * 8, np.array(["a"]), np.float64(2),
    np.array([1, 2]), np.array([1], dtype=object), nested(30), {"a": 1}, np.datetime64("2020-01-01")
], ids=lambda value: type(value).__name__)
def test_authors_bank_with_a_wrong_value(authors, value):
    pairs, root = authors
    released(root, {**GOOD_IMAGES, "1": value})
    refused_bank(pairs, root)


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "0.4_mbank_txt_idx.npy").unlink(),
    lambda folder: np.save(folder / "0.4_mbank_txt_idx.npy", {"0": 0}),
    lambda folder: np.save(folder / "0.4_mbank_img_idx.npy", np.array([[1, 2], 3], dtype=object)),
    lambda folder: np.save(folder / "0.4_mbank_img_idx.npy", np.arange(5))],
    ids=["half of it", "a key missing", "a list", "numbers"])
def test_authors_bank_that_is_none(authors, spoil):
    pairs, root = authors
    spoil(root / "annotations" / "memory_bank")
    refused_bank(pairs, root)


@pytest.mark.parametrize("key", [Harm, print, np.zeros, os.system, complex(1)], ids=str)
def test_authors_bank_with_a_payload(authors, key):
    pairs, root = authors
    payload = Harm(root) if key is Harm else key
    for content in ({**GOOD_IMAGES, "more": payload}, payload):
        released(root, content)
        refused_bank(pairs, root)


class ForgedType:
    """numpy.dtype of objects that claims to be plain: what is in the file becomes pointers."""

    def __reduce__(self):
        return (np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))


class ForgedArray:
    def __reduce__(self):
        reconstruct = np.zeros(1).__reduce__()[0]
        state = (1, (), ForgedType(), False, b"A" * 8)
        return (reconstruct, (np.ndarray, (0,), b"b"), state)


class ForgedScalar:
    def __reduce__(self):
        return (np.int64(1).__reduce__()[0], (ForgedType(), b"A" * 8))


@pytest.mark.parametrize("forged", [ForgedArray(), {**GOOD_IMAGES, "1": ForgedArray()},
                                    {**GOOD_IMAGES, "1": ForgedScalar()}])
def test_authors_bank_with_forged_pointers(authors, forged):
    """Restricting what is called is not enough: a dtype's own state setter trusts the file."""
    pairs, root = authors
    released(root, None, raw=pickle.dumps(forged, protocol=4))
    refused_bank(pairs, root)


@settings(max_examples=150)
@given(data=st.data())
def test_authors_bank_with_random_damage(authors, data):
    pairs, root = authors
    released(root, GOOD_IMAGES)
    path = root / "annotations" / "memory_bank" / "0.4_mbank_img_idx.npy"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load(root, pairs)
    except InputError as error:
        assert "\n" not in str(error)


# ---- text files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content, line", [
    (b"\xff\xfe\n", 1), (b"a\nb\n\xe9t\xe9\n", 3), (b"a\n\xed\xa0\x80\n", 2)])
def test_bytes_that_are_no_text(tmp_path, content, line):
    (tmp_path / "caps.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"line {line}: .*UTF-8"):
        layout.read_captions(tmp_path / "caps.txt")


@pytest.mark.parametrize("name", ["folder", "pipe", "/dev/zero"])
def test_what_is_no_file(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        layout.read_lines(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.jpg", "a/../../up.jpg", "..", ""])
def test_image_names_that_leave_the_folder(dataset, name):
    data = dataset("f30k")
    names = data.lines("image_name.txt")
    write_lines(data.split_folder / "image_name.txt", [*names[:5], name, *names[6:]])
    with pytest.raises(InputError, match="line 6: .*not a file name inside the images folder"):
        training_pairs(options(data, "--batch_size", 8), PREPROCESS, quiet)


def test_image_names_within_the_folder_and_links(dataset, tmp_path):
    data = dataset("f30k")
    first = int(data.ids["train"][0])
    names = data.lines("image_name.txt")
    (data.root / "images" / "sub").mkdir()
    (data.root / "images" / names[first]).rename(tmp_path / "elsewhere.png")
    (data.root / "images" / "sub" / "a..b c.png").symlink_to(tmp_path / "elsewhere.png")
    names[first] = "sub/a..b c.png"
    write_lines(data.split_folder / "image_name.txt", names)
    pairs = training_pairs(options(data, "--batch_size", 8), PREPROCESS, quiet)
    assert pairs.images[0].shape == (3, 32, 32)


@pytest.mark.parametrize("image_id", ["9" * 5000, "1" * 25, "٣", "1e3", "0x1f", "1_0", "+1"])
def test_ids_that_are_no_numbers(dataset, image_id):
    for kind in ("coco", "f30k"):
        data = dataset(kind)
        write_lines(data.split_folder / "train_ids.txt",
                    [image_id, *data.lines("train_ids.txt")[1:]])
        with pytest.raises(InputError, match="is not a number"):
            training_pairs(options(data, "--batch_size", 8), PREPROCESS, quiet)


def test_image_name_of_any_length(dataset):
    data = dataset("cc")
    ids = data.lines("train_ids.txt")
    write_lines(data.split_folder / "train_ids.txt", ["x" * 5000, *ids[1:]])
    with pytest.raises(InputError, match="1 images are missing"):
        training_pairs(options(data, "--batch_size", 8), PREPROCESS, quiet)


pieces = st.one_of(st.binary(max_size=20), st.sampled_from(
    [b"\n", b"\r", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff", b"..", b"/", b"\\", b"3", b"12", b" ",
     "é".encode(), "\u2028".encode(), b"a.jpg", b"-", b"9" * 30]))
contents = st.lists(pieces, max_size=30).map(b"".join)
FILES = ["train_caps.txt", "train_ids.txt", "dev_caps.txt", "dev_ids.txt", "image_name.txt",
         "0.4_noise_train_caps.txt"]


@settings(max_examples=250)
@given(file=st.sampled_from(FILES), content=contents, kind=st.sampled_from(["f30k", "cc", "coco"]))
def test_random_bytes_in_any_text_file(copies, file, content, kind):
    """Either the split is read or an InputError of one line says why not."""
    data = copies[kind]
    path = data.split_folder / file
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    args = options(data, "--batch_size", 2, "--noise_ratio",
                   0.4 if file.startswith("0.4") else 0, "--context_length", 12)
    try:
        for read in (lambda: training_pairs(args, PREPROCESS, quiet),
                     lambda: retrieval_split(args, "dev", PREPROCESS, quiet)):
            try:
                pairs = read()
                assert len(pairs) > 0 and all(pairs.captions)
            except InputError as error:
                assert len(str(error).splitlines()) == 1
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


@pytest.fixture
def copies(dataset):
    return {kind: dataset(kind) for kind in ("f30k", "cc", "coco")}


# ---- images -------------------------------------------------------------------------------------


def png(width, height):
    """A PNG file of a few bytes that declares a size."""
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (10_000, 10_000), (2**31 - 1, 1)])
def test_decompression_bomb(tmp_path, width, height):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bomb.png").write_bytes(png(width, height))
    tracemalloc.start()
    with pytest.raises(InputError, match="bomb.png is not an image .*decompression bomb"):
        Images(tmp_path, ["bomb.png"], PREPROCESS)[0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize("content", [b"", b"GIF89a", png(5, 5)[:40], b"\xff\xd8\xff" * 100,
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
                         ids=["empty", "gif", "cut png", "jpeg", "postscript"])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jpg is not an image"):
        Images(tmp_path, ["a.jpg"], PREPROCESS)[0]


def test_postscript_is_not_drawn(tmp_path, monkeypatch):
    """Pillow would start Ghostscript, if it is there, on a file that may be called .jpg."""
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/drawn\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(gs.parent), prepend=os.pathsep)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.jpg"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    with pytest.raises(InputError, match=r"a\.jpg is not an image .*Ghostscript"):
        Images(tmp_path, ["a.jpg"], PREPROCESS)[0]
    with pytest.raises(Unusable, match="Ghostscript"):
        image_format(path)
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("size, good", [((30_000, 1), False), ((1, 1001), False),
                                        ((1000, 1), True)])
def test_thin_images(tmp_path, size, good):
    """Resized to a shorter side of 224 they would have a thousand times the pixels."""
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.png"
    Image.new("RGB", size).save(path)
    images = Images(tmp_path, ["a.png"], PREPROCESS)
    if good:
        assert image_format(path) == "PNG"
        assert len(images[0]) == 3
    else:
        with pytest.raises(Unusable, match="too thin"):
            image_format(path)
        with pytest.raises(InputError, match="too thin"):
            images[0]


# ---- the commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [NPC, BANK])
def test_a_command_ends_with_one_line(trained, tmp_path, main):
    """Whatever the file, no traceback: a crafted bank, then a crafted checkpoint."""
    argv = trained.argv[:-2] if main is BANK else [
        *trained.argv[:-1], str(tmp_path), "--noise_ratio", "0.4"]
    argv = [x for x in argv if x not in ("--epochs", "2")] if main is BANK else argv
    torch.save({"state_dict": Harm(tmp_path)}, tmp_path / "bad.pt")
    said = run(main, [*argv, "--resume", str(tmp_path / "bad.pt")], tmp_path / "out", 2)
    assert said.splitlines()[-1].startswith("error: ") and "it would run code" in said
    assert "Traceback" not in said and not (tmp_path / HARM).exists()



def in_latin_1():
    """Hook: the terminal cannot show every letter."""
    sys.stdout.reconfigure(encoding="latin-1")
    sys.stderr.reconfigure(encoding="latin-1")


def test_names_that_are_not_utf8_and_letters_that_a_terminal_lacks(trained, tmp_path):
    root, logs = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"), tmp_path / "犬"
    shutil.copytree(trained.data.root, root)
    argv = [*trained.argv, "--dataset_root", root, "--image_cache", root + "/cache"]
    said = run(CLIP, [*argv, "--checkpoint_path", str(logs)], tmp_path / "out", hook=in_latin_1)
    for text in (said, (logs / "ex0" / "log.txt").read_text()):
        assert f"{tmp_path}/caf\\udce9/annotations" in text


@pytest.mark.parametrize("option", ["--dataset_root", "--checkpoint_path", "--resume",
                                    "--vision_model", "--image_cache"])
def test_names_of_any_length(trained, tmp_path, option):
    said = run(CLIP, [*trained.argv, option, "x" * 5000], tmp_path / "out", 2)
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_an_image_that_is_a_pipe(trained, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(trained.data.root, root)
    path = root / "images" / trained.data.name(trained.data.ids["dev"][1])
    path.unlink()
    os.mkfifo(path)
    argv = [*trained.argv, "--dataset_root", str(root), "--checkpoint_path", str(tmp_path)]
    said = run(CLIP, argv, tmp_path / "out", 2)
    assert said.splitlines()[-1].startswith(f"error: {path} is not a regular file")
