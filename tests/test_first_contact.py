"""What a newcomer sees: no arguments, typing errors, the help; and how a failing command ends."""

import errno
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from zipfile import BadZipFile

import pytest
import torch

import construct_noise
import get_memorybank
import main_CLIP
import main_NPC
from utils.errors import InputError, command

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("module", [main_NPC, main_CLIP])
def test_no_arguments_say_in_five_lines_what_to_do(module):
    with pytest.raises(SystemExit) as caught:
        module.main([])
    lines = str(caught.value.code).splitlines()
    assert len(lines) == 5
    text = "\n".join(lines)
    for word in (f"python {module.__name__}.py --dataset", "--eval --resume", "make demo", "--help",
                 "dataset/README.md"):
        assert word in text


@pytest.mark.parametrize("argv, near", [
    (["--datset", "coco"], "--dataset"), (["--batchsize", "8"], "--batch_size"),
    (["--dataset", "coca"], "coco"), (["--dataset", "f30"], "f30k"),
    (["--recipe", "papper"], "paper"), (["--precision", "amp_bf6"], "amp_bf16")])
def test_typing_errors_suggest_the_near_word(argv, near, capsys):
    with pytest.raises(SystemExit) as caught:
        main_NPC.main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1
    assert f"did you mean {near}?" in error


@pytest.mark.parametrize("argv", [["--zzzz"], ["--device", "cuda:99"], ["--lr", "seed"]])
def test_nothing_else_suggests_a_word(argv, capsys):
    with pytest.raises(SystemExit):
        main_NPC.main(argv)
    assert "did you mean" not in capsys.readouterr().err


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


COMMANDS = [str(path.relative_to(ROOT)) for folder in (".", "dataset", "benchmarks")
            for path in sorted((ROOT / folder).glob("*.py")) if "\n    main()" in path.read_text()]
SLOW = {"benchmarks/bench.py", "benchmarks/epoch.py", "benchmarks/million.py",
        "benchmarks/ablation.py", "benchmarks/lowest_weights.py"}  # for who changes the code
RUN = """
import runpy, sys
sys.path[:0] = [{root!r}, {folder!r}]
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "sklearn", "matplotlib") if name in sys.modules])
"""


@pytest.mark.parametrize("script", [c for c in COMMANDS if c not in SLOW])
def test_help_comes_before_what_takes_seconds_to_import(script):
    path = ROOT / script
    code = RUN.format(root=str(ROOT), folder=str(path.parent), script=str(path))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said.startswith("usage: ") and said.splitlines()[-1] == "[]"
    if path.parent == ROOT:  # an example is the first line
        assert said.startswith(f"usage: python {script} --")


# ---- the net under every command ----------------------------------------------------------------


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
