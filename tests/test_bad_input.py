"""Bad input: one clear line on stderr, a status that is not 0, nothing left half-written."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, banks, options, tree, write_lines

import clip
import construct_noise
import get_memorybank
import main_CLIP
import main_NPC
from clip.weights import CONFIGS
from data import retrieval_split

COMMANDS = {"construct_noise": construct_noise.main, "get_memorybank": get_memorybank.main,
            "main_CLIP": main_CLIP.main, "main_NPC": main_NPC.main}
TRAINING = ["main_CLIP", "main_NPC"]
LOGS = ("options.json", "options_eval.json", "log.txt", ".lock")


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Function: run a command that must fail; returns its one line. It may leave its log and its
    options, whole files that were asked for (`leaves`, by their names), and nothing else."""

    def run(command, data, *more, leaves=(), words=()):
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
            assert name in LOGS or name in leaves or name.startswith("events.out.tfevents"), file
            if name.endswith(".json"):
                json.loads((tmp_path / file).read_text())
        return lines[0]

    return run


# ---- the data -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("command, file, more", [
    ("construct_noise", "train_caps.txt", []),
    ("get_memorybank", "train_ids.txt", []),
    ("get_memorybank", "image_name.txt", []),
    ("main_NPC", "train_caps.txt", ["--noise_ratio", "0.4"]),
    ("main_NPC", "train_ids.txt", ["--noise_ratio", "0.4"]),
    ("main_CLIP", "train_ids.txt", []),
    ("main_CLIP", "dev_ids.txt", []),
    ("main_CLIP", "dev_caps.txt", []),
    ("main_CLIP", "test_ids.txt", ["--eval"]),
    ("main_NPC", "test_caps.txt", ["--eval"])])
def test_missing_split_file(refused, dataset, command, file, more):
    data = dataset("f30k")
    (data.split_folder / file).unlink()
    refused(command, data, *more, words=[data.split_folder / file, "does not exist"])


@pytest.mark.parametrize("command", ["get_memorybank", "main_CLIP", "main_NPC"])
def test_missing_images_are_counted_and_the_first_named(refused, dataset, command):
    data = dataset("coco")
    missing = [data.name(i) for i in data.ids["train"][3:9]]
    for name in missing:
        (data.root / "images" / name).unlink()
    line = refused(command, data, words=["6 images are missing", *missing[:3],
                                         data.root / "images"])
    assert missing[4] not in line


def test_missing_images_of_the_evaluated_split(refused, dataset):
    data = dataset("cc")
    (data.root / "images" / data.name(data.ids["test"][2])).unlink()
    refused("main_CLIP", data, "--eval", words=[data.name(data.ids["test"][2]), "1 image"])


@pytest.mark.parametrize("command", ["get_memorybank", "main_CLIP", "main_NPC"])
def test_ids_and_captions_that_do_not_add_up(refused, dataset, command):
    data = dataset("coco")
    refused(command, data, "--num_anns", "4", "--noise_ratio", "0.4",
            words=["train_ids.txt has 12 lines", "train_caps.txt has 60", "--num_anns 5 would fit"])
    write_lines(data.split_folder / "train_caps.txt", data.lines("train_caps.txt")[:-1])
    refused(command, data, "--noise_ratio", "0.4",
            words=["train_ids.txt has 12 lines", "train_caps.txt has 59", "cut short"])


def test_noise_file_of_other_length(refused, dataset):
    data = dataset("coco")
    write_lines(data.split_folder / "0.4_noise_train_caps.txt", ["a"] * 50)
    refused("main_NPC", data, "--noise_ratio", "0.4",
            words=["train_ids.txt has 12", "0.4_noise_train_caps.txt has 50"])


@pytest.mark.parametrize("split, more", [("dev", []), ("test", ["--eval"])])
def test_ids_and_captions_of_the_other_splits(refused, dataset, split, more):
    data = dataset("cc")
    write_lines(data.split_folder / f"{split}_caps.txt", data.lines(f"{split}_caps.txt") * 2)
    n = len(data.lines(f"{split}_ids.txt"))
    line = refused("main_CLIP", data, *more, words=[f"{split}_ids.txt has {n}",
                                                    f"{split}_caps.txt has {2 * n}"])
    assert "--num_anns" not in line


def break_image(path, how):
    whole = path.read_bytes()
    content = {"text": b"hello", "cut": whole[: len(whole) - len(whole) // 4]}[how]
    path.write_bytes(content)


@pytest.mark.parametrize("command, how, workers", [
    ("get_memorybank", "text", 0), ("get_memorybank", "cut", 2), ("main_CLIP", "text", 2),
    ("main_CLIP", "cut", 0)])
def test_undecodable_image_is_named(refused, dataset, command, how, workers):
    """Before training, although the header of one that is cut short can be read."""
    data = dataset("f30k")
    path = data.root / "images" / data.name(data.ids["train"][7])
    break_image(path, how)
    before = set(multiprocessing.active_children())
    line = refused(command, data, "--num_workers", workers, "--batch_size", "60", "--data_on",
                   "workers", words=["an image or is damaged"])
    assert line.startswith(f"error: {path} is not")
    left = set(multiprocessing.active_children()) - before
    assert not left  # they would be killed, loudly, when the interpreter ends


def test_broken_images_are_counted_before_training(refused, dataset):
    data = dataset("f30k")
    for k, how in ((2, "text"), (5, "cut"), (7, "text"), (9, "cut")):
        break_image(data.root / "images" / data.name(data.ids["train"][k]), how)
    line = refused("main_CLIP", data, words=["4 images cannot be read: "])
    assert line.count("is not an image or is damaged") == 3


@pytest.mark.parametrize("content, line, what", [
    (["a", "", "b"], 2, "empty"), (["a", "b", "  \t"], 3, "empty"),
    (["a", "\udcff"], 2, "UTF-8")])
@pytest.mark.parametrize("command", ["construct_noise", "main_NPC"])
def test_bad_caption_lines_are_named(refused, dataset, command, content, line, what):
    data = dataset("cc")
    path = data.split_folder / "train_caps.txt"
    path.write_bytes("\n".join(content).encode(errors="surrogateescape") + b"\n")
    refused(command, data, "--noise_ratio", "0.4", words=[path, f"line {line}", what])


@pytest.mark.parametrize("file, more", [("dev_caps.txt", []), ("test_caps.txt", ["--eval"]),
                                        ("train_ids.txt", []), ("dev_ids.txt", [])])
def test_empty_lines_elsewhere(refused, dataset, file, more):
    data = dataset("cc")
    lines = data.lines(file)
    lines[2] = ""
    write_lines(data.split_folder / file, lines)
    refused("main_CLIP", data, *more, words=[data.split_folder / file, "line 3", "empty"])


def test_too_long_captions_warn_and_train(dataset, tmp_path, capsys):
    data = dataset("cc")
    captions = data.lines("train_caps.txt")
    captions[3] = "word " * 200
    write_lines(data.split_folder / "train_caps.txt", captions)
    main_CLIP.main([*data.options, "--vision_model", "tiny", "--device", "cpu", "--num_workers",
                    "0", "--batch_size", "12", "--epochs", "1", "--checkpoint_path", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("longer than 77 tokens") == 1 and "warning: 1 caption" in out


@pytest.mark.parametrize("image_id", ["../../etc/passwd", "a/b"])
def test_string_id_that_is_no_file_name(refused, dataset, image_id):
    data = dataset("cc")
    write_lines(data.split_folder / "train_ids.txt", [image_id, *data.lines("train_ids.txt")[1:]])
    refused("main_CLIP", data, words=[f"'{image_id}'"])


@pytest.mark.parametrize("layout, image_id", [("coco", "x12"), ("coco", "-3"), ("coco", "1.5"),
                                              ("f30k", "²"), ("f30k", "dog.jpg"), ("f30k", "45")])
def test_id_that_does_not_fit_the_layout(refused, dataset, layout, image_id):
    data = dataset(layout)
    write_lines(data.split_folder / "train_ids.txt", [*data.lines("train_ids.txt")[:-1], image_id])
    refused("main_CLIP", data, words=[image_id])


def test_dataset_of_another_layout(refused, dataset):
    data = dataset("cc")
    refused("main_CLIP", data, "--dataset", "coco", "--num_anns", "1", words=["--dataset coco"])


# ---- options ------------------------------------------------------------------------------------


OUT_OF_RANGE = {
    "--noise_ratio": ["1", "1.5", "-0.1", "nan", "inf", "half", ""], "--batch_size": ["0", "1"],
    "--epochs": ["0", "2.5"], "--lr": ["nan", "-1"], "--beta2": ["1"], "--context_length": ["1"],
    "--seed": [str(2**32), "-1"], "--num_workers": ["-1"], "--dev_length": ["0"],
    "--display": ["0"], "--num_anns": ["0"], "--dataset": ["flickr"], "--precision": ["fp8"],
    "--device": ["abacus"], "--recipe": ["mine"], "--eval_batch_size": ["0"], "--warmup": ["-1"],
    "--eps": ["x"], "--weight_decay": ["-0.1"], "--weighting": ["soft"],
    "--memory_loss_weight": ["-1"], "--clean_threshold": ["1.5"], "--min_clean": ["2"]}


@pytest.mark.parametrize("command, option, value", [
    *(("main_NPC", option, value) for option, values in OUT_OF_RANGE.items() for value in values),
    *((command, "--noise_ratio", "1") for command in COMMANDS if command != "main_NPC")])
def test_option_outside_its_range(refused, datasets, command, option, value):
    expected = "0 to below 1" if option == "--noise_ratio" else ""
    refused(command, datasets["cc"], f"{option}={value}", words=[option, f"'{value}'", expected])


@pytest.mark.parametrize("command, option", [
    ("main_NPC", "--weightning"), ("main_CLIP", "--weighting=none"), ("main_NPC", "--epoch=3"),
    ("construct_noise", "--epochs=3")])
def test_unknown_option(refused, datasets, command, option):
    refused(command, datasets["cc"], option, words=[option])


def test_context_length_beyond_the_model(refused, datasets):
    refused("main_CLIP", datasets["cc"], "--context_length", "78", words=["--context_length", "77"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(refused, datasets):
    refused("main_CLIP", datasets["cc"], "--device", "cuda", words=["--device cuda"])


@pytest.mark.parametrize("command", TRAINING)
def test_batch_size_larger_than_the_training_set(refused, dataset, command):
    refused(command, dataset("cc"), "--batch_size", "13", "--noise_ratio", "0.4",
            words=["--batch_size 13", "12 pairs"], leaves=["0.4_noise_train_caps.txt"])


@pytest.mark.parametrize("command", TRAINING)
def test_checkpoint_path_below_a_file(refused, datasets, tmp_path, command):
    (tmp_path / "file").write_text("hello")
    for path in (tmp_path / "file", tmp_path / "file" / "logs"):
        refused(command, datasets["cc"], "--checkpoint_path", path, words=[path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", TRAINING)
def test_read_only_checkpoint_path(refused, datasets, tmp_path, command):
    path = tmp_path / "logs"
    path.mkdir(mode=0o555)
    refused(command, datasets["cc"], "--checkpoint_path", path, words=[path, "cannot write"])


def test_steps_that_are_not_finite(refused, datasets):
    refused("main_CLIP", datasets["f30k"], "--lr", "1e30", "--epochs", "2", "--warmup", "0",
            words=["not finite", "--lr"])


# ---- memory banks -------------------------------------------------------------------------------


def test_bank_out_of_range(refused, dataset):
    data = dataset("cc")
    words = ["--noise_ratio", "0.4", "--vision_model", "tiny", "--batch_size", "8"]
    get_memorybank.main([*data.options, *words, "--device", "cpu", "--num_workers", "0"])
    (path,) = banks(data.root).values()
    with np.load(path) as old:
        arrays = {key: old[key] for key in old.files}
    arrays["caption_entry"][4] = 12
    np.savez(path, **arrays)
    refused("main_NPC", data, *words, words=[path, "pair 12", "0 to 11"])


def test_authors_bank_has_no_posterior_to_weight_with(refused, dataset):
    data = dataset("cc")
    get_memorybank.main([*data.options, "--vision_model", "tiny", "--device", "cpu",
                         "--num_workers", "0", "--format", "released"])
    refused("main_NPC", data, "--weighting", "gmm", words=["--weighting", "get_memorybank.py"])


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save({"state_dict": clip.CLIP(**CONFIGS["tiny"]).state_dict()}, path)
    return path


@pytest.mark.parametrize("other, named", [("RN50", "RN50"), ("small.pt", "vision_layers 1")])
def test_checkpoint_of_another_architecture(refused, datasets, checkpoint, tmp_path, other, named):
    if other == "small.pt":
        other = tmp_path / other
        torch.save(clip.CLIP(**CONFIGS["tiny"] | {"vision_layers": 1}).state_dict(), other)
    for command in TRAINING:
        refused(command, datasets["cc"], "--resume", checkpoint, "--vision_model", other,
                words=[checkpoint, "tiny", named])


@pytest.mark.parametrize("option", ["--resume", "--vision_model"])
@pytest.mark.parametrize("content", ["text", "empty", "tensors", "list", "directory", "cut",
                                     "absent"])
def test_not_a_checkpoint(refused, datasets, checkpoint, tmp_path, content, option):
    path = tmp_path / "what.pt"
    if content == "directory":
        path.mkdir()
    elif content in ("tensors", "list"):
        torch.save({"a": torch.ones(2)} if content == "tensors" else [1, 2], path)
    elif content != "absent":
        whole = checkpoint.read_bytes()
        path.write_bytes({"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2]}[content])
    refused("main_CLIP", datasets["cc"], "--eval", option, path, words=[path])
    if option == "--vision_model" and content == "tensors":
        refused("main_CLIP", datasets["cc"], "--resume", checkpoint, option, path, words=[path])


class Harm:
    def __reduce__(self):
        return (open, ("harm_was_done", "w"))


@pytest.mark.parametrize("save", [lambda x, path: torch.save(x, path),
                                  lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_checkpoint_with_code_is_refused_and_not_run(refused, datasets, tmp_path, save):
    save({"state_dict": Harm()}, tmp_path / "harm.pt")
    refused("main_CLIP", datasets["cc"], "--eval", "--resume", tmp_path / "harm.pt",
            words=[tmp_path / "harm.pt"])
    assert not (tmp_path / "harm_was_done").exists()


@pytest.mark.parametrize("name", ["ViT-B/33", "ViT-B-32"])  # the latter is open_clip's spelling
def test_unknown_model(refused, datasets, name):
    refused("main_CLIP", datasets["cc"], "--vision_model", name,
            words=[f"{name}: no such file", "did you mean ViT-B/32?"])


def test_model_with_broken_weights(refused, datasets, tmp_path):
    model = clip.CLIP(**CONFIGS["tiny"])
    with torch.no_grad():
        model.visual.proj[0, 0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    for command in ("main_CLIP", "main_NPC"):
        refused(command, datasets["cc"], "--eval", "--vision_model", tmp_path / "nan.pt",
                words=["image features that are not finite"])


def test_checkpoint_of_the_other_script(refused, dataset, tmp_path):
    data = dataset("cc")
    main_CLIP.main([*data.options, "--vision_model", "tiny", "--device", "cpu", "--num_workers",
                    "0", "--batch_size", "8", "--epochs", "1", "--checkpoint_path", str(tmp_path)])
    refused("main_NPC", data, "--resume", tmp_path / "ex0" / "epoch1.pt", "--epochs", "2",
            words=[tmp_path / "ex0" / "epoch1.pt", "--vision_model"])


def test_coco_scores_of_too_few_images(refused, dataset):
    data = dataset("coco")
    for file in ("test_ids.txt", "test_caps.txt"):
        write_lines(data.split_folder / file, data.lines(file)[:20])
    refused("main_CLIP", data, "--eval", words=["test_caps.txt", "4 images"])


# ---- as processes -------------------------------------------------------------------------------


def process(script, *argv, cwd):
    return subprocess.run([sys.executable, ROOT / script, *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True)


def test_process_ends_with_a_status_and_one_line(tmp_path):
    result = process("construct_noise.py", "--dataset_root", "nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: nowhere/")
    assert tree(tmp_path) == set()


def test_process_with_workers_ends_with_a_status_and_one_line(dataset, tmp_path):
    data = dataset("f30k")
    path = data.root / "images" / data.name(data.ids["train"][2])
    break_image(path, "cut")
    result = process("main_NPC.py", *data.options, "--vision_model", "tiny", "--device", "cpu",
                     "--num_workers", "2", "--batch_size", "8", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {path} is not an image")
    assert not banks(data.root)


def test_helpers_of_these_tests_make_valid_data(datasets):
    for data in datasets.values():
        pairs = retrieval_split(options(data), "dev", clip.Preprocess(32), lambda _: None)
        assert len(pairs.images) == 4
