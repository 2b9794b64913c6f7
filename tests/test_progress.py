"""Progress in a terminal, in a notebook and in a log file."""

import re
import sys

import pytest
from test_prepare import as_csv, photos

from dataset import prepare_pairs
from utils import progress
from utils.progress import Lines


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
