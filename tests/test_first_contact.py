"""What a newcomer sees: mistyped options, the help, an environment that lacks something; and how a
failing command ends."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from zipfile import BadZipFile

import processes
import pytest
import torch
from conftest import ROOT
from test_docs import run_script

import construct_noise
import get_memorybank
import main_CLIP
import main_NPC
from utils.errors import InputError, command

COMMANDS = [str(path.relative_to(ROOT)) for folder in (".", "dataset", "benchmarks")
            for path in sorted((ROOT / folder).glob("*.py")) if "\n    main()" in path.read_text()]


def refusal(argv, capsys):
    """The one line with which main_NPC.py refuses its options."""
    with pytest.raises(SystemExit) as caught:
        main_NPC.main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("argv, near", [
    (["--datset", "coco"], "--dataset"), (["--batch-size", "8"], "--batch_size"),
    (["--dataset_rot", "dataset/mine"], "--dataset_root"), (["--learning_rate=1e-5"], "--lr"),
    (["--name", "x", "configs/robust.args"], "@configs/robust.args"),
    (["--dataset", "coca"], "coco"), (["--dataset", "f30"], "f30k"),
    (["--recipe", "papper"], "paper"), (["--precision", "amp_bf6"], "amp_bf16"),
    *((argv, None) for argv in (["--zzzz", "seed"], ["--device", "cuda:99"], ["--lr", "seed"],
                                ["nowhere/robust.args"], ["--data_on", "--eager"]))])
def test_mistyped_words_alone_suggest_the_near_one(argv, near, capsys):
    said = refusal(argv, capsys)
    assert f"did you mean {near}?" in said if near else "did you mean" not in said


@pytest.mark.parametrize("content, said", [
    (None, "No such file"), (b"--name 'x\n", "the line '--name 'x'")])
def test_a_file_of_options_that_cannot_be_read(tmp_path, content, said, capsys):
    """A text that begins with @, as a query of search.py may, is taken for such a file."""
    if content:
        (tmp_path / "x").write_bytes(content)
    line = refusal([f"@{tmp_path}/x"], capsys)
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


@pytest.mark.parametrize("module", [main_NPC, main_CLIP])
def test_no_arguments_say_what_to_do(module):
    with pytest.raises(SystemExit) as caught:
        module.main([])
    for word in ("main_NPC.py --dataset", "--eval --resume", "make demo", "--help",
                 "dataset/README.md"):
        assert word in str(caught.value.code)
