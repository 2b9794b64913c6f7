"""Options: defaults that depend on other things, paths, what does not go together."""

from pathlib import Path

import pytest
import torch
from conftest import make_dataset, write_lines

import params
from dataset.prepare_pairs import draw_split
from params import Parser, parse_args
from utils import distributed
from utils.errors import InputError


@pytest.mark.parametrize("pairs, size", [(60, 8), (720, 45), (4095, 255), (30_000, 256)])
def test_an_epoch_has_sixteen_steps(tmp_path, pairs, size):
    data = make_dataset(tmp_path / "data", "cc")
    write_lines(data.split_folder / "train_caps.txt", ["a"] * pairs)
    for command in ("npc", "clip", "memorybank", "find_noise"):
        assert parse_args(command, data.options).batch_size == size
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
    splits = draw_split(range(images), None, None, None, 0)
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
def test_options_that_do_not_go_together(monkeypatch, capsys, command, words, said):
    monkeypatch.setattr(params, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_args("npc", COMPILED).compile
    if words[-1] == "torchrun":
        for name, value in {"WORLD_SIZE": "2", **TORCHRUN}.items():
            monkeypatch.setenv(name, value)
        words = words[:-1]
    with pytest.raises(SystemExit) as caught:
        parse_args(command, words)
    assert caught.value.code == 2 and said in capsys.readouterr().err
