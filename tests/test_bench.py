"""The benchmarks of speed run, on very little, and say what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--vision_model", "tiny", "--batch_size", "4", "--device", "cpu", "--context_length", "77"]


def bench(name, *options):
    """What a benchmark prints."""
    words = [sys.executable, BENCHMARKS / name, *TINY, *options]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_step_of_every_contender_is_timed(tmp_path):
    path = tmp_path / "out.json"
    said = bench("bench.py", "--rounds", 1, "--noise", 0.2, "--json", path)
    results = json.loads(path.read_text())["step"]["0.2"]
    contenders = [name for name, result in results.items() if isinstance(result, dict)]
    assert len(contenders) == 4 and all(f"| {name} " in said for name in contenders)
    assert all(len(results[name]["seconds"]) == 1 for name in contenders)
    assert 1 < results["u_image"] < results["u_text"] < 3  # five captions share an image


@pytest.mark.slow
def test_an_epoch_is_trained_and_taken_apart():
    said = bench("epoch.py", "--num_images", 4, "--num_dev", 5)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()
            if line.count("|") == 5][2:]
    *parts, total = [float(row[-1]) for row in rows]
    assert len(parts) == 7 and abs(total - sum(parts)) < 0.05 * 9
    assert float({name: once for name, once, *_ in rows}["steps"]) > 0
    assert "20 captions" in said
