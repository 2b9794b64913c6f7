"""What a newcomer sees: options, mistyped or in conflict, their defaults, the help, progress; an
environment that lacks something; and how a failing command ends."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from zipfile import BadZipFile

import processes
import pytest
import torch
from conftest import ROOT, make_dataset, write_lines
from test_docs import run_script
from test_prepare import as_csv, photos

import construct_noise
import get_memorybank
import main_CLIP
import main_NPC
import params
from dataset import prepare_pairs
from params import Parser, parse_args
from utils import distributed, progress
from utils.errors import InputError, command
from utils.progress import Lines

COMMANDS = [str(path.relative_to(ROOT)) for folder in (".", "dataset", "benchmarks")
            for path in sorted((ROOT / folder).glob("*.py")) if "\n    main()" in path.read_text()]


@pytest.mark.parametrize("argv, near", [
    (["--datset", "coco"], "--dataset"), (["--batch-size", "8"], "--batch_size"),
    (["--dataset_rot", "dataset/mine"], "--dataset_root"), (["--learning_rate=1e-5"], "--lr"),
    (["--name", "x", "configs/robust.args"], "@configs/robust.args"),
    (["--dataset", "coca"], "coco"), (["--dataset", "f30"], "f30k"),
    (["--recipe", "papper"], "paper"), (["--precision", "amp_bf6"], "amp_bf16"),
    *((argv, None) for argv in (["--zzzz", "seed"], ["--device", "cuda:99"], ["--lr", "seed"],
                                ["nowhere/robust.args"], ["--data_on", "--eager"]))])
def test_mistyped_words_alone_suggest_the_near_one(argv, near, refusal):
    said = refusal(main_NPC.main, argv)
    assert f"did you mean {near}?" in said if near else "did you mean" not in said


@pytest.mark.parametrize("content, said", [
    (None, "No such file"), (b"--name 'x\n", "the line '--name 'x'")])
def test_a_file_of_options_that_cannot_be_read(tmp_path, content, said, refusal):
    """A text that begins with @, as a query of search.py may, is taken for such a file."""
    if content:
        (tmp_path / "x").write_bytes(content)
    line = refusal(main_NPC.main, [f"@{tmp_path}/x"])
    assert said in line and "@FILE" in line and (content or "a space before a text" in line)


@pytest.mark.parametrize("module, groups", [
    (main_NPC, "data model method optimisation run evaluation"), (construct_noise, "data run"),
    (main_CLIP, "data model method optimisation run evaluation"),
    (get_memorybank, "data model method run evaluation")])
def test_help_is_grouped_and_every_option_is_explained(module, groups, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for group in groups.split():
        assert f"\n{group}:\n" in text
    for block in text.split("\n  --")[1:]:
        assert len(" ".join(block.split()).split(" ", 1)[-1]) > 15, block
    assert "without it" not in text


@pytest.mark.parametrize("script", COMMANDS)
def test_every_script_has_a_help(script, tmp_path):
    said = processes.run(run_script, [str(ROOT / script), "--help"], tmp_path / "out")
    assert said.startswith("usage: ")
    if "/" not in script:  # an example is the first line
        assert said.startswith(f"usage: python {script} --")


# ---- defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs, size", [(60, 8), (720, 45), (4095, 255), (30_000, 256)])
def test_an_epoch_has_sixteen_steps(tmp_path, pairs, size):
    data = make_dataset(tmp_path / "data", "cc")
    write_lines(data.split_folder / "train_caps.txt", ["a"] * pairs)
    for name in ("npc", "clip", "memorybank", "find_noise"):
        assert parse_args(name, data.options).batch_size == size
    assert parse_args("npc", [*data.options, "--batch_size", "31"]).batch_size == 31
    (data.split_folder / "train_caps.txt").unlink()
    assert parse_args("npc", data.options).batch_size == 256


@pytest.mark.parametrize("command, precision, lr", [
    ("npc", "fp32", 1e-5), ("clip", "amp_bf16", 1e-5), ("npc", "fp16", 2e-7),
    ("clip", "fp16", 5e-7)])
def test_half_weights_take_the_authors_rates(command, precision, lr):
    assert parse_args(command, ["--precision", precision, "--device", "cpu"]).lr == lr


@pytest.mark.parametrize("images, held_out", [(10, 1), (240, 24), (30_000, 3000), (500_000, 5000)])
def test_a_tenth_of_the_images_is_held_out_up_to_mscoco_s_number(images, held_out):
    splits = prepare_pairs.draw_split(range(images), None, None, None, 0)
    assert {split: len(own) for split, own in splits.items()} == {
        "dev": held_out, "test": held_out, "train": images - 2 * held_out}


# ---- paths --------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("command", params.COMMANDS)
def test_every_path_expands_the_tilde(home, command):
    """On the command line, where a shell leaves --option=~/x alone, and in a file of options."""
    parser = params.parser_of(command)
    paths = [a for a in parser._actions
             if a.metavar and {"DIR", "FILE", "PATH", "CKPT"} & set(a.metavar.split("|"))]
    assert paths or command == "noise"
    for action in paths:
        flag = action.option_strings[0]
        others = [f"{a.option_strings[0]}=x" if a.option_strings else "x"
                  for a in parser._actions if a.required and a is not action]
        (home / "file.args").write_text(f"{flag} ~/in/x  # with a comment\n")
        for words in ([f"{flag}=~/in/x"], [flag, "~/in/x"], ["@~/file.args"]):
            assert getattr(parser.parse_args([*others, *words]), action.dest) == f"{home}/in/x"


def test_paths_of_other_scripts_expand_the_tilde(home):
    parser = Parser("")
    parser.add_argument_group("x").add_argument("--root", type=Path, nargs="+")
    assert parser.parse_args(["--root", "~/a", "b"]).root == [home / "a", Path("b")]


def test_configs_are_found_from_any_folder(home):
    assert parse_args("npc", ["@configs/npc_paper.args"]).name == "npc_paper"
    Path("configs").mkdir()
    Path("configs/npc_paper.args").write_text("--name mine")  # one's own comes first
    assert parse_args("npc", ["@configs/npc_paper.args"]).name == "mine"


# ---- what does not go together ------------------------------------------------------------------


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("size, more, expected", [
    (None, {}, 1), ("", {}, 1), ("1", {}, 1), ("2", TORCHRUN, 2), ("2", {}, "RANK, LOCAL"),
    ("2", {**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT; start with torchrun"), ("x", {}, "=x")])
def test_the_environment_tells_torchrun_s_processes(monkeypatch, size, more, expected):
    for name, value in {"WORLD_SIZE": size, **dict.fromkeys(TORCHRUN), **more}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if isinstance(expected, int):
        assert distributed.launched() == expected
        return
    with pytest.raises(InputError, match=expected):
        parse_args("npc", ["--compile"])
    with pytest.raises(InputError, match=expected):
        distributed.join_processes(torch.device("cpu"))


COMPILED = ["--compile", "--device", "cuda"]


@pytest.mark.parametrize("command, words, said", [
    ("npc", ["--resume", ""], "expected a path"),
    ("npc", ["--resume", "auto", "--overwrite"], "--overwrite deletes what --resume auto"),
    ("npc", ["--wandb", "x"], "pip install wandb"),
    ("memorybank", ["--judge", "tiny", "--judge_features", "x.npz"], "two judges"),
    ("find_noise", ["--score", "npc"], "--weights RUN/weights.npz go together"),
    ("find_noise", ["--weights", "x.npz"], "--weights RUN/weights.npz go together"),
    *(("npc", [*COMPILED, *more], "--compile is for steps that are replayed") for more in (
        ["--eager"], ["--precision", "fp16"], ["--device", "cpu"], ["torchrun"]))])
def test_options_that_do_not_go_together(monkeypatch, refusal, command, words, said):
    monkeypatch.setattr(params, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_args("npc", COMPILED).compile
    if words[-1] == "torchrun":
        for name, value in {"WORLD_SIZE": "2", **TORCHRUN}.items():
            monkeypatch.setenv(name, value)
        words = words[:-1]
    assert said in refusal(functools.partial(parse_args, command), words)


# ---- progress ------------------------------------------------------------------------------------


def test_a_log_file_has_a_line_of_its_own_for_each_state(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    with progress.progress(range(3), desc="reading", unit="img", leave=False) as bar:
        assert list(bar) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [re.match(r"reading: +(\d+)%.*\| (\d)/3 \[00:00<", line)[2] for line in lines] == [
        "0", "1", "2", "3"]


def test_a_log_file_has_at_most_a_line_a_minute(monkeypatch, capsys):
    """And none of what takes less."""
    seconds = iter(range(0, 10_000, 10))
    assert list(progress.progress(range(50))) == list(range(50))
    assert capsys.readouterr().err == ""
    bar = progress.progress(range(50))
    monkeypatch.setattr(bar, "_time", lambda: next(seconds))
    bar.start_t = bar.last_print_t = 0
    assert list(bar) == list(range(50))
    said = re.findall(r"\[(\d+):(\d+)<", capsys.readouterr().err)
    times = [60 * int(minutes) + int(seconds) for minutes, seconds in said]
    assert len(times) > 5 and all(b - a >= 60 for a, b in zip([0, *times], times, strict=False))


@pytest.mark.parametrize("place", ["terminal", "notebook"])
def test_a_terminal_and_a_notebook_have_a_bar(monkeypatch, place):
    made = []
    monkeypatch.setattr(progress, "tqdm", lambda items, **options: made.append(options) or items)
    if place == "notebook":
        monkeypatch.setattr(progress, "IN_NOTEBOOK", True)
    else:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.progress(range(3), unit="img")) == [0, 1, 2]
    assert made == [{"unit": "img", "disable": False}] and Lines is not progress.tqdm


def test_one_of_several_processes_shows_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(progress, "is_main", lambda: False)
    assert list(progress.progress(range(3))) == [0, 1, 2] and capsys.readouterr().err == ""


def test_preparing_pairs_says_how_much_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    source = as_csv(tmp_path / "p.csv", photos(tmp_path / "photos"))
    prepare_pairs.main(["--pairs", str(source), "--images", str(tmp_path / "photos"), "--root",
                        str(tmp_path / "r")])
    said = capsys.readouterr().err
    for what in ("reading", "placing"):
        assert re.search(rf"{what}: +50%.*\| 10/20 \[\d\d:\d\d<\d\d:\d\d", said)


# ---- an environment that lacks something --------------------------------------------------------


def ended_early(script, *options, **environment):
    """(status, stderr) of a script without any installed package."""
    done = subprocess.run([sys.executable, "-S", ROOT / script, *options], capture_output=True,
                          text=True, env={"PATH": os.environ["PATH"], **environment})
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("script", [c for c in COMMANDS if not c.startswith("benchmarks")])
def test_a_missing_package_and_ctrl_c_during_imports_are_one_line(script, tmp_path):
    """Where Python puts no script's folder on its path (python -P), too."""
    status, said = ended_early(script, PYTHONSAFEPATH="1")
    assert status == 2 and said.count("\n") == 1 and "pip install -r requirements.txt" in said
    package = re.match(r"error: No module named '(\w+)', which ", said)[1]
    assert not list(ROOT.glob(f"{package}*"))  # none of ours
    (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt")
    assert ended_early(script, PYTHONPATH=str(tmp_path)) == (130, "interrupted\n")


def test_a_user_without_home_and_name(dataset, tmp_path):
    """In a container with --user: neither HOME nor a line of /etc/passwd."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef unknown(uid):\n    raise KeyError(uid)\npwd.getpwuid = unknown\n")
    keep = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}
    argv = [*dataset("cc").options, "--vision_model", "tiny", "--device", "cpu", "--num_workers",
            "0", "--batch_size", "8", "--epochs", "1"]
    for more, status in (([], 0), (["--resume=~/x.pt"], 2)):
        done = subprocess.run([sys.executable, ROOT / "main_CLIP.py", *argv, *more], cwd=tmp_path,
                              env={**keep, "PYTHONPATH": str(tmp_path)}, capture_output=True,
                              text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "logs" / "ex0" / "best.pt").exists() and "HOME is not set" in done.stderr


# ---- how a failing command ends -----------------------------------------------------------------


def ended(error, capsys):
    """(status, stderr) of a command that raises `error` in a thread and in itself."""

    def fail():
        raise error

    @command
    def main():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        fail()

    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


MENDABLE = [
    (InputError("x.txt, line 3: expected a number"), "x.txt, line 3: expected a number"),
    (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt: No space left .*make room"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; choose"),
    (ModuleNotFoundError("No module named 'pyarrow'"), "No module named 'pyarrow'.*pip install"),
    (MemoryError(), "out of memory.*--batch_size"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory.*--batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory.*--batch_size")]


@pytest.mark.parametrize("error, line", MENDABLE, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("debug", ["", "1"])
def test_what_a_person_can_mend_is_one_line(error, line, debug, capsys, monkeypatch):
    monkeypatch.setenv("NPC_DEBUG", debug)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    status, said = ended(error, capsys)
    assert status == 2 and re.match(f"error: .*{line}", said.splitlines()[-1])
    assert ("Traceback" in said) == (debug == "1") and (debug or said.count("\n") == 1)


@pytest.mark.parametrize("error", [
    AssertionError("x"), RuntimeError("the process group x"), RecursionError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), json.JSONDecodeError("x", "", 0),
    BadZipFile("x")], ids=lambda x: type(x).__name__)
def test_a_bug_keeps_its_traceback(error, capsys):
    status, said = ended(error, capsys)
    assert status == 1 and "Traceback" in said
    assert said.splitlines()[-1].endswith(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "both streams"])
def test_a_closed_pipe_ends_a_command_quietly(both):
    code = ("import itertools; from utils.errors import command\n"
            "command(lambda: [print('line', k) for k in itertools.count()])()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT if both else subprocess.PIPE) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.wait(60) == 1
        assert both or process.stderr.read().count("\n") == 1


def test_an_error_that_python_goes_on_after_ends_nothing():
    """Python hands such errors to the hook, too: a pickle that asks for 8 EiB can make one."""
    code = ("import sys, utils.errors\n"
            "sys.excepthook(SystemError, SystemError('x'), None)\nprint('goes on')")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("goes on\n", "SystemError: x\n")


@pytest.mark.parametrize("module", [main_NPC, main_CLIP])
def test_no_arguments_say_what_to_do(module):
    with pytest.raises(SystemExit) as caught:
        module.main([])
    for word in ("main_NPC.py --dataset", "--eval --resume", "make demo", "--help",
                 "dataset/README.md"):
        assert word in str(caught.value.code)
