"""configs/, and benchmarks/reproduce.py on drawn data: from nothing, after kills, and twice."""

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from conftest import banks, make_dataset
from processes import Started
from test_docs import ROOT, run_script

from benchmarks import reproduce
from params import parse_args
from utils.training.interruptions import INTERRUPTED, SIGNALS

SMALL = ["--vision_model", "tiny", "--device", "cpu", "--num_workers", "0", "--precision", "fp32",
         "--batch_size", "4", "--lr", "1e-3", "--warmup", "1", "--epochs", "3"]


def arguments(data, out, methods, *more):
    return ["--dataset", data.layout, "--dataset_root", str(data.root), "--out", str(out),
            "--methods", *methods, *more, *SMALL]


# ---- configs -------------------------------------------------------------------------------------


def config_table():
    """{config: {option: text}} of the table in docs/fidelity.md."""
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").split("## Configs")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    found = {name: {} for name in rows[0][1:]}
    for first, *cells in rows[2:]:
        names = re.findall(r"--(\w+)", first)
        for config, cell in zip(found, cells, strict=True):
            values = cell.split(", ") if len(names) > 1 else [cell]
            found[config] |= dict(zip(names, values, strict=True))
    return found


def test_every_config_is_in_the_table():
    assert set(config_table()) == set(reproduce.METHODS)


@pytest.mark.parametrize("dataset", ["coco", "f30k", "cc"])
@pytest.mark.parametrize("config", reproduce.METHODS)
def test_config_says_what_the_table_says(config, dataset, tmp_path):
    captions = tmp_path / "annotations" / "scan_split" / "train_caps.txt"
    captions.parent.mkdir(parents=True)
    captions.write_text("a\n" * 100_000)  # CC120K, the smallest, has more
    args = parse_args("clip" if config.startswith("clip") else "npc", [
        f"@{ROOT / 'configs' / config}.args", "--dataset", dataset, "--device", "cpu",
        "--dataset_root", str(tmp_path)])
    assert args.name == config and args.num_anns == {"coco": 5, "f30k": 5, "cc": 1}[dataset]
    for option, text in config_table()[config].items():
        value = getattr(args, option, "–")
        if text.startswith("a tenth"):
            assert value is None and option == "warmup"
        elif isinstance(value, int | float):
            assert value == float(text), option
        else:
            assert value == text, option


def test_what_follows_a_config_overrides_it(tmp_path):
    (tmp_path / "own.args").write_text("# mine\n--lr 1e-4 --name 'my run' # both\n\n--epochs 2\n")
    args = parse_args("npc", [f"@{tmp_path}/own.args", "--epochs", "7", "--device", "cpu"])
    assert (args.lr, args.name, args.epochs) == (1e-4, "my run", 7)


def test_a_config_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args("npc", ["@configs/none.args"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and len(said.splitlines()) == 1 and "configs/none.args" in said


# ---- whole tables --------------------------------------------------------------------------------


class Forked:
    """Stands for subprocess.Popen: the command is a fork of this process, which has imported torch
    already."""

    def __init__(self, words, **_):
        assert words[0] == sys.executable
        reading, writing = os.pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=processes.go, args=(run_script, words[1:], f"/dev/fd/{writing}"))
        self.process.start()
        os.close(writing)
        self.stdout = open(reading)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.process.join()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    @property
    def returncode(self):
        return self.process.exitcode


def fork_commands():
    """Hook: what is started by this process is forked."""
    subprocess.Popen = Forked


def start(argv, output):
    output.unlink(missing_ok=True)
    return Started(run_script, [str(ROOT / "benchmarks" / "reproduce.py"), *argv], output,
                   hook=fork_commands)


def finish(argv, output):
    started = start(argv, output)
    assert started.wait() == 0, started.text()
    return started.text()


def wait_for(path, started):
    while not path.exists():
        assert started.process.is_alive(), f"ended before {path}: {started.text()}"
        time.sleep(0.01)


def kill(started):
    """As a machine that fails: the command and the run that it has started end at once."""
    run = int(Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text())
    os.kill(started.pid, signal.SIGKILL)
    os.kill(run, signal.SIGKILL)
    started.wait()


@pytest.mark.parametrize("layout, methods, noise", [
    ("f30k", ["npc_released", "clip_released"], "0.4"),
    pytest.param("coco", ["npc_paper"], "0.2", marks=pytest.mark.slow),
    pytest.param("cc", ["npc_paper"], "0", marks=pytest.mark.slow)])
def test_a_table_from_nothing_after_kills_and_twice(tmp_path, layout, methods, noise):
    tables = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        data = make_dataset(tmp_path / name / "data", layout)
        out, output = tmp_path / name / "out", tmp_path / f"{name}.txt"
        argv = arguments(data, out, methods, "--noise", noise)
        runs = [out / f"{layout}_{method}_{noise}_seed99" for method in methods]
        if name == "killed":
            started = start(argv, output)
            wait_for(runs[0] / "epoch1.pt", started)
            kill(started)
            started = start(argv, output)
            wait_for(runs[-1] / "epoch1.pt", started)  # two more are a while
            os.kill(started.pid, signal.SIGTERM)
            assert started.wait() == INTERRUPTED and "stopped" in started.text()
            assert not (runs[-1] / "epoch3.pt").exists()
        said = finish(argv, output)
        tables.append([(out / f"table_{layout}" / file).read_bytes()
                       for file in ("tables.csv", "r1_over_noise.png")])
        assert "epoch 3" in (runs[0] / "log.txt").read_text()
    assert tables[0] == tables[1]
    text = (out / f"table_{layout}" / "tables.md").read_text()
    for method in methods:
        assert f"| {method} | 1 |" in text and f"| {method}, last epoch | 1 |" in text

    # what is finished stays as it is
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.pt")}
    said = finish(argv, output)
    assert "$ python" not in said and f"{len(runs)} of {len(runs)} runs are finished" in said
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.pt")} == before


# ---- its parts -----------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """Runs are not made but noted, as lists of words; `codes` are their exit statuses, then 0."""
    noted = []

    def popen(words, **_):
        noted.append(words[1:])
        code = noted.codes.pop(0) if noted.codes else 0
        return subprocess_of(f"import sys; print('error: no luck'); sys.exit({code})")

    class Noted(list):
        codes = []

    def subprocess_of(code):
        return real([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    noted, real = Noted(), subprocess.Popen
    noted.codes = []
    monkeypatch.setattr(reproduce.subprocess, "Popen", popen)
    return noted


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_print_lists_the_commands_of_each_run(datasets, tmp_path, capsys, ran):
    argv = arguments(datasets["coco"], tmp_path, ["npc_released", "robust"], "--seeds", "2")
    reproduce.main([*argv, "--print"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 5 and not ran and not list(tmp_path.iterdir())
    noises, seeds = set(), set()
    for line in lines:
        parts = line.split(" && ")
        assert [" --eval " in part for part in parts] == [False, True, True]
        for part in parts:
            python, script, *words = shlex.split(part)
            assert python == "python" and script.endswith("main_NPC.py")
            args = parse_args("npc", words)
            noises.add(args.noise_ratio)
            seeds.add(args.seed)
            assert args.epochs == 3 and args.vision_model == "tiny"
        assert args.resume.endswith("/epoch3.pt") and args.experiments.endswith("/last")
    assert noises == {0, 0.2, 0.4, 0.5, 0.6} and seeds == {99, 100}


def test_a_run_that_fails_ends_it_with_its_words(datasets, tmp_path, capsys, ran):
    ran.codes = [0, 0, 0, 2]
    with pytest.raises(SystemExit) as caught:
        reproduce.main(arguments(datasets["cc"], tmp_path, ["npc_paper", "clip_paper"]))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and len(ran) == 4
    assert said == f"error: {tmp_path}/cc_clip_paper_0_seed99 failed: no luck"


@pytest.mark.parametrize("option", ["--seed", "--noise_ratio", "--experiments"])
def test_what_is_set_for_each_run_is_refused(datasets, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([*arguments(datasets["cc"], tmp_path, ["npc_paper"]), option, "1"])
    assert option in capsys.readouterr().err


def test_time_that_is_left_is_told_from_the_steps_so_far(monkeypatch, tmp_path, capsys):
    clock = [0.0]
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: clock[0])
    jobs = [reproduce.Job(method, tmp_path / str(k), 2, 1000, [], {})
            for k, method in enumerate(("npc_paper", "clip_paper", "npc_paper"))]
    progress = reproduce.Progress(jobs)

    def at(seconds, line):
        clock[0] = seconds
        progress.line(line)
        return progress.rest

    progress.start(jobs[0])
    at(5, "training: 9 pairs, batch size 4, 1000 steps an epoch, epochs 1 to 2")
    assert not at(10, "epoch 1, step 1: loss 3")
    assert not at(30, "epoch 1, step 21: loss 3")
    assert at(110, "epoch 1, step 101: loss 3") == "1.6 hours"  # 1 s a step
    assert "npc_paper takes 1 s a step: 1.6 hours are left" in capsys.readouterr().out
    clock[0] = 2009
    progress.finish()
    progress.start(jobs[1])
    at(3000, "training: 9 pairs, batch size 4, 500 steps an epoch, epochs 1 to 2")  # chosen pairs
    assert sum(progress.steps.values()) == 5000
    at(3000, "epoch 1, step 1: loss 3")
    assert at(3100, "epoch 1, step 201: loss 3") == f"{(2000 + 799 * 0.5) / 60:.0f} min"
    assert "clip_paper takes 0.5 s a step" in capsys.readouterr().out


@pytest.mark.slow
def test_three_seeds_have_three_noise_files_and_three_banks(tmp_path):
    data = make_dataset(tmp_path / "data", "f30k")
    finish(arguments(data, tmp_path / "out", ["npc_paper"], "--noise", "0.4", "--seeds", "3",
                     "--epochs", "1"), tmp_path / "said.txt")
    noise = {path.read_text() for path in data.split_folder.glob("0.4_noise_*train_caps.txt")}
    names = [path.name for path in data.root.glob("annotations/*/*_mbank_*.npz")]
    assert len(noise) == len(names) == 3 and banks(data.root).keys() == {"0.4_mbank"}
    assert "| 3 |" in (tmp_path / "out/table_f30k/tables.md").read_text()


def test_a_run_is_finished_when_its_last_epoch_is_trained_and_both_are_tested(tmp_path):
    folder, epochs = tmp_path / "run", 2
    folder.mkdir()
    tests = {folder: ["best"], folder / "last": ["last"]}
    job = reproduce.Job("npc_paper", folder, epochs, 5, ["train"], tests)
    for name in (folder, folder / "last"):
        name.mkdir(exist_ok=True)
        (name / "eval_test.json").write_text("{}")
    (folder / "log.jsonl").write_text("{}\n")  # of a shorter run
    assert not job.finished and job.commands() == [["train"], ["best"], ["last"]]
    (folder / "log.jsonl").write_text("{}\n{}\n")
    assert job.finished
    (folder / "last" / "eval_test.json").unlink()
    assert not job.finished and job.commands() == [["last"]]
