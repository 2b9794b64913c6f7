"""benchmarks/table.py on made runs."""

import csv
import json
import re
from statistics import mean, pvariance, stdev

import numpy as np
import pytest
from conftest import options, write_lines
from PIL import Image

import clip
from benchmarks import lowest_weights, table
from data import training_pairs
from utils.training.history import write_weights

OPTIONS = {"dataset": "f30k", "dataset_root": "data", "noise_ratio": 0.2, "seed": 1, "lr": 1e-6,
           "weighting": "npc", "name": "NPC", "epochs": 2, "resume": None, "eval": False,
           "vision_model": "ViT-B/32", "batch_size": 256, "num_workers": 0, "experiments": "x"}


def scores(first):
    """An eval_test.json whose i2t R@1 is `first`, the others 1, 2, ... above it."""
    made = {metric: first + k for k, metric in enumerate(table.METRICS)}
    return {**made, "mean_R1": first + 1.5, "rsum": sum(made.values())}


@pytest.fixture
def run(tmp_path):
    """Make the folder of a finished run; returns its path."""

    def make(folder, first, **options):
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        options = {**OPTIONS, **options}
        (folder / "options.json").write_text(json.dumps(options))
        images = 5000 if options["dataset"] == "coco" else 1000
        (folder / "options_eval.json").write_text(
            json.dumps({**options, "test_images": images}))
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


def test_published_rows(run, tables):
    text, rows, _ = tables(run("f", 70), run("c", 70, dataset="coco"), run("cc", 70, dataset="cc",
                                                                           noise_ratio=0))
    # the paper's own figures for Flickr30K
    assert line(text, "NPC (published)", "0 %, 20 %, 40 %, 60 %")[2] == "3.61"
    assert line(text, "CLIP (published)", "0 %, 20 %, 40 %, 60 %")[2] == "56.40"
    assert line(text, "real", "NPC (published)")[3:] == ["71.1", "92.0", "96.2", "73.0", "90.5",
                                                         "94.8", "517.6"]
    one_k, five_k = text.split("### MSCOCO")[1:]
    assert line(one_k, "50 %", "NPC (published)")[3:] == ["78.5", "95.0", "98.1", "64.1", "89.6",
                                                          "98.1\\*", "–"]
    assert "wrong one" in one_k and "\\*" not in five_k
    assert line(one_k, "20 %", "NPC")[3] == "80.0" and line(five_k, "20 %", "NPC")[3] == "70.0"
    published = [row for row in rows if row["published"] == "1"]
    assert len(published) == 30
    for row in published:
        assert (row["t2i_R@10"] == "") == (row["table"] == "MSCOCO 1K")

    small = run("small", 70)
    (small / "options_eval.json").write_text(json.dumps({**OPTIONS, "test_images": 24}))
    assert "(published)" not in tables(small)[0]  # another test split
    text, rows, _ = tables(run("again", 70), "--no_published")
    assert "(published)" not in text and len(rows) == 1
    assert "variance over noise ratios takes runs of two or more" in text


def test_differences_from_the_published_row_of_noise_and_method(run, tables):
    folders = [run("n", 80, name="npc_released"), run("c", 80, name="clip_paper, last epoch"),
               run("r", 80, name="robust"), run("other", 80, name="NPC", noise_ratio=0.3)]
    text, _, _ = tables(*folders, run("coco", 70, dataset="coco", name="npc_paper"))
    flickr, one_k = (part.split("\n### ")[0] for part in (text, text.split("### MSCOCO 1K")[1]))
    assert line(flickr, "npc_released", "20 %")[2:] == ["-7.3", "-16.5", "-16.8", "+10.1", "-8.1",
                                                        "-10.8", "-49.4"]
    assert line(flickr, "clip_paper, last epoch", "20 %")[2] == "-2.3"
    assert flickr.count("| robust |") == 1 and "| NPC | 30 %" not in flickr
    assert line(one_k, "npc_paper", "20 %")[7:] == ["–", "–"]  # not known


def test_methods_are_told_apart_by_their_options(run, tables):
    text, rows, _ = tables(run("a", 70), run("b", 71, lr=2e-6), run("c", 72, weighting="none"),
                           run("d", 60, name="CLIP", lr=5e-7), "--no_published")
    assert {row["method"] for row in rows} == {
        "NPC, weighting npc, lr 1e-06", "NPC, weighting npc, lr 2e-06",
        "NPC, weighting none, lr 1e-06", "CLIP"}


def test_a_recipe_says_what_it_sets(run, tables, tmp_path):
    """And options that no other run of that name lacks say nothing."""
    sets = {"weighting": "none", "train_on": "clean", "judge_rounds": 2, "judge_lr": 1e-5}
    rest = {"train_on": "all", "judge_rounds": 0, "judge_lr": None}
    _, rows, _ = tables(run("a", 70, recipe="paper", **rest), run("b", 71, recipe="robust", **sets),
                        run("c", 72, recipe="robust", **{**sets, "judge_rounds": 1}),
                        run("d", 73, recipe="paper", name="small_loss", **rest), "--no_published")
    assert {row["method"] for row in rows} == {
        "NPC, recipe paper, judge_rounds 0", "NPC, recipe robust, judge_rounds 2",
        "NPC, recipe robust, judge_rounds 1", "small_loss"}
    _, rows, _ = tables(tmp_path / "a", tmp_path / "b", "--no_published")
    assert {row["method"] for row in rows} == {"NPC, recipe paper", "NPC, recipe robust"}


def test_initial_checkpoints_of_each_seed_are_one_method(run, tables):
    folders = [run(f"r{seed}", 70, seed=seed, vision_model=f"seed{seed}/best.pt")
               for seed in (1, 2)]
    assert line(tables(*folders)[0], "20 %", "NPC")[2] == "2"


def test_folders_of_eval_alone(run, tables, tmp_path):
    trained, zero_shot = run("trained", 70), run("zero", 40)
    (trained / "options.json").rename(tmp_path / "trained.json")
    tested = trained / "tested"
    for folder, resume in ((tested, trained / "epoch2.pt"), (zero_shot, None)):
        folder.mkdir(exist_ok=True)
        (folder / "eval_test.json").write_text(json.dumps(scores(70 if resume else 40)))
        (folder / "options_eval.json").write_text(json.dumps(
            {**OPTIONS, "noise_ratio": 0, "eval": True, "resume": resume and str(resume)}))
    (tmp_path / "trained.json").rename(trained / "options.json")
    (zero_shot / "options.json").unlink()
    np.savez(trained / "weights.npz", w=np.array([[0.5, np.nan], [0.75, 1]], np.float32))
    text, _, _ = tables(tested, zero_shot)
    assert line(text, "20 %", "NPC")[3] == "70.0"
    assert line(text, "–", "zero-shot")[3] == "40.0"
    assert line(text, str(tested))[6] == "0.750"  # of the run it tests


def test_figure_has_a_row_for_each_table(run, tables):
    *_, one = tables(run("a", 70))
    *_, three = tables(run("b", 70), run("c", 70, dataset="coco"))
    assert one[0] == three[0] and three[1] == pytest.approx(3 * one[1], abs=3)


def test_runs_without_scores_are_left_out(run, tables, capsys):
    good, unscored = run("good", 70), run("unscored", 71, noise_ratio=0.4)
    (unscored / "eval_test.json").unlink()
    table.main([str(good), str(unscored), "--out", str(good / "out")])
    said = capsys.readouterr().out
    assert f"left out {unscored}, which has no eval_test.json" in said and "--eval --resume" in said
    assert "| 20 % | NPC |" in said and "40 % | NPC |" not in said


@pytest.mark.parametrize("spoil, said", [
    (lambda r: (r / "eval_test.json").unlink(), "nothing to make tables of"),
    (lambda r: (r / "eval_test.json").write_text('{"i2t_R@1": 3'), "eval_test.json is not"),
    (lambda r: (r / "eval_test.json").write_text("3"), "eval_test.json is not"),
    (lambda r: (r / "options.json").write_text('{"name": "NPC", '), "options.json is not"),
    (lambda r: (r / "eval_test.json").write_text('{"i2t_R@1": 3}'), "lacks i2t_R@5"),
    (lambda r: (r / "log.jsonl").write_text("{"), "log.jsonl is not"),
    (lambda r: [(r / f"options{of}.json").unlink() for of in ("", "_eval")], "options_eval.json"),
    (lambda r: (r / "weights.npz").write_text("none"), "weights.npz is not"),
    (lambda r: (r / "options.json").write_text("{}"), "lacks what every run writes"),
])
def test_broken_runs(run, capsys, tmp_path, spoil, said):
    folder = run("broken", 70)
    spoil(folder)
    check_error(capsys, tmp_path, [folder], said)


@pytest.mark.parametrize("file, change", [
    ("options.json", {"seed": None}), ("options.json", {"noise_ratio": "much"}),
    ("eval_test.json", {"i2t_R@1": "high"})])
def test_text_where_numbers_belong_and_a_missing_seed(run, capsys, tmp_path, file, change):
    path = run("a", 50) / file
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(SystemExit) as stop:
        table.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {tmp_path / 'a'}: a .json file")


def test_a_name_is_no_mathematics(run, tables):
    text, _, _ = tables(run("a", 50, name=r"long $\frac{$"))
    assert r"long $\frac{$" in text


def test_the_same_seed_twice(run, capsys, tmp_path):
    folders = [run("a", 70), run("b", 71)]
    check_error(capsys, tmp_path, folders, "same seed 1")


def check_error(capsys, tmp_path, folders, said):
    with pytest.raises(SystemExit) as stop:
        table.main([*map(str, folders), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.match("error: .*\n$", error) and said in error
    assert not (tmp_path / "out").exists()


def test_scores_of_another_model_are_not_a_run_s(run, capsys, tmp_path):
    folder = run("r", 70)
    for resume, good in ((str(folder / "best.pt"), True), ("pre-trained_models/npc.pt", False)):
        (folder / "options_eval.json").write_text(json.dumps({**OPTIONS, "resume": resume}))
        if good:
            table.main([str(folder), "--out", str(tmp_path / "out")])
        else:
            with pytest.raises(SystemExit):
                table.main([str(folder), "--out", str(tmp_path / "out")])
            assert "pre-trained_models/npc.pt" in capsys.readouterr().err


def test_lowest_weights_are_those_of_the_run(dataset, capsys, tmp_path):
    data, run, out = dataset("cc"), tmp_path / "run", tmp_path / "lowest.png"
    run.mkdir()
    pairs = training_pairs(options(data), clip.Preprocess(32))

    def draw():
        lowest_weights.main([str(run), "--out", str(out)])

    def fails(said):
        with pytest.raises(SystemExit) as stop:
            draw()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and re.match("error: .*\n$", error) and said in error
        assert not out.exists()

    fails("options.json does not exist")
    text = json.dumps(vars(options(data, "--vision_model", "tiny")), default=str)
    (run / "options.json").write_text(text[:-9])
    fails("options.json is not")
    (run / "options.json").write_text(text)
    fails("weights.npz does not exist")
    write_weights(run / "weights.npz", np.ones((2, 12), np.float32), pairs)
    data.split_folder.joinpath("train_caps.txt").rename(tmp_path / "captions")
    write_lines(data.split_folder / "train_caps.txt", [*pairs.captions[:11], "another"])
    fails("weights of other captions")
    (tmp_path / "captions").rename(data.split_folder / "train_caps.txt")
    draw()
    with Image.open(out) as image:
        assert image.size == (1100, 500)
