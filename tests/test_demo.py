"""benchmarks/demo.py runs the repository's commands; the whole of it is `make demo`."""

import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import demo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CODE = """
import sys
from pathlib import Path
import demo

folder = Path(sys.argv[1])
demo.call("dataset/make_scenes.py", ["--out", folder / "data", "--train", 3], folder / "log")
demo.call("main_CLIP.py", ["--dataset_root", folder / "data", "--epochs", "none"], folder / "log")
"""


def test_a_command_that_fails_ends_the_demo_with_its_last_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], cwd=BENCHMARKS,
                          capture_output=True, text=True)
    assert done.returncode == 1
    said, where = done.stderr.splitlines()
    assert said.startswith("error: main_CLIP.py: argument --epochs") and "none" in said
    assert where == f"all that it printed: {tmp_path / 'log'}"
    log = (tmp_path / "log").read_text()
    first, *_, last = log.splitlines()
    assert "data" in first and last == f"error: {said.split(': ', 2)[2]}"
    assert len(list((tmp_path / "data" / "images").iterdir())) > 3


def test_the_figure_uses_its_space_and_hides_no_error_bar(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: shown.extend(self.axes))
    results = {name: [[{"i2t_R@1": 60.0 + k + seed} for _ in demo.RATIOS] for seed in (0, 1)]
               for k, name in enumerate((demo.ZERO_SHOT, *demo.METHODS))}
    demo.figure(results, tmp_path / "figure.png")
    axes, = shown
    assert axes.get_ylim()[0] > 50 and "i2t R@1" in axes.get_ylabel()
    assert "2 seeds" in axes.get_title()
    places = [bars.lines[0].get_xdata()[0] for bars in axes.containers]
    assert len(places) == len(set(places)) == len(results)
