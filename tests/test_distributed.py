"""Two processes against one: the same weights, parameters, banks and scores; one of them writes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import banks, describe, draw, make_dataset, write_lines
from processes import BANK, CLIP, NPC, RESNET, ROOT, differences, run, run_in_two, save_small
from test_resume import after_step

import clip
import search
from utils import distributed
from utils.training import checkpoints, loop
from utils.training.interruptions import INTERRUPTED

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set and two small models."""
    data = make_dataset(tmp_path_factory.mktemp("distributed") / "data", "f30k")
    data.model = save_small(data.root / "model.pt")
    data.resnet = save_small(data.root / "resnet.pt", RESNET)
    return data


def fresh(data, folder):
    """A copy of the data set, without noise files and banks."""
    made = shutil.ignore_patterns("*noise_train*", "*mbank*")
    shutil.copytree(data.root, folder, ignore=made)
    return SimpleNamespace(**{**vars(data), **vars(describe(folder, "f30k"))})


def arguments(data, *more):
    return [*data.options, "--vision_model", str(data.model), "--context_length", "12",
            "--batch_size", "7", "--noise_ratio", "0.4", "--num_workers", "0", "--device", "cpu",
            *map(str, more)]


def training(data, logs, *more):
    return arguments(data, "--epochs", 2, "--lr", "1e-4", "--warmup", 3, "--display", 5,
                     "--checkpoint_path", logs, "--experiments", "x", *more)


def compare(data, tmp_path, main, *more):
    """Train with one process and with two from nothing."""
    one, two = (fresh(data, tmp_path / f"data{k}") for k in (1, 2))
    run(main, training(one, tmp_path / "one", *more), tmp_path / "out1")
    run_in_two(main, training(two, tmp_path / "two", *more), tmp_path / "out2")
    assert_alike(tmp_path)


def assert_alike(tmp_path):
    a, b = tmp_path / "one" / "x", tmp_path / "two" / "x"
    before = None
    for name in ("epoch1.pt", "epoch2.pt"):
        one, two = (clip.read_checkpoint(folder / name) for folder in (a, b))
        assert differences(one["state_dict"], two["state_dict"], TOLERANCE) == []
        trained = one["state_dict"]["text_projection"]
        assert before is None or (trained - before).abs().max() > 5 * TOLERANCE
        before = trained
        for key in ("optimizer", "siamese_optimizer"):
            if key in one:
                assert differences(one[key], two[key], TOLERANCE, relative=1e-3) == []
    if (a / "weights.npz").exists():
        w1, w2 = (np.load(folder / "weights.npz")["w"] for folder in (a, b))
        np.testing.assert_allclose(w1, w2, rtol=0, atol=TOLERANCE)
        assert np.isfinite(w1).any() and np.isfinite(w1).sum() == np.isfinite(w2).sum()
    lines = [[json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
             for folder in (a, b)]
    assert differences(*lines, tolerance=1e-4) == []


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("main, more", [
    (NPC, ["--recipe", "paper"]),
    (NPC, ["--recipe", "released", "--accum_steps", 2]),
    (CLIP, ["--recipe", "paper", "--num_workers", 1]),
    (NPC, ["--train_on", "clean", "--clean_threshold", 0.3, "--freeze", "image", "--memory",
           "random"]),
])
def test_two_processes_train_like_one(data, tmp_path, main, more):
    compare(data, tmp_path, main, *more)


@pytest.fixture
def one_image(data, tmp_path):
    """A data set whose splits have one image each, so that a second process has no share of it."""
    copy = fresh(data, tmp_path / "single")
    for split, number in (("train", 3), ("dev", 4)):
        draw(copy.root / "images" / f"one{number}.png", "red", "left", 90)
        captions = [f"caption {k} of {number}" for k in range(5)]
        write_lines(copy.split_folder / f"{split}_caps.txt", captions)
        write_lines(copy.split_folder / f"{split}_ids.txt", [number] * (1 if number == 3 else 5))
    write_lines(copy.split_folder / "image_name.txt", [f"one{k}.png" for k in range(5)])
    return copy


@pytest.mark.parametrize("model", ["model", "resnet"])
def test_a_process_without_images(one_image, tmp_path, model):
    """All pairs have one image: the share of the second process is always empty."""
    compare(one_image, tmp_path, NPC, "--batch_size", 2, "--vision_model", vars(one_image)[model])


def test_released_batch_norm_is_refused(data, tmp_path):
    argv = training(data, tmp_path, "--vision_model", data.resnet, "--recipe", "released")
    for said in run_in_two(CLIP, argv, tmp_path / "out", 2):
        errors = [line for line in said.splitlines() if "error" in line]
        assert len(errors) == 1 and "a ResNet then needs one process" in errors[0]
        assert "Traceback" not in said


def record_writes(path):
    """Hook: note every file that this process opens for writing."""
    def audit(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) or event in (
                "os.rename", "os.link", "os.mkdir", "os.remove"):
            os.write(descriptor, f"{event} {arguments}\n".encode())

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(audit)


def test_the_first_process_alone_writes_and_makes_each_file_once(data, tmp_path):
    copy = fresh(data, tmp_path / "data")
    hooks = [functools.partial(record_writes, tmp_path / f"writes{k}") for k in (0, 1)]
    said = run_in_two(NPC, training(copy, tmp_path / "logs"), tmp_path / "out", hooks=hooks)
    writes = [(tmp_path / f"writes{k}").read_text().splitlines() for k in (0, 1)]
    assert [line for line in writes[1] if str(tmp_path) in line] == []
    for name in ("noise_train_caps.txt", "_mbank_", "epoch2.pt", "weights.npz"):
        assert any(name in line for line in writes[0])
    assert said[0].count("No random noise") == said[0].count("No memory bank") == 1
    assert said[1] == ""


# ---- banks, scores, checkpoints -----------------------------------------------------------------


def test_bank_is_the_same(data, tmp_path):
    copies = [fresh(data, tmp_path / f"data{k}") for k in (1, 2)]
    run(BANK, arguments(copies[0]), tmp_path / "out1")
    run_in_two(BANK, arguments(copies[1]), tmp_path / "out2")
    one, two = (np.load(banks(c.root)["0.4_mbank"]) for c in copies)
    for name in ("image_entry", "caption_entry", "clean"):
        np.testing.assert_array_equal(one[name], two[name])
    for name in ("loss", "posterior", "cosine"):
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=TOLERANCE)


def test_scores_are_the_same(data, tmp_path):
    for k, runner in enumerate((run, run_in_two)):
        argv = arguments(data, "--eval", "--checkpoint_path", tmp_path, "--experiments", k)
        runner(NPC, argv, tmp_path / f"out{k}")
    one, two = (json.loads((tmp_path / str(k) / "eval_test.json").read_text()) for k in (0, 1))
    assert one == two and 0 < one["mean_R1"] < 100


def test_search_prints_and_draws_once(data, tmp_path):
    argv = [*data.options, "--vision_model", data.model, "--context_length", "12", "--device",
            "cpu", "--num_workers", "0", "--out", tmp_path / "found.png", "a red bar"]
    said = run(search.main, [*map(str, argv)], tmp_path / "out")
    both = run_in_two(search.main, [*map(str, argv)], tmp_path / "two")
    assert both == [said, ""] and "wrote" in said


def test_any_number_of_processes_resumes(data, tmp_path):
    """Interrupted in one of two processes; both leave at the same step; one goes on alone."""
    one, two = (fresh(data, tmp_path / f"data{k}") for k in (1, 2))
    run(NPC, training(one, tmp_path / "one"), tmp_path / "out1")
    argv = training(two, tmp_path / "two", "--resume", "auto")
    said = run_in_two(NPC, argv, tmp_path / "out2", INTERRUPTED,
                      hooks=(save_slowly, leave_after_saving))
    assert "interrupted after step 6" in said[0]  # known a step later, see `interruptions`
    hook = functools.partial(signal_after, 11, signal.SIGKILL)
    run(NPC, argv, tmp_path / "out3", -signal.SIGKILL, hook)
    run_in_two(NPC, argv, tmp_path / "out4")
    assert_alike(tmp_path)


def signal_after(step, number):
    after_step(step, lambda: os.kill(os.getpid(), number))


def save_slowly():
    save = checkpoints.save
    checkpoints.save = lambda *arguments: (time.sleep(0.5), save(*arguments))


def leave_after_saving():
    """Hook: this process gets the signal, and must not leave, whereupon torchrun would end the
    other, before that one has saved."""
    leave = loop.end_interrupted

    def check(run, where):
        try:
            leave(run, where)
        finally:
            assert list(run.folder.glob("step*.pt"))

    loop.end_interrupted = check
    signal_after(5, signal.SIGTERM)


def test_all_processes_resume_from_what_the_first_one_found(data, tmp_path):
    """auto is looked up once: here the second process would find nothing."""
    copy = fresh(data, tmp_path / "data")
    run(CLIP, training(copy, tmp_path / "logs", "--epochs", 1), tmp_path / "out")
    argv = training(copy, tmp_path / "logs", "--resume", "auto")
    run_in_two(CLIP, argv, tmp_path / "out2", hooks=(None, find_nothing))
    assert (tmp_path / "logs" / "x" / "epoch2.pt").exists()


def find_nothing():
    checkpoints.newest = lambda *_: None


# ---- a part -------------------------------------------------------------------------------------


def check_gradients():
    """logit_scale, which all processes see whole, stays as it is."""
    distributed.join_processes(torch.device("cpu"))
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.zeros(()))
    for k, dtype in enumerate((torch.float32, torch.float16, torch.float32, torch.float64)):
        model.register_parameter(f"p{k}", torch.nn.Parameter(torch.zeros(2, k + 1, dtype=dtype)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, distributed.rank() + 1)
    model.logit_scale.grad.fill_(5)
    distributed.reduce_gradients(model)
    gradients = [p.grad for p in model.parameters()]
    assert gradients[0] == 5 and all((g == 3).all() for g in gradients[1:])
    distributed.leave_processes()
    assert not dist.is_initialized()


def test_gradients_of_every_dtype_are_summed(tmp_path):
    run_in_two(check_gradients, None, tmp_path / "out")


@pytest.mark.slow
def test_sigterm_to_torchrun_itself_saves_in_time(data, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
            "main_CLIP.py", *data.options, "--vision_model", "tiny", "--batch_size", 7,
            "--num_workers", 0, "--device", "cpu", "--epochs", 500, "--save_every", 2,
            "--checkpoint_path", tmp_path, "--experiments", "x"]
    process = subprocess.Popen(list(map(str, argv)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not list((tmp_path / "x").glob("step*.pt")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "a checkpoint is saved" in said, said
    path = checkpoints.newest(tmp_path / "x", print)
    state = clip.read_checkpoint(path)
    assert f"interrupted after {path.stem.rstrip('0123456789')} {state['step']}" in said or (
        path.stem == f"epoch{state['epoch']}")


# ---- when one of them fails ---------------------------------------------------------------------


def test_broken_images_are_told_by_the_process_that_reads_them(data, tmp_path):
    copy = fresh(data, tmp_path / "data")
    for path in (copy.root / "images").iterdir():
        path.write_bytes(b"broken")
    said = run_in_two(BANK, arguments(copy), tmp_path / "out", 2)
    assert all("replace it, or leave its line out" in one and "Traceback" not in one
               for one in said)


@pytest.mark.parametrize("first", [True, False])
def test_process_whose_partner_dies_ends_too(data, tmp_path, first):
    hook = functools.partial(signal_after, 3, signal.SIGKILL)
    killed = -signal.SIGKILL
    said = run_in_two(CLIP, training(fresh(data, tmp_path / "data"), tmp_path), tmp_path / "out",
                      (killed, 1) if first else (1, killed),
                      hooks=(hook, None) if first else (None, hook))
    assert "Traceback" in said[first]
