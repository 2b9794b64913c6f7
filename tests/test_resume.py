"""Runs that are interrupted, killed, resumed: the end is that of a run that was left alone."""

import functools
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import banks, make_dataset
from processes import BANK, CLIP, NPC, Started, differences, run, save_small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip
from params import parse_args
from utils.errors import InputError
from utils.method import passes
from utils.method.memorybank import bank_path
from utils.method.weightings import weighting
from utils.training import checkpoints, history, loop
from utils.training.interruptions import INTERRUPTED
from utils.training.loop import warmup_cosine

EPOCHS, BATCH, STEPS = 3, 7, 8  # 60 pairs: 8 steps an epoch
SCRIPTS = {"npc": (NPC, ["--recipe", "paper"]), "clip": (CLIP, ["--recipe", "released"]),
           "clean": (CLIP, ["--train_on", "clean", "--clean_threshold", "0.3", "--freeze", "text",
                            "--batch_size", "3"])}


def bank_of(folder, root):
    """The file of the bank that a run has used."""
    return bank_path(root, json.loads((folder / "options.json").read_text())["bank"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set and a small model."""
    data = make_dataset(tmp_path_factory.mktemp("resume") / "data", "f30k")
    data.model = save_small(data.root / "model.pt")
    return data


def arguments(data, script, logs, *more):
    return [*data.options, "--vision_model", str(data.model), "--context_length", "12",
            "--batch_size", str(BATCH), "--epochs", str(EPOCHS), "--lr", "1e-3", "--warmup", "3",
            "--noise_ratio", "0.4", "--num_workers", "0", "--device", "cpu", "--display", "5",
            "--keep_checkpoints", "0", *SCRIPTS[script][1], "--checkpoint_path", str(logs),
            "--experiments", "x", *map(str, more)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Folder of each script's run that nothing interrupts."""
    folders = {}
    for script, (main, _) in SCRIPTS.items():
        logs = tmp_path_factory.mktemp(script)
        run(main, arguments(data, script, logs), logs / "out")
        folders[script] = logs / "x"
    return folders


@pytest.fixture
def train(data, tmp_path):
    """Function: run a script to its end, which must be `status`; returns what it said."""
    number = itertools.count()

    def train(script, *more, status=0, hook=None):
        argv = arguments(data, script, tmp_path, *more)
        return run(SCRIPTS[script][0], argv, tmp_path / f"out{next(number)}", status, hook)

    return train


@pytest.fixture
def copied(whole, tmp_path):
    """Function: a fresh copy of an uninterrupted run; returns its folder."""

    def copy(script="npc"):
        shutil.copytree(whole[script], tmp_path / "x")
        return tmp_path / "x"

    return copy


def read(path):
    """The content of a checkpoint but for options that say nothing about the result."""
    content = clip.read_checkpoint(path)
    for name in ("resume", "save_every", "keep_checkpoints", "checkpoint_path", "num_workers",
                 "data_on", "dataset_root", "experiments"):
        content["args"].pop(name)
    return content


def assert_same(folder, expected, names=("epoch2.pt", "epoch3.pt", "best.pt")):
    """Both runs ended alike, bit for bit."""
    for name in names:
        assert differences(read(folder / name), read(expected / name)) == [], name
    assert (folder / "log.jsonl").read_text() == (expected / "log.jsonl").read_text()
    if (expected / "weights.npz").exists():
        w, w0 = (np.load(f / "weights.npz")["w"] for f in (folder, expected))
        np.testing.assert_array_equal(w, w0)
        assert np.isfinite(w).sum() == EPOCHS * STEPS * BATCH


def after_step(step, action):
    """Hook of a process: do something right after an optimiser step."""
    add = history.History.add

    def add_and_act(self, done, *rest):
        add(self, done, *rest)
        if done == step:
            action()

    history.History.add = add_and_act


def signal_group(number):
    os.killpg(0, number)  # workers are in it too


def signalled(step, number):
    return functools.partial(after_step, step, functools.partial(signal_group, number))


# ---- exact resume -------------------------------------------------------------------------------


@pytest.mark.parametrize("script, step, number, more, resumed_at", [
    ("npc", 3, signal.SIGTERM, [], 3),
    ("npc", 8, signal.SIGTERM, [], 8),  # the last step of an epoch: saved with its dev scores
    ("npc", 12, signal.SIGINT, ["--num_workers", 2, "--data_on", "workers"], 12),
    ("clip", 18, signal.SIGTERM, ["--num_workers", 2, "--data_on", "workers"], 18),
    ("npc", 14, signal.SIGKILL, ["--save_every", 3], 12),
    ("npc", 8, signal.SIGKILL, ["--save_every", 4], 4),  # not saved twice at an epoch's end
    ("clip", 3, signal.SIGKILL, [], 0),
    ("clean", 11, signal.SIGTERM, [], 11),
])
def test_resumed_run_ends_where_an_uninterrupted_one_does(
        train, whole, tmp_path, script, step, number, more, resumed_at):
    argv = [script, "--resume", "auto", *more]
    status = -number if number == signal.SIGKILL else INTERRUPTED
    said = train(*argv, status=status, hook=signalled(step, number))
    assert "nothing to resume from" in said
    place = f"epoch {step // STEPS}" if step % STEPS == 0 else f"step {step}"
    assert (f"interrupted after {place}; a checkpoint is saved" in said) == (status == INTERRUPTED)
    assert "Traceback" not in said
    before = checkpoints.newest(tmp_path / "x", print)
    assert (clip.read_checkpoint(before)["step"] if before else 0) == resumed_at

    said = train(*argv)
    assert (f"resuming from {before}" if before else "nothing to resume from") in said
    assert_same(tmp_path / "x", whole[script])


def keeps_a_history():
    """Hook: a weighting that depends on the mean loss of a pair in earlier epochs."""
    @weighting("history", "half for pairs whose loss grew", keeps=("mean", "seen"))
    def history(batch, indices, mean, seen, **_):
        grew = (seen[indices] > 0) & (batch > mean[indices])
        mean[indices] = (mean[indices] * seen[indices] + batch) / (seen[indices] + 1)
        seen[indices] += 1
        return 1 - grew.to(batch.dtype) / 2


def test_what_a_weighting_keeps_comes_back(train, tmp_path):
    """Killed and resumed, a run whose w depends on a history ends like an uninterrupted one."""
    argv = ["npc", "--weighting", "history", "--save_every", 5]
    train(*argv, "--experiments", "whole", hook=keeps_a_history)
    train(*argv, status=-signal.SIGKILL, hook=killed_with_a_history)
    train(*argv, "--resume", "auto", hook=keeps_a_history)
    assert_same(tmp_path / "x", tmp_path / "whole")
    kept = read(tmp_path / "x" / "epoch3.pt")["kept"]
    assert (kept["seen"] >= 1).all() and kept["seen"].sum() == EPOCHS * STEPS * BATCH
    assert (np.load(tmp_path / "x" / "weights.npz")["w"] == 0.5).any()


def killed_with_a_history():
    keeps_a_history()
    signalled(17, signal.SIGKILL)()


def test_resume_by_path_continues_in_another_folder(train, whole, tmp_path):
    """Best scores come along, and so does best.pt where its epoch lies beside the checkpoint."""
    for epoch in (1, 2):
        logs = tmp_path / str(epoch)
        train("npc", "--resume", whole["npc"] / f"epoch{epoch}.pt", "--checkpoint_path", logs)
        assert_same(logs / "x", whole["npc"], ["epoch3.pt", "best.pt"])


def better(path, epoch, score):
    """Make the dev score of an epoch in a checkpoint's history a better one."""
    content = clip.read_checkpoint(path)
    lines = [json.loads(line) for line in content["history"]["lines"]]
    lines[epoch - 1]["dev"]["mean_R1"] = score
    content["history"]["lines"] = [json.dumps(line) for line in lines]
    torch.save(content, path)


@pytest.mark.parametrize("gone", [[], ["epoch1.pt"], ["epoch1.pt", "best.pt"]])
def test_best_of_an_earlier_epoch_comes_along(train, copied, tmp_path, gone):
    """best.pt is the best epoch's in another folder too, if a file there still holds that epoch;
    if none does, the log says among which epochs best.pt is chosen."""
    folder = copied("clip")
    better(folder / "epoch2.pt", 1, 99.0)
    checkpoints.hard_link(folder / "epoch1.pt", folder / "best.pt")
    best = read(folder / "best.pt")
    for name in gone:
        (folder / name).unlink()
    said = train("clip", "--resume", folder / "epoch2.pt", "--experiments", "y")
    lost = "best.pt" in gone
    assert (differences(read(tmp_path / "y" / "best.pt"), best) == []) == (not lost)
    assert ("best.pt is chosen among the epochs from 2 on" in said) == lost
    assert ("best.pt is epoch 1, dev R@1" in said) == (not lost)


def test_ties_go_to_the_later_epoch_and_are_told(train, tmp_path):
    said = train("clip", "--lr", 0)
    told = re.findall("best so far: epoch ([0-9]), .* in (.*)", said)
    assert told == [(str(epoch), str(tmp_path / "x" / "best.pt")) for epoch in (1, 2, 3)]
    assert clip.read_checkpoint(tmp_path / "x" / "best.pt")["epoch"] == 3


def test_other_dev_captions_are_refused(train, copied):
    """Scores of two dev sets do not compete: --force_resume chooses best.pt among what comes."""
    folder = copied("clip")
    better(folder / "epoch2.pt", 1, 99.0)
    (folder / "epoch3.pt").unlink()
    argv = ["clip", "--resume", "auto", "--dev_length", 15]
    said = train(*argv, status=2)
    assert "was scored on other dev captions" in said.splitlines()[-1]
    said = train(*argv, "--force_resume")
    assert re.search("best.pt is epoch [23], dev", said)


@pytest.mark.parametrize("function", ["loop.evaluate", "history.History.record",
                                      "checkpoints.hard_link", "history.atomic_write"])
def test_run_killed_after_its_checkpoint(train, whole, tmp_path, function):
    """No finished epoch is lost, wherever the run dies between an epoch's checkpoint and the end
    of its records: the resumed run scores it and gives best.pt."""
    argv = ["npc", "--resume", "auto"]
    train(*argv, status=-signal.SIGKILL, hook=functools.partial(dies_at, function))
    assert "epoch1.pt" in [path.name for path in (tmp_path / "x").glob("*.pt")]
    said = train(*argv)
    assert "epoch 1, step" not in said
    assert_same(tmp_path / "x", whole["npc"])


def dies_at(function):
    """Hook: die where a function is called once epoch 1 is on disk."""
    module, *inner, name = function.split(".")
    owner = functools.reduce(getattr, inner, globals()[module])
    real = getattr(owner, name)

    def call_or_die(*arguments):
        if checkpoints_saved:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    checkpoints_saved, save = [], checkpoints.save
    checkpoints.save = lambda *arguments: (save(*arguments), checkpoints_saved.append(1))
    setattr(owner, name, call_or_die)


def test_scores_of_the_reference_tell_epochs_apart(whole):
    """What the tests compare is not all zero: the loss moves, weights differ, best.pt is chosen."""
    lines = [json.loads(line) for line in (whole["npc"] / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert len({line["loss"] for line in lines}) == 3
    w = np.load(whole["npc"] / "weights.npz")["w"]
    assert len(np.unique(w[np.isfinite(w)])) > 10
    states = [read(whole["npc"] / f"epoch{k}.pt") for k in (1, 2, 3)]
    assert any(place.startswith("/state_dict") for place in differences(states[0], states[1]))
    assert any(differences(read(whole["npc"] / "best.pt"), state) == [] for state in states)


def test_a_frozen_tower_and_a_clean_set(data, whole):
    """The tower keeps its weights exactly; the log says how many pairs are trained on, and an
    epoch is one pass over these: its steps, its rates and its lines."""
    start = clip.read_checkpoint(data.model)
    end = read(whole["clean"] / "epoch3.pt")
    for name, value in end["state_dict"].items():
        frozen = not name.startswith("visual.") and name != "logit_scale"
        assert torch.equal(value, start[name]) == frozen, name
    towers = [name for name in start if name.startswith("visual.")]
    assert len(end["optimizer"]["state"]) == len(towers) + 1
    clean = np.load(bank_of(whole["clean"], data.root))["clean"]
    steps = clean.sum() // 3
    assert end["step"] == EPOCHS * steps and 3 < steps < 20
    log = (whole["clean"] / "log.txt").read_text()
    assert (f"training: {clean.sum()} of 60 pairs ({clean.mean():.1%}), batch size 3, "
            f"{steps} steps an epoch") in log
    assert f"epoch 3, step {steps} of {steps}: " in log
    lines = [json.loads(line) for line in (whole["clean"] / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([
        warmup_cosine(epoch * steps - 1, 1e-3, 3, EPOCHS * steps) for epoch in (1, 2, 3)])


def test_finished_run_resumed_does_nothing(train, copied):
    folder = copied()
    names = ["epoch3.pt", "best.pt", "log.jsonl", "weights.npz"]
    before = [(folder / name).read_bytes() for name in names]
    argv = ["npc", "--resume", "auto"]
    said = train(*argv)
    assert "has done 3 epochs already: nothing left of --epochs 3" in said
    said = train(*argv, "--epochs", "2", status=2)
    assert "3 epochs and 24 steps of --epochs 2 are done" in said.splitlines()[-1]
    assert [(folder / name).read_bytes() for name in names] == before


def test_another_batch_size_goes_on_from_the_end_of_an_epoch(train, copied, tmp_path):
    """Epochs are counted, not steps: none is missing, and none stands twice in log.jsonl."""
    folder = copied("clip")
    argv = ["clip", "--force_resume", "--batch_size", 14, "--epochs", 4, "--experiments", "y",
            "--resume"]
    train(*argv, folder / "epoch2.pt")
    lines = [json.loads(x) for x in (tmp_path / "y" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert clip.read_checkpoint(tmp_path / "y" / "epoch4.pt")["step"] == 2 * STEPS + 2 * 4

    state = clip.read_checkpoint(folder / "epoch2.pt")
    torch.save({**state, "batch": 3, "step": 2 * STEPS + 3}, folder / "step19.pt")
    said = train(*argv, folder / "step19.pt", "--overwrite", status=2)
    assert ("stopped within an epoch of 8 steps, and an epoch has 4 now; continue from the end of "
            "an epoch (epoch2.pt)") in said.splitlines()[-1]


def test_resume_needs_no_other_option(data, copied):
    """Options that are not given are the checkpoint's, its folder is the run's, and --eval scores
    on the data of the run."""
    folder = copied()
    best, end = read(folder / "best.pt"), read(folder / "epoch3.pt")
    (folder / "epoch3.pt").unlink()
    said = run(NPC, ["--resume", str(folder / "epoch2.pt")], folder.parent / "out")
    assert "options changed" not in said
    assert differences(read(folder / "epoch3.pt"), end) == []
    said = run(NPC, ["--eval", "--resume", str(folder / "best.pt")], folder.parent / "out2")
    assert "Flickr30K, initial" in said and differences(read(folder / "best.pt"), best) == []
    assert json.loads((folder / "eval_test.json").read_text())["initial"]["rsum"] > 0
    state = clip.read_checkpoint(folder / "best.pt")  # of a run with --compile on a GPU
    torch.save({**state, "args": state["args"] | {"compile": True}}, folder / "best.pt")
    run(NPC, ["--eval", "--resume", str(folder / "best.pt")], folder.parent / "out3")


def test_a_run_ends_with_what_it_made(whole):
    log = (whole["npc"] / "log.txt").read_text()
    lines = [json.loads(x) for x in (whole["npc"] / "log.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["dev"]["mean_R1"], line["epoch"]))
    assert f"best.pt is epoch {best['epoch']}, dev R@1 i2t {best['dev']['i2t_R@1']:.2f}" in log
    initial = clip.read_checkpoint(whole["npc"] / "epoch3.pt")["history"]["initial"]
    assert f"initial model: R@1 i2t {initial['i2t_R@1']:.2f}" in log
    assert log.rstrip().endswith(f"--eval --resume {whole['npc'] / 'best.pt'}")


def test_more_epochs_go_on_from_the_last(train, copied):
    folder = copied()
    said = train("npc", "--resume", "auto", "--epochs", 4)
    assert re.search("options changed since the checkpoint: .*--epochs 3 -> 4", said)
    assert clip.read_checkpoint(folder / "epoch4.pt")["step"] == 4 * STEPS
    w = np.load(folder / "weights.npz")["w"]
    assert w.shape == (4, 60) and np.isfinite(w).sum() == 4 * STEPS * BATCH


# ---- while a checkpoint is written ---------------------------------------------------------------


def before_writing(step, action):
    """Hook: do something right before `step{step}.pt` is written."""
    save = checkpoints.save

    def act_and_save(path, content):
        if path.name == f"step{step}.pt":
            action()
        save(path, content)

    checkpoints.save = act_and_save


def test_sigterm_while_a_checkpoint_is_written(train, whole, tmp_path):
    """That one gets whole, and the run ends after it."""
    argv = ["npc", "--resume", "auto", "--save_every", 4]
    hook = functools.partial(before_writing, 4, functools.partial(signal_group, signal.SIGTERM))
    said = train(*argv, status=INTERRUPTED, hook=hook)
    assert [step for step, path in checkpoints.by_step(tmp_path / "x")
            if checkpoints.intact(path)] == [5, 4]
    assert "interrupted after step 5;" in said
    train(*argv)
    assert_same(tmp_path / "x", whole["npc"])


def test_killed_while_an_epoch_is_written(train, whole, tmp_path):
    """The epochs before it are intact; neither best.pt nor log.jsonl has it."""
    argv, folder = ["npc", "--resume", "auto"], tmp_path / "x"
    train(*argv, status=-signal.SIGKILL, hook=die_before_epoch_2_is_named)
    assert {path.name for path in folder.glob("*.pt")} == {"epoch1.pt", "best.pt"}
    for name in ("epoch1.pt", "best.pt"):
        assert differences(read(folder / name), read(whole["npc"] / "epoch1.pt")) == []
    assert len((folder / "log.jsonl").read_text().splitlines()) == 1
    assert "epoch 2: dev" not in (folder / "log.txt").read_text()
    assert len(list(folder.glob(".epoch2.pt.*.unfinished"))) == 1
    (folder / ".best.pt.unfinished").write_bytes(b"cut")
    (folder / ".mine").write_text("a user's own")
    assert checkpoints.newest(folder, print) == folder / "epoch1.pt"
    train(*argv)
    assert_same(folder, whole["npc"])
    assert not list(folder.glob(".*.unfinished")) and (folder / ".mine").exists()


def die_before_epoch_2_is_named():
    save = torch.save

    def save_and_die(content, f):
        save(content, f)
        if content["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_and_die


# ---- which checkpoint, which options ------------------------------------------------------------


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content) // 4, len(content) * 3 // 4)] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[:-rng.randrange(1, 3_000_000)]),
    "empty": lambda path, rng: path.write_bytes(b""),
    "garbage": lambda path, rng: path.write_bytes(rng.randbytes(5000)),
    "folder": lambda path, rng: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_takes_the_one_before_a_damaged_one(copied, damage):
    folder, rng = copied(), random.Random(damage)
    DAMAGES[damage](folder / "epoch3.pt", rng)
    said = []
    assert checkpoints.newest(folder, said.append) == folder / "epoch2.pt"
    assert said == [f"warning: {folder / 'epoch3.pt'} is damaged; taking the one before"]


def test_every_flipped_byte_is_seen_or_harmless(copied):
    folder, rng = copied(), random.Random(0)
    path = folder / "epoch1.pt"
    original, good = path.read_bytes(), read(path)
    seen = 0
    for _ in range(25):
        flip(path, rng)
        if checkpoints.intact(path):
            assert differences(read(path), good) == []
        else:
            seen += 1
        path.write_bytes(original)
    assert seen > 20 and checkpoints.intact(path)


def test_run_whose_newest_checkpoint_is_damaged(train, whole, copied):
    """--resume auto takes the one before; the damaged one by its path is refused."""
    folder = copied()
    with zipfile.ZipFile(folder / "epoch3.pt") as archive:  # a byte that torch would take as it is
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray((folder / "epoch3.pt").read_bytes())
    content[entry.header_offset + entry.file_size // 2] ^= 0x10
    (folder / "epoch3.pt").write_bytes(content)
    clip.read_checkpoint(folder / "epoch3.pt")  # is content with it
    said = train("npc", "--resume", folder / "epoch3.pt", status=2)
    assert "epoch3.pt is damaged: its checksums do not fit" in said.splitlines()[-1]
    said = train("npc", "--resume", "auto")
    assert "epoch3.pt is damaged" in said and f"resuming from {folder / 'epoch2.pt'}" in said
    assert_same(folder, whole["npc"])


@pytest.mark.parametrize("change, word", [
    (["--batch_size", 6], "--batch_size 7 -> 6"),
    (["--recipe", "released"], "--recipe paper -> released"),
    (["--noise_ratio", 0, "--seed", 1],
     "--noise_ratio 0.4 -> 0.0, --seed 99 -> 1"),
])
def test_options_that_make_it_another_run_are_refused(train, copied, change, word):
    folder = copied()
    said = train("npc", "--resume", folder / "epoch3.pt", *change, status=2).splitlines()
    changed = [line for line in said if line.startswith("options changed")]
    assert len(changed) == 1 and word in changed[0]
    assert said[-1].startswith("error: ") and word in said[-1] and "--force_resume" in said[-1]


def test_force_resume_insists_and_other_options_are_listed_in_one_line(train, copied):
    folder = copied()
    (folder / "epoch3.pt").unlink()
    said = train("npc", "--resume", folder / "epoch2.pt", "--batch_size", 10, "--force_resume",
                 "--weight_decay", 0.5, "--beta1", 0.8)
    (line,) = (line for line in said.splitlines() if line.startswith("options changed"))
    for word in ("--batch_size 7 -> 10", "--weight_decay 0.2 -> 0.5", "--beta1 0.9 -> 0.8"):
        assert word in line
    group = clip.read_checkpoint(folder / "epoch3.pt")["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and group["betas"][0] == 0.8  # the new ones are used


def test_other_pairs_or_memory_entries_are_refused(data, train, copied, tmp_path):
    folder = copied()
    shutil.copytree(data.root, tmp_path / "data")
    captions = tmp_path / "data" / "annotations" / "scan_split" / "0.4_noise_train_caps.txt"
    original = captions.read_text()
    bank = bank_of(folder, tmp_path / "data")
    build = [*data.options, "--dataset_root", str(tmp_path / "data"), "--vision_model",
             str(data.model), "--context_length", "12", "--noise_ratio", "0.4", "--device", "cpu",
             "--num_workers", "0", "--batch_size", str(BATCH)]
    for text, *more in ([original.replace("a", "b", 1)], [original, "--clean_threshold", "0.2"]):
        captions.write_text(text)
        shutil.rmtree(bank.parent)
        run(BANK, [*build, *more], tmp_path / "bank")
        banks(tmp_path / "data")["0.4_mbank"].rename(bank)
        said = train("npc", "--resume", folder / "epoch3.pt", "--dataset_root", tmp_path / "data",
                     status=2)
        assert "was trained on other pairs or memory entries" in said.splitlines()[-1]


@pytest.mark.parametrize("script, other", [("npc", "clip"), ("clip", "npc")])
def test_checkpoint_of_the_other_script_is_refused(train, whole, script, other):
    said = train(script, "--resume", whole[other] / "epoch1.pt", *SCRIPTS[other][1], status=2)
    said = said.splitlines()[-1]
    assert said.startswith("error: ") and "was trained by another script" in said
    train(script, "--vision_model", whole[other] / "epoch1.pt", "--epochs", 1)  # as advised


def test_two_checkpoints_are_kept_and_none_between_epochs(train, whole, tmp_path):
    argv = ["npc", "--keep_checkpoints", 2, "--save_every", 3]
    train(*argv, status=INTERRUPTED, hook=signalled(23, signal.SIGTERM))
    assert {p.name for p in (tmp_path / "x").glob("*.pt")} == {"step21.pt", "step23.pt", "best.pt"}
    train(*argv, "--resume", "auto")
    assert {p.name for p in (tmp_path / "x").glob("*.pt")} == {"epoch3.pt", "best.pt"}
    assert_same(tmp_path / "x", whole["npc"], ["epoch3.pt", "best.pt"])
    assert parse_args("npc", ["--seed", "1"]).keep_checkpoints == 2


def test_checkpoints_are_ordered_by_their_steps_whatever_their_times(tmp_path):
    steps = {"epoch1.pt": 4, "step5.pt": 5, "step6.pt": 6, "step10.pt": 10, "epoch2.pt": 12}

    def left(keep):
        for age, name in enumerate([*steps, "best.pt", "epoch3.pt"]):
            torch.save({"step": steps.get(name)}, tmp_path / name)
            os.utime(tmp_path / name, (9 - age, 9 - age))  # the last was written first
        (tmp_path / "epoch3.pt").write_text("damaged")
        assert checkpoints.newest(tmp_path, print) == tmp_path / "epoch2.pt"
        checkpoints.prune(tmp_path, keep)
        return [name for name in steps if (tmp_path / name).exists()]

    assert left(0) == ["epoch1.pt", "step6.pt", "step10.pt", "epoch2.pt"]
    assert left(3) == ["step6.pt", "step10.pt", "epoch2.pt"]
    assert left(1) == ["epoch2.pt"]
    assert (tmp_path / "best.pt").exists() and (tmp_path / "epoch3.pt").exists()


@pytest.mark.parametrize("step, number", [
    (12, signal.SIGTERM), (8, signal.SIGTERM), (11, signal.SIGKILL)])
def test_curves_have_one_point_a_step(train, tmp_path, step, number):
    """Those before a resume stay; none stands twice at the step of the resume."""
    argv = ["npc", "--resume", "auto"]
    status = -number if number == signal.SIGKILL else INTERRUPTED
    train(*argv, status=status, hook=signalled(step, number))
    train(*argv)
    events = EventAccumulator(str(tmp_path / "x"), {"histograms": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == [5, 8, 10, 15, 16, 20, 24]  # --display 5, and each epoch's end
    for tag in ("dev/mean_R1", "noise/auc_of_w"):
        assert [event.step for event in events.Scalars(tag)] == [8, 16, 24], tag
    assert [event.step for event in events.Histograms("w/all")] == [8, 16, 24]


def test_a_resumed_run_does_not_build_a_bank(data, train, copied, tmp_path):
    shutil.copytree(data.root, tmp_path / "data", ignore=shutil.ignore_patterns("*mbank*"))
    said = train("npc", "--resume", copied() / "epoch3.pt", "--dataset_root", tmp_path / "data",
                 status=2).splitlines()[-1]
    assert said.startswith("error: ") and "only the initial model" in said
    assert not list((tmp_path / "data").rglob("*mbank*"))


# ---- whose folder it is -------------------------------------------------------------------------


@pytest.fixture
def refused(train, tmp_path):
    """Function: main_CLIP.py with further options ends with one line, which has the words, and
    changes no checkpoint."""
    return functools.partial(refuses, train, tmp_path / "x")


def refuses(train, folder, more, *words):
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    said = train("clip", *more, status=2)
    assert "Traceback" not in said
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line
    for path in folder.glob("*.*"):
        assert path.name in ("log.txt", ".lock") or path.read_bytes() == before[path.name]


def test_what_another_run_has_earned_is_not_overwritten(train, refused, copied):
    folder = copied("clip")
    advice = str(folder), "--resume auto", "--overwrite", "--experiments"
    refused(["--vision_model", "none.pt"], "epoch3.pt", *advice)  # before a model is read
    refused(["--resume", folder / "epoch1.pt"], "later checkpoints", "epoch2.pt", "epoch3.pt")
    for path in folder.glob("epoch*.pt"):
        path.unlink()
    for more in ([], ["--resume", "auto"]):
        refused(more, "best.pt", *advice)
    train("clip", "--overwrite", "--resume", "auto", status=2)


def test_overwrite_leaves_nothing_of_the_run_before(train, whole, copied):
    folder = copied("clip")
    (folder / "eval_test.json").write_text("{}")
    train("clip", "--overwrite", "--dataset_root", "none", status=2)
    assert (folder / "epoch3.pt").exists()  # a command that cannot start deletes nothing
    train("clip", "--overwrite", status=INTERRUPTED, hook=signalled(5, signal.SIGTERM))
    assert {path.name for path in folder.glob("*.[pj]*")} == {"step5.pt", "options.json"}
    train("clip", "--resume", "auto")
    assert_same(folder, whole["clip"])
    assert (folder / "log.txt").read_text().count("epoch 3: dev") == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("dev/mean_R1")] == [8, 16, 24]
    assert len(list(folder.glob("events*"))) == 2  # interrupted and continued


def test_one_run_an_experiment(data, train, refused, tmp_path):
    """The second is refused; kill -9 gives the folder back."""
    hook = functools.partial(after_step, 9, stop_self)
    first = Started(CLIP, arguments(data, "clip", tmp_path), tmp_path / "first", hook=hook)
    try:
        first.wait_for("epoch 2, step 1")
        refused(["--resume", "auto"], "is being written by another")
    finally:
        os.kill(first.pid, signal.SIGKILL)
    first.wait()
    train("clip", "--resume", "auto")


def stop_self():
    print("epoch 2, step 1", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


# ---- what comes from outside --------------------------------------------------------------------


def test_eval_with_nothing_to_resume_scores_nothing(train, tmp_path):
    """`--eval` scores no model that nobody meant."""
    for resume in ("auto", "", "none.pt"):
        said = train("clip", "--eval", "--resume", resume, status=2)
        assert said.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.rglob("eval_test.json"))


def hang_up(step):
    """Hook: the terminal is lost. Its signal comes, and nothing can be printed from then on."""
    def act():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        signal_group(signal.SIGHUP)

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    after_step(step, act)


def test_lost_terminal(train, tmp_path):
    """SIGHUP saves like SIGTERM, although nothing can be printed any more."""
    train("clip", status=INTERRUPTED, hook=functools.partial(hang_up, 5))
    assert (tmp_path / "x" / "step5.pt").exists()
    assert "interrupted after step 5" in (tmp_path / "x" / "log.txt").read_text()


def test_a_second_signal_ends_the_process_at_once(train, tmp_path):
    train("clip", status=-signal.SIGTERM, hook=functools.partial(after_step, 5, terminate))
    assert not list((tmp_path / "x").glob("*.pt"))


def terminate():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


def test_options_are_those_of_what_was_trained(data, train, copied, tmp_path):
    """They are written when training begins: a refused command leaves them, and --vision_model is
    what it was found to be."""
    folder = copied()
    before = (folder / "options.json").read_text()
    train("npc", "--resume", "auto", "--noise_ratio", 0.2, status=2)
    assert (folder / "options.json").read_text() == before
    argv = arguments(data, "npc", tmp_path, "--resume", folder / "epoch2.pt", "--experiments", "y")
    at = argv.index("--vision_model")
    run(NPC, argv[:at] + argv[at + 2 :], tmp_path / "out")
    options = json.loads((tmp_path / "y" / "options.json").read_text())
    assert options["vision_model"] == str(data.model)


def test_a_second_name_for_the_same_file_leaves_nothing_behind(tmp_path):
    (tmp_path / "epoch1.pt").write_text("x")
    for _ in range(2):
        checkpoints.hard_link(tmp_path / "epoch1.pt", tmp_path / "best.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"epoch1.pt", "best.pt"}


# ---- killed -------------------------------------------------------------------------------------


def test_killed_ten_times_at_random_moments(data, train, whole, tmp_path):
    """kill -9 anywhere, the making of noise file and bank included, costs only time."""
    shutil.copytree(data.root, tmp_path / "data",
                    ignore=shutil.ignore_patterns("*noise_train*", "*mbank*"))
    argv = ["npc", "--resume", "auto", "--save_every", 1, "--dataset_root", tmp_path / "data"]
    rng, folder, steps = random.Random(0), tmp_path / "x", []
    for k in range(10):
        operation = rng.randrange(1, 50) + 7 * k * (k > 1)  # two at the start, others in training
        hook = functools.partial(killed_at, tmp_path, operation)
        train(*argv, status=-signal.SIGKILL, hook=hook)
        newest = checkpoints.newest(folder, print)
        steps.append(clip.read_checkpoint(newest)["step"] if newest else 0)
    assert steps == sorted(steps) and len(set(steps)) > 4, steps
    train(*argv)
    assert_same(folder, whole["npc"], ["epoch3.pt", "best.pt"])
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


def killed_at(folder, operation):
    """Hook: die before this process opens, renames, links or removes a file below `folder` for so
    many times."""
    left = iter(range(operation))

    def audit(event, arguments):
        if event in ("open", "os.rename", "os.link", "os.remove"):
            if str(arguments[0]).startswith(str(folder)) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def test_files_are_on_disk_before_they_get_their_name(tmp_path, monkeypatch):
    """What kill -9 cannot show, a crash of the machine would."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (calls.append(n), f(*a))[1])
    checkpoints.save(tmp_path / "epoch1.pt", {"a": 1})
    assert calls == ["fsync", "replace"] and (tmp_path / "epoch1.pt").exists()


def test_signals_before_training_end_the_run_as_usual(train):
    train("npc", "--num_workers", 2, "--data_on", "workers", status=-signal.SIGTERM,
          hook=signalled_before_training)


def signalled_before_training():
    loop.History = lambda *_: signal_group(signal.SIGTERM)


# ---- a full disk --------------------------------------------------------------------------------


def fills(size, number):
    """Hook: no file may grow beyond `size` bytes after 3 steps of epoch 2. Then a signal comes."""
    def act():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        if number:
            signal_group(number)

    after_step(STEPS + 3, act)


@pytest.mark.parametrize("size, number", [  # a log line does not fit; a checkpoint does not
    (0, None), (1_000_000, None), (1_000_000, signal.SIGTERM)])
def test_full_disk_ends_with_a_line_and_leaves_what_was_there(
        data, train, whole, tmp_path, size, number):
    hook = functools.partial(fills, size, number)
    output = tmp_path / "out" if size else "/dev/null"
    started = Started(NPC, arguments(data, "npc", tmp_path), output, hook=hook)
    assert started.wait() == 2
    if size:
        assert "Traceback" not in started.text() and "checkpoint is saved" not in started.text()
        line, name = started.text().splitlines()[-1], "step11.pt" if number else "epoch2.pt"
        assert line.startswith("error: cannot write") and name in line
    folder = tmp_path / "x"
    for name in ("epoch1.pt", "best.pt"):
        assert differences(read(folder / name), read(whole["npc"] / "epoch1.pt")) == []
    assert {path.name for path in folder.glob("*.pt")} == {"epoch1.pt", "best.pt"}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]
    train("npc", "--resume", "auto")
    assert_same(folder, whole["npc"])


# ---- numbers that are not finite ----------------------------------------------------------------


def poison(step, what):
    """After a step, make a weight of the model NaN, or the moments of AdamW."""
    live = []
    init = checkpoints.TrainingState.__init__

    def watch(self, run, model, *rest):
        init(self, run, model, *rest)
        live.append(model)

    checkpoints.TrainingState.__init__ = watch
    after_step(step, lambda: live[0].state_dict()[what].flatten()[:1].fill_(math.nan))


@pytest.mark.parametrize("script", ["npc", "clip"])
def test_loss_that_is_not_finite_stops_the_run(data, train, tmp_path, script):
    main, _ = SCRIPTS[script]
    hook = functools.partial(poison, STEPS + 3, "visual.proj")
    said = train(script, status=2, hook=hook)
    line = said.splitlines()[-1]
    assert f"error: step {STEPS + 4} is not finite: batch_loss nan" in line
    assert "grad_norm nan" in line
    if script == "npc":
        assert "memory_image_loss nan" in line and "weighted_loss nan" in line
    order = np.random.default_rng([99, 1]).permutation(60)  # of epoch 2
    batch = order[3 * BATCH : 4 * BATCH].tolist()
    ids = [f"{i} ({data.ids['train'][i // 5]})" for i in batch]
    assert line.endswith(f"pairs of the batch (and their image ids): {', '.join(ids)}")
    assert_finite_checkpoints(tmp_path / "x", ["best.pt", "epoch1.pt"])


def assert_finite_checkpoints(folder, names):
    assert sorted(path.name for path in folder.glob("*.pt")) == sorted(names)
    for name in names:
        content = clip.read_checkpoint(folder / name)["state_dict"]
        assert all(value.isfinite().all() for value in content.values())


@pytest.mark.parametrize("rate", ["1e10", "1e37"])
def test_absurd_rate_stops_the_run_and_saves_nothing_broken(train, tmp_path, rate):
    said = train("npc", "--lr", rate, "--save_every", 1, "--recipe", "released", status=2)
    assert "not finite" in said.splitlines()[-1] and "lower --lr" in said.splitlines()[-1]
    names = [path.name for path in (tmp_path / "x").glob("*.pt")]
    assert_finite_checkpoints(tmp_path / "x", names)


def test_amp_fp16_skips_steps_and_counts_them(train, tmp_path):
    """Its first scale of 65536 is often too large: such steps are skipped, halving it."""
    argv = ["npc", "--precision", "amp_fp16", "--epochs", 2]
    train(*argv, hook=overflow_twice)
    lines = [json.loads(x) for x in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [2, 0]
    assert all(math.isfinite(line["grad_norm"]) for line in lines)
    path = tmp_path / "x" / "epoch2.pt"
    assert clip.read_checkpoint(path)["scaler"]["scale"] == 65536 / 4
    path.unlink()
    first = tmp_path / "x" / "epoch1.pt"  # a run that goes on from there keeps its scale
    state = clip.read_checkpoint(first)
    torch.save({**state, "scaler": {**state["scaler"], "scale": 2.0}}, first)
    train(*argv, "--resume", "auto")
    assert clip.read_checkpoint(path)["scaler"]["scale"] == 2


def overflow_twice():
    """Make the gradients of the first two steps infinite."""
    reduce, calls = passes.reduce_gradients, []

    def reduce_and_break(model):
        reduce(model)
        if not model.training and model.logit_scale.grad is not None:
            calls.append(model)
            if len(calls) in (2, 4):  # A follows its siamese
                model.logit_scale.grad.fill_(math.inf)

    passes.reduce_gradients = reduce_and_break


def test_checkpoint_that_cannot_be_written_is_a_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos\nmore")

    monkeypatch.setattr(torch, "save", fail)
    (tmp_path / "epoch1.pt").write_text("old")
    with pytest.raises(InputError, match="is the disk full"):
        checkpoints.save(tmp_path / "epoch1.pt", {})
    assert [p.name for p in tmp_path.iterdir()] == ["epoch1.pt"]
    assert (tmp_path / "epoch1.pt").read_text() == "old"
