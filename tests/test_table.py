"""benchmarks/table.py on made runs."""

import csv
import json
import re
from statistics import mean, pvariance, stdev

import pytest
from PIL import Image

from benchmarks import table
from params import parse_args

OPTIONS = {"dataset": "f30k", "dataset_root": "data", "noise_ratio": 0.2, "seed": 1, "lr": 1e-6,
           "name": "NPC", "epochs": 2, "resume": None}


def scores(first):
    """An eval_test.json whose i2t R@1 is `first`, the others 1, 2, ... above it."""
    made = {metric: first + k for k, metric in enumerate(table.METRICS)}
    return {**made, "mean_R1": first + 1.5, "rsum": sum(made.values())}


@pytest.fixture
def run(tmp_path):
    """Make the folder of a finished run; returns its path."""

    def make(folder, first, images=None, **options):
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        options = {**OPTIONS, **options}
        (folder / "options.json").write_text(json.dumps(options))
        images = images or (5000 if options["dataset"] == "coco" else 1000)
        (folder / "options_eval.json").write_text(
            json.dumps({**options, "resume": str(folder / "best.pt"), "test_images": images}))
        made = scores(first)
        if options["dataset"] == "coco":
            made = {"1K": scores(first + 10), "5K": made}
        (folder / "eval_test.json").write_text(json.dumps(made))
        (folder / "log.jsonl").write_text("".join(
            json.dumps({"epoch": e, "dev": {"mean_R1": 50 - e}}) + "\n" for e in (1, 2)))
        return folder

    return make


@pytest.fixture
def tables(tmp_path, capsys):
    """Run the command; returns the Markdown, the rows of the CSV file, and the figure's size."""

    def make(*args):
        out = tmp_path / "out"
        table.main([*map(str, args), "--out", str(out)])
        text = (out / "tables.md").read_text(encoding="utf-8")
        assert text in capsys.readouterr().out
        assert (out / "r1_over_noise.pdf").read_bytes().startswith(b"%PDF")
        with open(out / "tables.csv", encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        with Image.open(out / "r1_over_noise.png") as image:
            return text, rows, image.size

    return make


def line(text, *cells):
    """The cells of the one Markdown line that starts with `cells`."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found, = [own for own in lines if own[: len(cells)] == list(cells)]
    return found


def test_mean_and_deviation_over_seeds(run, tables):
    firsts = 70.0, 72.5, 71.0
    folders = [run(f"r{k}", first, seed=k, num_workers=k) for k, first in enumerate(firsts)]
    text, rows, _ = tables(*folders, run("other", 60, noise_ratio=0.6), folders[0])
    assert line(text, "20 %", "NPC")[2:4] == ["3", f"{mean(firsts):.1f} ± {stdev(firsts):.1f}"]
    assert line(text, "60 %", "NPC")[2:] == ["1", "60.0", "61.0", "62.0", "63.0", "64.0", "65.0",
                                             "375.0"]
    row, = [r for r in rows if (r["noise_ratio"], r["seeds"]) == ("0.2", "3")]
    assert float(row["t2i_R@5"]) == pytest.approx(mean(firsts) + 4, abs=1e-3)
    assert float(row["rsum"]) == pytest.approx(6 * mean(firsts) + 15, abs=1e-3)
    assert float(row["rsum std"]) == pytest.approx(6 * stdev(firsts), abs=1e-3)
    assert line(text, "NPC", "20 %, 60 %")[2] == f"{pvariance([mean(firsts), 60]):.2f}"
    assert line(text, str(folders[0]))[1:6] == ["20 %", "0", "2 of 2", "1", "49.0"]


@pytest.mark.parametrize("command, recipe, name", [
    ("npc", "paper", "NPC"), ("npc", "released", "NPC released"), ("npc", "robust", "robust"),
    ("clip", "paper", "CLIP"), ("clip", "released", "CLIP released"), ("clip", "robust", "robust")])
def test_a_row_is_called_by_script_and_recipe_unless_named(run, tables, command, recipe, name):
    own = parse_args(command, ["--recipe", recipe, "--device", "cpu"]).name
    assert own == name and line(tables(run("a", 70, name=own), "--no_published")[0], "20 %", name)
    assert parse_args(command, ["--recipe", recipe, "--name", "x", "--device", "cpu"]).name == "x"


def test_published_rows(run, tables, capsys):
    text, rows, _ = tables(run("f", 70), run("c", 70, dataset="coco"), run("cc", 70, dataset="cc",
                                                                           noise_ratio=0))
    # the paper's own figures for Flickr30K
    assert line(text, "NPC (published)", "0 %, 20 %, 40 %, 60 %")[2] == "3.61"
    assert line(text, "CLIP (published)", "0 %, 20 %, 40 %, 60 %")[2] == "56.40"
    assert line(text, "real", "NPC (published)")[3:] == ["71.1", "92.0", "96.2", "73.0", "90.5",
                                                         "94.8", "517.6"]
    one_k, five_k = text.split("### MSCOCO")[1:]
    assert line(one_k, "50 %", "NPC (published)")[3:] == ["78.5", "95.0", "98.1", "64.1", "89.6",
                                                          "98.1†", "–"]
    assert "wrong key" in one_k and "†" not in five_k
    assert line(one_k, "20 %", "NPC")[3] == "80.0" and line(five_k, "20 %", "NPC")[3] == "70.0"
    published = [row for row in rows if row["published"] == "1"]
    assert len(published) == 30
    for row in published:
        assert (row["t2i_R@10"] == "") == (row["table"] == "MSCOCO 1K")

    text, rows, _ = tables(run("again", 70), "--no_published")
    assert "(published)" not in text and len(rows) == 1
    table.main([str(run("small", 70, images=24)), "--out", str(run("x", 1) / "out")])
    said = capsys.readouterr().out
    assert "(published)" not in said and "your test set has 24 images, the paper's 1000" in said


def test_differences_from_the_published_row_of_noise_and_method(run, tables):
    folders = [run("n", 80, name="npc_released"), run("c", 80, name="clip_paper, last epoch"),
               run("r", 80, name="robust"), run("other", 80, name="NPC", noise_ratio=0.3)]
    text, _, _ = tables(*folders, run("coco", 70, dataset="coco", name="npc_paper"))
    flickr, one_k = (part.split("\n### ")[0] for part in (text, text.split("### MSCOCO 1K")[1]))
    assert line(flickr, "npc_released", "20 %")[2:] == ["-7.3", "-16.5", "-16.8", "+10.1", "-8.1",
                                                        "-10.8", "-49.4"]
    assert line(flickr, "clip_paper, last epoch", "20 %")[2] == "-2.3"
    assert not [row for row in flickr.splitlines() if row.startswith("| robust ")]
    assert not [row for row in flickr.splitlines() if re.match(r"\| NPC +\| 30 %", row)]
    assert line(one_k, "npc_paper", "20 %")[7:] == ["–", "–"]  # not known


def test_latex_escapes_what_latex_reads(run, tables, tmp_path):
    name = r"my_own long $\frac{$"
    text, _, _ = tables(run("a", 50, name=name), "--no_published")
    assert name in text
    latex = (tmp_path / "out" / "tables.tex").read_text()
    assert r"20 \%" in latex and r"my\_own long \$" in latex and r"\toprule" in latex
    assert [len(row.split(" & ")) for row in latex.splitlines() if row.endswith(r"\\")] == [10, 10]


def test_folders_of_eval_alone_and_of_the_newest_checkpoint(run, tables):
    trained, zero_shot = run("trained", 70), run("zero", 40)
    for folder, resume in ((trained / "tested", trained / "epoch2.pt"), (zero_shot, None)):
        folder.mkdir(exist_ok=True)
        (folder / "eval_test.json").write_text(json.dumps(scores(70 if resume else 40)))
        (folder / "options_eval.json").write_text(json.dumps(
            {**OPTIONS, "noise_ratio": 0, "resume": resume and str(resume)}))
    (zero_shot / "options.json").unlink()
    text, _, _ = tables(trained / "tested", zero_shot)
    assert line(text, "20 %", "NPC")[3] == "70.0"
    assert line(text, "–", "zero-shot")[3] == "40.0"
    change(trained / "options_eval.json", resume="auto")  # the newest checkpoint, the run's own
    assert line(tables(trained)[0], "20 %", "NPC")[3] == "70.0"
    change(trained / "options.json", dataset_root="other")
    assert line(tables(trained / "tested")[0], "–")[1] == f"zero-shot {trained / 'epoch2.pt'}"


def test_the_figure_has_room_for_one_ratio_and_for_each_table(run, tables):
    *_, one = tables(run("a", 70))
    *_, three = tables(run("b", 70), run("c", 70, dataset="coco"))
    assert one[0] == three[0] and three[1] == pytest.approx(3 * one[1], abs=3)
    found = table.figure({"Flickr30K": [table.Row("Flickr30K", 0.2, "mine", 1, scores(70))]})
    found.draw_without_rendering()
    axes = found.axes[1]
    assert axes.get_xlim() == (15, 25) and list(axes.get_xticks()) == [20]
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1  # beside lines


def test_runs_without_scores_are_left_out(run, capsys):
    good, unscored = run("good", 70), run("unscored", 71, noise_ratio=0.4)
    (unscored / "eval_test.json").unlink()
    table.main([str(good), str(unscored), "--out", str(good / "out")])
    said = capsys.readouterr().out
    assert f"left out {unscored}, which has no eval_test.json" in said and "--eval --resume" in said
    assert line(said, "20 %", "NPC") and not re.search(r"\| 40 % +\| NPC +\|", said)


@pytest.mark.parametrize("spoil, said", [
    (lambda r: (r / "eval_test.json").unlink(), "nothing to make tables of"),
    (lambda r: (r / "eval_test.json").write_text('{"i2t_R@1": 3'), "eval_test.json is not"),
    (lambda r: (r / "eval_test.json").write_text("3"), "eval_test.json is not"),
    (lambda r: (r / "options.json").write_text('{"name": "NPC", '), "options.json is not"),
    (lambda r: (r / "eval_test.json").write_text('{"i2t_R@1": 3}'), "lacks i2t_R@5"),
    (lambda r: (r / "eval_test.json").write_text(
        json.dumps(scores(3) | {"rsum": "high"})), "a .json file of it lacks"),
    (lambda r: (r / "log.jsonl").write_text("{"), "log.jsonl is not"),
    (lambda r: [(r / f"options{of}.json").unlink() for of in ("", "_eval")], "options_eval.json"),
    (lambda r: change(r / "options.json", seed=None), "lacks what every run writes"),
    (lambda r: change(r / "options.json", noise_ratio="much"), "lacks what every run writes"),
    (lambda r: change(r / "options_eval.json", resume="pre-trained_models/npc.pt"),
     "has the scores of pre-trained_models/npc.pt, which is not of that run"),
    (lambda r: change(r / "options_eval.json", resume=""), "has the scores of a model, which"),
])
def test_a_broken_run_is_one_line(run, refusal, tmp_path, spoil, said):
    folder, out = run("broken", 70), tmp_path / "out"
    spoil(folder)
    assert said in refusal(table.main, [folder, "--out", out]) and not out.exists()


def change(path, **values):
    """Change the object in a .json file; None takes a key out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_the_same_name_noise_and_seed_twice(run, refusal, tmp_path):
    folders, out = (run("a", 70), run("b", 71, lr=2e-6)), tmp_path / "out"
    assert "different --name" in refusal(table.main, [*folders, "--out", out])
    assert not out.exists()
