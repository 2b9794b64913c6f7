"""benchmarks/driver.py runs and reuses commands; the demo's figure; the benchmarks of speed run, on
very little, and say what they promise. `make demo` runs all of the demo."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from benchmarks import demo, driver
from utils.errors import InputError


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Commands are forked from this process, which has imported torch already."""
    monkeypatch.setattr(driver, "PROCESSES", multiprocessing.get_context("fork"))
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def drawing(folder, count):
    return driver.Job("drawn", folder / "run", [
        ("dataset/make_scenes.py", "--out", folder / "run" / "data", "--train", count),
        ("dataset/make_scenes.py", "--out", folder / "run" / "more", "--train", 1)])


def test_finished_commands_are_reused_and_others_start_anew(tmp_path, capfd):
    driver.run_jobs([drawing(tmp_path, 3)])
    assert f"{tmp_path}/run/data: 3 train" in (tmp_path / "run" / "output.txt").read_text()
    assert driver.read_seconds(tmp_path / "run") > 0.1
    assert len((tmp_path / "run" / "seconds.txt").read_text().split()) == 2
    before = (tmp_path / "run" / "data").stat().st_mtime_ns
    driver.run_jobs([drawing(tmp_path, 3)])
    assert (tmp_path / "run" / "data").stat().st_mtime_ns == before
    assert "drawn: reused" in capfd.readouterr().out
    driver.run_jobs([drawing(tmp_path, 4)])
    said = (tmp_path / "run" / "output.txt").read_text()
    assert "4 train" in said and "3 train" not in said


def test_a_command_that_fails_ends_the_others_with_its_last_line(tmp_path):
    log = tmp_path / "bad" / "output.txt"
    bad = driver.Job("bad", tmp_path / "bad", [("main_CLIP.py", "--epochs", "none")])
    others = [driver.Job("slow", tmp_path / "slow", [("main_CLIP.py",)], hook=wait),
              driver.Job("never", tmp_path / "never", [("main_CLIP.py",)])]
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        driver.run_jobs([others[0], bad, others[1]], at_once=2)
    assert str(caught.value).startswith("bad: main_CLIP.py: argument --epochs: expected")
    assert str(caught.value).endswith(f"all that it printed is in {log}")
    assert time.monotonic() - start < 30 and not bad.finished
    assert not (tmp_path / "never" / "commands.txt").exists()


def test_a_command_without_an_error_line_names_its_status(tmp_path):
    with pytest.raises(InputError, match="killed: main_CLIP.py: it ended with status -9"):
        driver.run_jobs([driver.Job("killed", tmp_path / "a", [("main_CLIP.py", "--help")],
                                    hook=functools.partial(kill, 9))])


def wait():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the handler of the driver
    time.sleep(60)


def kill(number):
    os.kill(os.getpid(), number)


def test_the_demo_s_figure_uses_its_space_and_hides_no_line(tmp_path):
    results = {name: [[{"i2t_R@1": 60.0 + k + seed} for _ in demo.RATIOS] for seed in (0, 1)]
               for k, name in enumerate((demo.ZERO_SHOT, *demo.METHODS))}
    figure = demo.figure(results)
    figure.draw_without_rendering()
    axes, = figure.axes
    assert axes.get_ylim()[0] > 50 and "i2t R@1" in axes.get_ylabel()
    assert "2 seeds" in axes.get_title()
    places = [bars.lines[0].get_xdata()[0] for bars in axes.containers]
    assert len(places) == len(set(places)) == len(results)
    assert figure.legends[0].get_window_extent().y1 < axes.get_window_extent().y0
    driver.save_figure(figure, tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size and (tmp_path / "figure.pdf").stat().st_size


# ---- speed ---------------------------------------------------------------------------------------


TINY = ["--vision_model", "tiny", "--batch_size", "4", "--device", "cpu", "--context_length", "77"]


def bench(name, *options):
    """What a benchmark prints."""
    words = [sys.executable, ROOT / "benchmarks" / name, *TINY, *options]
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
