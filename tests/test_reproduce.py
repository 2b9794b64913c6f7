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

import pytest
from conftest import make_dataset
from processes import Started
from test_docs import ROOT, blocks, run_script

from benchmarks import driver, reproduce
from params import parse_args

METHODS = sorted(path.stem for path in (ROOT / "configs").glob("*.args"))
SMALL = ["--vision_model", "tiny", "--device", "cpu", "--num_workers", "0", "--precision", "fp32",
         "--batch_size", "4", "--lr", "1e-3", "--warmup", "1", "--epochs", "3"]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def arguments(data, out, methods, *more):
    return ["--dataset", data.layout, "--dataset_root", str(data.root), "--out", str(out),
            "--methods", *map(str, methods), *more, *SMALL]


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


@pytest.mark.parametrize("dataset", ["coco", "f30k", "cc"])
@pytest.mark.parametrize("config", METHODS)
def test_config_says_what_the_table_says(config, dataset, tmp_path):
    assert set(config_table()) == set(METHODS)
    captions = tmp_path / "annotations" / "scan_split" / "train_caps.txt"
    captions.parent.mkdir(parents=True)
    captions.write_text("a\n" * 100_000)  # CC120K, the smallest, has more
    script, path = reproduce.config_of(config)
    assert script.name == ("main_CLIP.py" if config.startswith("clip") else "main_NPC.py")
    args = parse_args("clip" if config.startswith("clip") else "npc", [
        f"@{path}", "--dataset", dataset, "--device", "cpu", "--dataset_root", str(tmp_path)])
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


def test_a_script_is_found_beside_its_config_or_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    config = tmp_path / "configs" / "mine.args"
    config.write_text("#  script: mine.py\n--lr 1e-4\n")
    for folder in ("work", "configs"):
        (tmp_path / folder / "mine.py").write_text("")
        script, found = reproduce.config_of(str(config))
        assert script.resolve() == tmp_path / folder / "mine.py" and found == config
    config.rename("mine.args")
    for name in ("mine", "mine.args"):
        assert reproduce.config_of(name)[1] == Path("mine.args")


# ---- whole tables --------------------------------------------------------------------------------


def fork_commands():
    """Hook: a command is a fork of this process, which has imported torch already."""
    driver.PROCESSES = multiprocessing.get_context("fork")


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
    ("f30k", ["mine", "clip_released"], "0.4"),
    pytest.param("coco", ["npc_paper", "clip_paper"], "0.2", marks=pytest.mark.slow),
    pytest.param("cc", ["npc_paper", "clip_paper"], "0", marks=pytest.mark.slow)])
def test_a_table_from_nothing_after_kills_and_twice(tmp_path, layout, methods, noise):
    source = blocks(PAGE, "python")[0]
    (options,) = [block for block in blocks(PAGE) if block.startswith("# script: mine.py")]
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "mine.args").write_text(options)
    words = [tmp_path / "mine" if method == "mine" else method for method in methods]
    tables = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        data = make_dataset(tmp_path / name / "data", layout)
        out, output = tmp_path / name / "out", tmp_path / f"{name}.txt"
        argv = arguments(data, out, words, "--noise", noise)
        runs = [out / f"{layout}_{method}_{noise}_seed99" for method in methods]
        if name == "killed":
            started = start(argv, output)
            wait_for(runs[0] / "epoch1.pt", started)
            kill(started)
            started = start(argv, output)
            wait_for(runs[-1] / "epoch1.pt", started)  # two more are a while
            os.kill(started.pid, signal.SIGTERM)
            assert started.wait() == driver.STOPPED, started.text()
            assert not (runs[-1] / "epoch3.pt").exists()
        finish(argv, output)
        tables.append([(out / f"table_{layout}" / file).read_bytes()
                       for file in ("tables.csv", "r1_over_noise.png", "r1_over_noise.pdf")])
        assert "epoch 3" in (runs[0] / "log.txt").read_text()
    assert tables[0] == tables[1]
    text = (out / f"table_{layout}" / "tables.md").read_text()
    for method in methods:
        assert re.search(rf"\| {method} +\| +1 \|", text)
        assert re.search(rf"\| {method}, last epoch +\| +1 \|", text)

    # what is finished stays as it is; other options are another run
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.pt")}
    said = finish(argv, output)
    assert "$ python" not in said and f"{len(runs)} of {len(runs)} runs are finished" in said
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.pt")} == before
    started = start([*argv, "--lr", "2e-3"], output)
    assert started.wait() == 2 and "was made with other options" in started.text()


@pytest.mark.slow
def test_drawings_make_a_table_whose_rows_differ(tmp_path):
    words = [sys.executable, ROOT / "benchmarks" / "reproduce.py", "--dataset", "scenes", "--noise",
             "0.4", "--out", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[4] for line in done.stdout.splitlines() if "_released " in line]
    assert "### drawings" in done.stdout and len(set(rows)) == len(rows) == 2


# ---- its parts -----------------------------------------------------------------------------------


def test_print_lists_the_commands_of_each_run(datasets, tmp_path, capsys):
    out = tmp_path / "out"
    argv = arguments(datasets["coco"], out, ["npc_released", "robust"], "--seeds", "2")
    reproduce.main([*argv, "--print"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 5 and not out.exists()
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
        assert args.resume.endswith("/best.pt") and args.experiments.endswith("/best")
    assert noises == {0, 0.2, 0.4, 0.5, 0.6} and seeds == {99, 100}


def test_a_run_that_fails_ends_it_with_its_words(datasets, tmp_path):
    started = start(arguments(datasets["cc"], tmp_path / "out", ["npc_paper"], "--lr", "much"),
                    tmp_path / "said.txt")
    assert started.wait() == 2
    own, ours = started.text().splitlines()[-2:]
    assert own.startswith("error: argument --lr: expected a number")
    assert ours.startswith("error: cc_npc_paper_0_seed99: main_NPC.py: it ended with status 2")


@pytest.mark.parametrize("more, said", [
    (["--dataset", "f30k"], "--dataset_root is missing: .* with make, ROOT="),
    (["--dataset", "f30k", "--dataset_root", "nowhere"], "nowhere.*train_caps.txt does not exist"),
    (["--dataset_root", "x"], "--dataset"),
    (["--dataset", "scenes", "--methods", "none"], "--methods: none.args is not in "),
    (["--dataset", "scenes", "--methods", "lost"], "lost.args, line 1: away.py is not in "),
    (["--dataset", "scenes", "--seed", "1"], "--seed is set for each run"),
    (["--dataset", "scenes", "--resume", "a.pt"], "--resume is set for each run")])
def test_what_is_missing_or_set_for_each_run_is_one_line(more, said, tmp_path, refusal,
                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lost.args").write_text("# script: away.py\n")
    assert re.search(said, refusal(reproduce.main, more))
    assert [path.name for path in tmp_path.iterdir()] == ["lost.args"]
