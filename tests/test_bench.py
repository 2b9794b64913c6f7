"""The benchmarks of speed run, on very little, and say what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--vision_model", "tiny", "--batch_size", "4", "--device", "cpu", "--context_length", "77"]


def bench(name, tmp_path, *options):
    """What a benchmark prints, and what it writes."""
    words = [sys.executable, BENCHMARKS / name, *TINY, *options, "--json", tmp_path / "out.json"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_the_step_of_every_contender_is_timed(tmp_path):
    said, found = bench("bench.py", tmp_path, "--only", "step", "--rounds", 1, "--noise", 0.2)
    results = found["step"]["0.2"]
    contenders = [name for name, result in results.items() if isinstance(result, dict)]
    assert len(contenders) == 4 and all(f"| {name} " in said for name in contenders)
    assert all(len(results[name]["seconds"]) == 1 for name in contenders)
    assert 1 < results["u_image"] < results["u_text"] < 3  # five captions share an image


@pytest.mark.slow
def test_an_epoch_is_trained_and_taken_apart(tmp_path):
    said, found = bench("epoch.py", tmp_path, "--num_images", 4, "--num_dev", 5)
    parts = [line.split("|")[4] for line in said.splitlines() if line.count("|") == 5][2:-1]
    assert len(parts) == len(found) - 1 and abs(found["total"] - sum(map(float, parts))) < 0.05 * 9
    assert found["steps"] > 0 and "20 captions" in said
