"""Bad input, from a mistyped option to a crafted file: one clear line on stderr and a status that
is not 0. Nothing is left half-written, no code of a file runs, time and memory are bounded."""

import json
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tracemalloc
import zlib
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dataset, options, pairs_for, tree, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import differences, run, save_small, small_tokens

import clip
import construct_noise
import get_memorybank
import main_CLIP
import main_NPC
from data import retrieval_split, training_pairs
from dataset.prepare_pairs import Unusable, image_format
from params import parse_args
from utils.errors import InputError
from utils.method.memorybank import MemoryBank, bank_path, load_bank, save_bank
from utils.reading import layout
from utils.reading.images import Images
from utils.training import checkpoints

COMMANDS = {"construct_noise": construct_noise.main, "get_memorybank": get_memorybank.main,
            "main_CLIP": main_CLIP.main, "main_NPC": main_NPC.main}
WITH_A_MODEL = ["get_memorybank", "main_CLIP", "main_NPC"]
TRAINING = ["main_CLIP", "main_NPC"]
LOGS = ("options.json", "options_eval.json", "log.txt", ".lock")
PREPROCESS = clip.Preprocess(32)
HARM = "harm_was_done"


class Harm:
    """Unpickled by pickle, it writes a file in the working folder."""

    def __reduce__(self):
        return (open, (HARM, "w"))


def quiet(*_):
    """Takes log lines."""


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Function: run a command that must fail; returns its one line. It may leave its log and its
    options, as whole files, and nothing else."""

    def run(command, data, *more, words=()):
        monkeypatch.chdir(tmp_path)  # the default checkpoint_path is relative
        argv = [*data.options, *map(str, more)] if data else list(map(str, more))
        if command != "construct_noise":
            argv = ["--vision_model", "tiny", "--device", "cpu", "--num_workers", "0",
                    "--batch_size", "8", *argv]
        before = tree(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            COMMANDS[command](argv)
        assert caught.value.code not in (0, None)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in words:
            assert str(word) in lines[0]
        for file in tree(tmp_path) - before:
            name = os.path.basename(file)
            assert name in LOGS or name.startswith("events.out.tfevents"), file
            if name.endswith(".json"):
                json.loads((tmp_path / file).read_text())
        return lines[0]

    return run


# ---- the data set -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", ["nothing", "file", "no images"])
def test_wrong_dataset_root_is_told_first(refused, command, what, dataset, tmp_path, monkeypatch):
    """Before a model is fetched; the experiment gets no folder."""
    root = tmp_path / "there"
    if what == "file":
        root.write_text("hello")
    elif what == "no images":
        root = dataset("cc").root
        os.rename(root / "images", root / "pictures")
        if command == "construct_noise":  # which needs none
            return
    monkeypatch.setattr(clip, "load", None)
    refused(command, None, "--dataset_root", root, "--noise_ratio", "0.2",
            words=[root / "images" if what == "no images" else root, "--dataset_root"])
    assert not (tmp_path / "logs").exists() and (what != "nothing" or not root.exists())


NOISY, EVAL = ("--noise_ratio", "0.4"), ("--eval",)


@pytest.mark.parametrize("command, file, more", [
    ("construct_noise", "train_caps.txt", NOISY), ("get_memorybank", "train_ids.txt", ()),
    ("main_NPC", "train_caps.txt", NOISY), ("main_NPC", "train_ids.txt", NOISY),
    ("main_CLIP", "train_ids.txt", ()), ("main_CLIP", "dev_ids.txt", ()),
    ("main_CLIP", "dev_caps.txt", ()), ("main_CLIP", "test_ids.txt", EVAL),
    ("main_NPC", "test_caps.txt", EVAL)])
@pytest.mark.parametrize("content, words", [
    (None, ["does not exist"]), (b" \t", ["line 3", "empty"]), (b"caf\xe9", ["line 3", "UTF-8"])])
def test_a_split_file_is_missing_or_has_a_bad_line(refused, dataset, command, file, more, content,
                                                   words):
    data = dataset("f30k")
    path = data.split_folder / file
    lines = path.read_bytes().splitlines()
    path.unlink()
    if content:
        path.write_bytes(b"\n".join([*lines[:2], content, *lines[3:]]))
    refused(command, data, *more, words=[path, *words])


@pytest.mark.parametrize("command, split, count, more", [
    *((command, "train", 6, ()) for command in WITH_A_MODEL), ("main_CLIP", "test", 1, EVAL)])
def test_missing_images_are_counted_and_the_first_named(refused, dataset, command, split, count,
                                                        more):
    data = dataset("coco")
    missing = [data.name(i) for i in data.ids[split][3:9][:count]]
    for name in missing:
        (data.root / "images" / name).unlink()
    line = refused(command, data, *more, words=[f"{count} images are missing", *missing[:3],
                                                data.root / "images"])
    assert not any(name in line for name in missing[3:])


@pytest.mark.parametrize("layout, file, lines, more, words", [
    ("coco", "train_caps.txt", 60, ("--num_anns", "4", *NOISY), ["--num_anns 5 would fit"]),
    ("coco", "train_caps.txt", 59, NOISY, ["cut short"]),
    ("coco", "0.4_noise_train_caps.txt", 50, NOISY, []),
    ("cc", "dev_caps.txt", 8, (), ["cut short"]), ("cc", "test_caps.txt", 12, EVAL, ["cut short"])])
def test_ids_and_captions_that_do_not_add_up(refused, dataset, layout, file, lines, more, words):
    data = dataset(layout)
    write_lines(data.split_folder / file, ["a"] * lines)
    split = file.removeprefix("0.4_noise_").split("_")[0]
    words = [f"{split}_ids.txt has {len(data.ids[split])} lines", f"{file} has {lines}", *words]
    for command in (WITH_A_MODEL if split == "train" else ["main_CLIP"]):
        line = refused(command, data, *more, words=words)
        assert split == "train" or "--num_anns" not in line


def test_coco_scores_of_too_few_images(refused, dataset):
    data = dataset("coco")
    for file in ("test_ids.txt", "test_caps.txt"):
        write_lines(data.split_folder / file, data.lines(file)[:20])
    refused("main_CLIP", data, "--eval", words=["test_caps.txt", "4 images"])


@pytest.mark.parametrize("layout, file, line, words", [
    *(("cc", "train_ids.txt", name, [f"'{name}'"]) for name in ("../../etc/passwd", "a/b")),
    ("cc", "train_ids.txt", "x" * 5000, ["1 images are missing"]),
    *((layout, "train_ids.txt", number, ["is not a number"]) for layout in ("coco", "f30k")
      for number in ("x12", "-3", "+1", "1.5", "1e3", "0x1f", "1_0", "²", "٣", "9" * 5000)),
    ("f30k", "train_ids.txt", "45", ["has 45 lines", "45"]),
    *(("f30k", "image_name.txt", name, ["line 2", "not a file name inside the images folder"])
      for name in ("/etc/passwd", "../up.jpg", "a/../../up.jpg", "..", ""))])
def test_ids_and_image_names_that_fit_no_layout_or_leave_the_folder(
        refused, dataset, layout, file, line, words):
    data = dataset(layout)
    lines = data.lines(file)
    write_lines(data.split_folder / file, [lines[0], line, *lines[2:]])
    refused("main_CLIP", data, words=words)


def test_dataset_of_another_layout(refused, dataset):
    data = dataset("cc")
    for name, words in (("coco", ["--dataset coco"]), ("f30k", ["image_name.txt does not exist"])):
        refused("main_CLIP", data, "--dataset", name, "--num_anns", "1", words=words)


@pytest.mark.parametrize("name", ["folder", "pipe", "/dev/zero"])
def test_what_is_no_file(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        layout.read_lines(path)


pieces = st.one_of(st.binary(max_size=20), st.sampled_from(
    [b"\n", b"\r", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff", b"..", b"/", b"\\", b"3", b"12", b" ",
     "é".encode(), "\u2028".encode(), b"a.jpg", b"-", b"9" * 30]))
contents = st.lists(pieces, max_size=30).map(b"".join)
FILES = ["train_caps.txt", "train_ids.txt", "dev_caps.txt", "dev_ids.txt", "image_name.txt",
         "0.4_noise_train_caps.txt"]


@pytest.fixture
def copies(dataset):
    return {kind: dataset(kind) for kind in ("f30k", "cc", "coco")}


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


# ---- images -------------------------------------------------------------------------------------


def break_image(path, how):
    if how == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        whole = path.read_bytes()
        path.write_bytes(b"hello" if how == "text" else whole[: len(whole) - len(whole) // 4])


@pytest.mark.parametrize("command, split, how, workers", [
    ("get_memorybank", "train", "text", 0), ("get_memorybank", "train", "cut", 2),
    ("main_CLIP", "train", "text", 2), ("main_CLIP", "train", "cut", 0),
    ("main_CLIP", "dev", "pipe", 0)])
def test_undecodable_image_is_named(refused, dataset, command, split, how, workers):
    """Before training, although the header of one that is cut short can be read."""
    data = dataset("f30k")
    path = data.root / "images" / data.name(data.ids[split][2])
    break_image(path, how)
    before = set(multiprocessing.active_children())
    line = refused(command, data, "--num_workers", workers, "--batch_size", "60", "--data_on",
                   "workers")
    what = "a regular file" if how == "pipe" else "an image or is damaged"
    assert line.startswith(f"error: {path} is not {what}")
    left = set(multiprocessing.active_children()) - before
    assert not left  # they would be killed, loudly, when the interpreter ends


def test_broken_images_are_counted_before_training(refused, dataset):
    data = dataset("f30k")
    for k, how in ((2, "text"), (5, "cut"), (7, "text"), (9, "cut")):
        break_image(data.root / "images" / data.name(data.ids["train"][k]), how)
    line = refused("main_CLIP", data, words=["4 images cannot be read: "])
    assert line.count("is not an image or is damaged") == 3


def png(width, height):
    """A PNG file of a few bytes that declares a size."""
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


@pytest.fixture
def one_image(tmp_path):
    """Function: `Images` of the one file a.jpg, with some content."""

    def make(content):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.jpg").write_bytes(content)
        return Images(tmp_path, ["a.jpg"], PREPROCESS)

    return make


@pytest.mark.parametrize("content, why", [
    *((png(*size), ".*decompression bomb")
      for size in ((60_000, 60_000), (10_000, 10_000), (2**31 - 1, 1))),
    *((content, "") for content in (b"", b"GIF89a", png(5, 5)[:40], b"\xff\xd8\xff" * 9))])
def test_files_that_are_no_images(one_image, content, why):
    images = one_image(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"a\.jpg is not an image {why}"):
        images[0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_postscript_is_not_drawn(one_image, tmp_path, monkeypatch):
    """Pillow would start Ghostscript, if it is there, on a file that may be called .jpg."""
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/drawn\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(gs.parent), prepend=os.pathsep)
    images = one_image(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.jpg", "EPS")
    with pytest.raises(InputError, match=r"a\.jpg is not an image .*Ghostscript"):
        images[0]
    with pytest.raises(Unusable, match="Ghostscript"):
        image_format(tmp_path / "images" / "a.jpg")
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("size, good", [((30_000, 1), False), ((1, 1001), False),
                                        ((1000, 1), True)])
def test_thin_images(one_image, tmp_path, size, good):
    """Resized to a shorter side of 224 they would have a thousand times the pixels."""
    images = one_image(b"")
    Image.new("RGB", size).save(tmp_path / "images" / "a.jpg", "PNG")
    with nullcontext() if good else pytest.raises(InputError, match="too thin"):
        assert len(images[0]) == 3


# ---- options ------------------------------------------------------------------------------------


OUT_OF_RANGE = {
    "--noise_ratio": ["1", "1.5", "-0.1", "nan", "inf", "half", ""], "--batch_size": ["0", "1"],
    "--epochs": ["0", "2.5"], "--lr": ["nan", "-1"], "--beta2": ["1"], "--context_length": ["1"],
    "--seed": [str(2**32), "-1"], "--num_workers": ["-1"], "--dev_length": ["0"],
    "--display": ["0"], "--num_anns": ["0"], "--dataset": ["flickr"], "--precision": ["fp8"],
    "--device": ["abacus"], "--recipe": ["mine"], "--eval_batch_size": ["0"], "--warmup": ["-1"],
    "--eps": ["x"], "--weight_decay": ["-0.1"], "--weighting": ["soft"],
    "--memory_loss_weight": ["-1"], "--clean_threshold": ["1.5"], "--min_clean": ["2"]}


@pytest.mark.parametrize("command, option, words", [
    *(("main_NPC", f"{option}={value}", [option, f"'{value}'"])
      for option, values in OUT_OF_RANGE.items() for value in values),
    *((command, "--noise_ratio=1", ["--noise_ratio", "0 to below 1"]) for command in COMMANDS),
    *((command, "--batch_size=13", ["--batch_size 13", "12 pairs"]) for command in TRAINING),
    ("main_NPC", "--weightning", ["--weightning"]),
    ("main_CLIP", "--weighting=none", ["--weighting"]),
    ("main_NPC", "--epoch=3", ["--epoch"]), ("construct_noise", "--epochs=3", ["--epochs"]),
    ("main_CLIP", "--context_length=78", ["--context_length", "77"]),
    pytest.param("main_CLIP", "--device=cuda", ["--device cuda"], marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a CUDA device")),
    ("main_CLIP", "--vision_model=ViT-B/33", ["ViT-B/33: no such file", "mean ViT-B/32?"]),
    # open_clip's spelling
    ("main_CLIP", "--vision_model=ViT-B-32", ["ViT-B-32: no such file", "mean ViT-B/32?"])])
def test_option_that_is_unknown_or_does_not_fit(refused, datasets, command, option, words):
    refused(command, datasets["cc"], option, words=words)


@pytest.mark.parametrize("option", ["--dataset_root", "--checkpoint_path", "--resume",
                                    "--vision_model", "--image_cache"])
def test_names_of_any_length(refused, datasets, option):
    refused("main_CLIP", datasets["cc"], option, "x" * 5000)


@pytest.mark.parametrize("command", TRAINING)
def test_checkpoint_path_below_a_file_or_read_only(refused, datasets, tmp_path, command):
    (tmp_path / "file").write_text("hello")
    (tmp_path / "closed").mkdir(mode=0o555)
    for name in ("file", "file/logs", *(["closed"] if os.geteuid() else [])):  # root may write
        refused(command, datasets["cc"], "--checkpoint_path", tmp_path / name,
                words=[tmp_path / name, "cannot write" if name == "closed" else "Not a directory"])
    assert not list(datasets["cc"].root.glob("annotations/*bank*"))  # told before a bank is built


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, a small model, and the options and checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    data = make_dataset(folder / "data", "f30k")
    model = save_small(folder / "model.pt")
    argv = ["--vision_model", str(model), "--context_length", "12", "--batch_size", "30",
            "--epochs", "2", "--num_workers", "0", "--device", "cpu"]
    run(main_CLIP.main, [*data.options, *argv, "--epochs", "1", "--checkpoint_path",
                         str(folder / "logs")], folder / "out")
    return SimpleNamespace(argv=argv, path=folder / "logs" / "ex0" / "epoch1.pt", data=data)


@pytest.mark.parametrize("other", ["RN50", "tiny"])
def test_checkpoint_of_another_architecture(refused, datasets, trained, other):
    for command in TRAINING:
        refused(command, datasets["cc"], "--resume", trained.path, "--vision_model", other,
                words=[trained.path, other, "vision_layers 1"])


@pytest.mark.parametrize("option", ["--resume", "--vision_model"])
@pytest.mark.parametrize("content", ["text", "tensors", "directory", "absent"])
def test_not_a_checkpoint(refused, datasets, trained, tmp_path, content, option):
    path = tmp_path / "what.pt"
    if content == "directory":
        path.mkdir()
    elif content == "tensors":
        torch.save({"a": torch.ones(2)}, path)
    elif content == "text":
        path.write_bytes(b"hello")
    refused("main_CLIP", datasets["cc"], "--eval", option, path, words=[path])
    if option == "--vision_model" and content == "tensors":
        refused("main_CLIP", datasets["cc"], "--resume", trained.path, option, path, words=[path])


def test_the_payload_of_these_tests_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Harm(), "bad.pt")
    np.save("bad.npy", Harm())
    for load in (lambda: torch.load("bad.pt", weights_only=False),
                 lambda: np.load("bad.npy", allow_pickle=True)):
        load()
        os.remove(HARM)


def test_checkpoint_with_code_is_refused_and_not_run(refused, datasets, tmp_path):
    path = tmp_path / "harm.pt"
    torch.save({"state_dict": Harm()}, path)
    for command in WITH_A_MODEL:
        refused(command, datasets["cc"], "--resume", path, words=[path, "it would run code"])


STATES = {
    "payload in the options": lambda good: good["args"].update(seed=Harm()),
    "payload in the optimiser": lambda good: good["optimizer"]["state"][0].update(step=Harm()),
    "step negative": lambda good: good.update(step=-3),
    "lines of numbers": lambda good: good["history"].update(lines=[1, 2]),
    "history a list": lambda good: good.update(history=[]),
    "history empty": lambda good: good.update(history={}),
    "weights a string": lambda good: good["history"].update(weights="w"),
    "sums strings": lambda good: good["history"].update(sums={"loss": "1"}),
    "optimiser empty": lambda good: good.update(optimizer={}),
    "optimiser a tensor": lambda good: good.update(optimizer=torch.zeros(3)),
    "moments of other shape": lambda good: good["optimizer"]["state"][3].update(
        exp_avg=torch.zeros(1)),
    "moments not tensors": lambda good: good["optimizer"]["state"][3].update(exp_avg_sq=1.0),
    "data a number": lambda good: good.update(data=7),
}


@pytest.mark.parametrize("how", STATES)
def test_training_state_that_is_not_one(refused, trained, tmp_path, monkeypatch, how):
    monkeypatch.setattr(clip, "tokenize_with_lengths", small_tokens)
    content = clip.read_checkpoint(trained.path)
    STATES[how](content)
    torch.save(content, tmp_path / "bad.pt")
    refused("main_CLIP", trained.data, *trained.argv, "--resume", tmp_path / "bad.pt",
            words=["bad.pt"])


@pytest.mark.parametrize("name, value", [("vision_model", {"a": 1}), ("lr", torch.zeros(2))])
def test_options_of_a_checkpoint_are_only_compared(trained, tmp_path, name, value):
    content = clip.read_checkpoint(trained.path)
    content["args"][name] = value
    torch.save(content, tmp_path / "odd.pt")
    run(main_CLIP.main, [*trained.data.options, *trained.argv, "--resume", str(tmp_path / "odd.pt"),
                         "--checkpoint_path", str(tmp_path)], tmp_path / "out")


def damaged(whole, rng, changes):
    """A file's bytes, perhaps cut, with some bytes changed."""
    found = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
    for _ in range(rng.choice(changes) if found else 0):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return found


def test_damaged_checkpoints_are_refused_or_whole(trained, tmp_path):
    """Random damage: a CheckpointError, a broken checksum, or a file that reads as before."""
    whole, rng, path = trained.path.read_bytes(), random.Random(0), tmp_path / "bad.pt"
    good = clip.read_checkpoint(trained.path)
    for _ in range(60):
        path.write_bytes(damaged(whole, rng, [0, 1, 30]))
        try:
            content = clip.read_checkpoint(path)
        except clip.CheckpointError as error:
            assert "bad.pt" in str(error) and "\n" not in str(error)
        else:
            assert not checkpoints.intact(path) or differences(content, good) == []


# ---- banks of ours ------------------------------------------------------------------------------


NAME = "0.4_mbank_lookup_random_seed99_0123abcd.npz"


def load(root, pairs):
    args = parse_args("memorybank", ["--dataset_root", str(root), "--noise_ratio", "0.4"])
    return load_bank(NAME, pairs, args)


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """A good bank of six pairs on disk: (pairs, root, path)."""
    monkeypatch.chdir(tmp_path)
    pairs = pairs_for([0, 0, 1, 1, 2, 2], range(6))
    numbers = np.linspace(0, 1, 6).astype(np.float32)
    bank = MemoryBank(np.array([0, 2, 4]), np.arange(6), numbers > 0.2, numbers, numbers, numbers,
                      {"beta": 0.1})
    path = bank_path(tmp_path, NAME)
    save_bank(bank, pairs, path)
    assert load(tmp_path, pairs) is not None
    return pairs, tmp_path, path


def refused_bank(pairs, root, words="0.4_mbank"):
    with pytest.raises(InputError) as caught:
        load(root, pairs)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (root / HARM).exists()


WRONG_ARRAYS = [
    ("image_entry", lambda a: a.astype(float)), ("image_entry", lambda a: a.astype(str)),
    ("image_entry", lambda a: a[None]), ("caption_entry", lambda a: a.astype(bool)),
    ("caption_entry", lambda a: a[:0]), ("posterior", lambda a: a[:3]),
    ("posterior", lambda a: a * np.nan), ("posterior", lambda a: a.astype("S4")),
    ("posterior", lambda a: np.array([Harm()] * 6, dtype=object)),
    ("clean", lambda a: a.astype(complex)), ("cosine", lambda a: np.array(1.0)),
    ("info", lambda a: np.frombuffer(a.tobytes().replace(b"0.1", b'"x"'), np.uint8)),
    ("info", lambda a: np.frombuffer(b"[1, 2]", np.uint8)),
    ("info", lambda a: np.frombuffer(b"{", np.uint8))]


@pytest.mark.parametrize("name, value, words", [
    *((name, value, "0.4_mbank") for name, value in WRONG_ARRAYS),
    ("caption_entry", lambda a: a + 1, "pair 6 of 0 to 5"),
    ("caption_entry", lambda a: a - 1, "pair -1 of 0 to 5")])
def test_bank_with_a_wrong_array(bank, name, value, words):
    pairs, root, path = bank
    arrays = dict(np.load(path))
    arrays[name] = value(arrays[name])
    np.savez(path, **arrays)
    refused_bank(pairs, root, words)


@pytest.mark.parametrize("write", [
    lambda path, arrays: path.write_bytes(b""), lambda path, arrays: path.write_bytes(b"hello"),
    lambda path, arrays: os.mkfifo(path),
    lambda path, arrays: np.savez(path, w=np.ones(3), info=np.frombuffer(b"{}", np.uint8)),
    lambda path, arrays: np.savez(path, **{k: v for k, v in arrays.items() if k != "info"}),
    # ours are not compressed, so that none unpacks to more than it holds
    lambda path, arrays: np.savez_compressed(path, **arrays)],
    ids=["empty", "text", "pipe", "others", "no info", "compressed"])
def test_file_that_is_no_bank(bank, write):
    pairs, root, path = bank
    arrays = dict(np.load(path))
    path.unlink()
    write(path, arrays)
    refused_bank(pairs, root)


def test_bank_with_random_damage(bank):
    """It is refused, or reads as before."""
    pairs, root, path = bank
    whole, good, rng = path.read_bytes(), load(root, pairs)[0], random.Random(0)
    for _ in range(100):
        path.write_bytes(damaged(whole, rng, [0, 1, 3]))
        try:
            loaded = load(root, pairs)[0]
        except InputError as error:
            assert NAME in str(error) and "\n" not in str(error)
        else:
            assert all(np.array_equal(getattr(loaded, name), getattr(good, name))
                       for name in ("image_entry", "caption_entry", "clean", "loss", "posterior"))


# ---- the authors' banks -------------------------------------------------------------------------


def released(root, entries, kind="img"):
    """Write a file of the authors' bank, the pickle of a dictionary; returns its path."""
    path = root / "annotations" / "memory_bank" / f"0.4_mbank_{kind}_idx.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, entries)
    return path


GOOD_IMAGES, GOOD_CAPTIONS = {str(k): 2 * k for k in range(3)}, {str(k): k for k in range(6)}


@pytest.fixture
def authors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


class ForgedType:
    """numpy.dtype of objects that claims to be plain: what is in the file becomes pointers.
    Restricting what is called is not enough: a dtype's own state setter trusts the file."""

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


PAYLOADS = [Harm(), print, np.zeros, os.system, complex(1), ForgedArray()]


@pytest.mark.parametrize("content", [
    *({**GOOD_IMAGES, "1": value} for value in (
        "text", None, 0.5, True, 6, -1, 10**30, [1], (1,), b"\0" * 8, np.array(["a"]),
        np.float64(2), np.array([1, 2]), np.array([1], dtype=object), nested(30), {"a": 1},
        np.datetime64("2020-01-01"), ForgedArray(), ForgedScalar())),
    *({**GOOD_IMAGES, "more": payload} for payload in PAYLOADS), *PAYLOADS,
    np.array([[1, 2], 3], dtype=object), np.arange(5)])
def test_authors_bank_with_other_content(authors, content):
    pairs, root = authors
    released(root, content)
    refused_bank(pairs, root)


def test_half_of_the_authors_bank(authors):
    pairs, root = authors
    path = released(root, {"0": 0}, "txt")
    refused_bank(pairs, root)
    path.unlink()
    refused_bank(pairs, root)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_authors_bank_with_random_damage(authors, seed):
    pairs, root = authors
    path = released(root, GOOD_IMAGES)
    path.write_bytes(damaged(path.read_bytes(), random.Random(seed), [1, 2, 4]))
    try:
        load(root, pairs)
    except InputError as error:
        assert "\n" not in str(error)


# ---- odd names that are good --------------------------------------------------------------------


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


def in_latin_1():
    """Hook: the terminal cannot show every letter."""
    sys.stdout.reconfigure(encoding="latin-1")
    sys.stderr.reconfigure(encoding="latin-1")


def test_names_that_are_not_utf8_and_letters_that_a_terminal_lacks(trained, tmp_path):
    root, logs = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"), tmp_path / "犬"
    shutil.copytree(trained.data.root, root)
    argv = [*trained.data.options, *trained.argv, "--dataset_root", root, "--image_cache",
            root + "/cache", "--checkpoint_path", str(logs)]
    said = run(main_CLIP.main, argv, tmp_path / "out", hook=in_latin_1)
    for text in (said, (logs / "ex0" / "log.txt").read_text()):
        assert f"{tmp_path}/caf\\udce9/annotations" in text
