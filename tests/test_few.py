"""One, two or three distinct images and captions: every command ends with a result or one line."""

import csv
import json
import warnings

import numpy as np
import pytest
from conftest import write_lines

import find_noise
import get_memorybank
import main_CLIP
import main_NPC
import search

COUNTS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 3)]


@pytest.fixture(params=COUNTS, ids=lambda counts: "{}x{}".format(*counts))
def few(dataset, request):
    """A data set of six pairs with few distinct images and captions, in all three splits."""
    images, captions = request.param
    data = dataset("cc")
    for split, ids in data.ids.items():
        write_lines(data.split_folder / f"{split}_ids.txt", [ids[k % images] for k in range(6)])
        write_lines(data.split_folder / f"{split}_caps.txt",
                    [f"thing {k % captions}" for k in range(6)])
    return data


@pytest.fixture
def run(capsys, tmp_path):
    """Run a command, in which no computation may go wrong."""

    def run(command, data, *more):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.filterwarnings("error", "std\\(\\)")
            command.main([*data.options, "--vision_model", "tiny", "--device", "cpu",
                          "--num_workers", "0", *map(str, more)])
        assert "nan" not in capsys.readouterr().out.lower().split()

    return run


def refused_without_mismatches(run, capsys, few, *words):
    """Whether every image stands beside every caption, so that the judge refuses in one line."""
    if len({*few.lines("train_ids.txt")}) > 1 and len({*few.lines("train_caps.txt")}) > 1:
        return False
    with pytest.raises(SystemExit):
        run(*words)
    said = capsys.readouterr().err
    assert "every caption stands beside every image" in said and said.count("\n") == 1
    return True


@pytest.mark.parametrize("more", [("paper", "--score", "loss"), ("robust", "--judge_rounds", 0),
                                  ("robust", "--judge_rounds", 1, "--score", "cosine")])
def test_judging(few, run, tmp_path, capsys, more):
    words = find_noise, few, "--out", tmp_path, "--recipe", *more
    if more[0] == "robust" and refused_without_mismatches(run, capsys, few, *words):
        return
    run(*words)
    with open(tmp_path / "suspicious_pairs.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert sorted(int(row["pair"]) for row in rows) == list(range(6))
    assert np.isfinite([[float(row["score"]), float(row["posterior"])] for row in rows]).all()


@pytest.mark.parametrize("few", [(1, 1), (1, 3), (3, 1)], indirect=True)
@pytest.mark.parametrize("command, more", [
    (main_CLIP, ("--recipe", "paper")), (main_NPC, ("--recipe", "paper")),
    (main_NPC, ("--recipe", "released"))])
def test_training(few, run, tmp_path, command, more):
    run(command, few, *more, "--noise_ratio", 0.4, "--epochs", 2, "--batch_size", 2,
        "--checkpoint_path", tmp_path, "--experiments", "few")
    for line in (tmp_path / "few/log.jsonl").read_text().splitlines():
        assert np.isfinite([v for v in json.loads(line).values() if isinstance(v, float)]).all()
    for path in few.root.glob("annotations/*/*.npz"):
        with np.load(path) as bank:
            assert all(np.isfinite(bank[name]).all() for name in bank.files)


def test_bank_and_search(few, run, tmp_path, capsys):
    words = (get_memorybank, few, "--judge_rounds", 1, "--judge_steps", 2, "--format", "released")
    if not refused_without_mismatches(run, capsys, few, *words):
        run(*words)
    for query in ("a thing", next((few.root / "images").iterdir())):
        run(search, few, query, "--split", "all", "--out", tmp_path / "sheet.png")
