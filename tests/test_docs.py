"""README and docs: their commands parse, their links lead somewhere, their example trains; the
README's blocks run as they stand."""

import argparse
import csv
import functools
import glob
import json
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, make_dataset, write_lines
from sklearn.metrics import roc_auc_score
from torch.distributed.run import get_args_parser as torchrun_parser

import clip
import params
from clip import weights
from dataset.make_scenes import make_scenes
from utils.reading.layout import read_ids, read_lines

README, DATA = ROOT / "README.md", ROOT / "dataset" / "README.md"
PAGES = [README, DATA, ROOT / "benchmarks" / "README.md",
         ROOT / "pre-trained_models" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSED = 64
LINE = re.compile(r"(?:\w+=\S+ )*((?:python|torchrun|make) .+)")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(text, language=""):
    """The fenced blocks of a language in Markdown."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for kind, block in fenced if kind == language]


def commands(page):
    """Command lines of a page, as words: those of its fenced blocks and those within its text."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [shlex.split(match[1], comments=True) for match in map(LINE.fullmatch, lines) if match]


def example():
    """(file name, source) of the README's script."""
    (source,) = blocks(README.read_text(encoding="utf-8"), "python")
    return re.match(r"# (\w+\.py)", source)[1], source


def run_script(argv):
    """Do as `python SCRIPT OPTIONS` does."""
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).parent), str(ROOT)]
    runpy.run_path(argv[0], run_name="__main__")


def parse_only(argv):
    """The same, but the process ends with status PARSED once the options are understood."""
    under_way = []

    def then_end(parse):
        def parse_and_end(*args, **kwargs):
            under_way.append(parse)
            result = parse(*args, **kwargs)
            under_way.pop()
            return result if under_way else sys.exit(PARSED)
        return parse_and_end

    for parser, method in ((argparse.ArgumentParser, "parse_args"), (params, "parse_args"),
                           (argparse.ArgumentParser, "parse_known_args"),
                           (argparse.ArgumentParser, "parse_intermixed_args")):
        setattr(parser, method, then_end(getattr(parser, method)))
    run_script(argv)


@pytest.mark.parametrize("page, words", [
    pytest.param(page, words, id=f"{name_of(page)}: {shlex.join(words)}"[:120])
    for page in PAGES for words in commands(page)])
def test_command_is_understood(page, words, tmp_path):
    program, *words = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif words[:2] == ["-m", "pytest"]:
        (file,) = [word for word in words if word.startswith("tests/")]
        chosen = words[words.index("-k") + 1] if "-k" in words else ""
        assert re.search(rf"^def test_\w*{chosen}", (ROOT / file).read_text(), re.MULTILINE)
    else:
        if program == "torchrun":
            torchrun = torchrun_parser().parse_args(words)
            words = [torchrun.training_script, *torchrun.training_script_args]
        script, *options = words
        if script != example()[0]:  # which trains below
            processes.run(parse_only, [str(ROOT / script), *options], tmp_path / "out", PARSED)


def test_there_are_commands():
    """The pages are read at all: the main ways of using the repository stand in them."""
    assert {"make", "main_NPC.py", "main_CLIP.py", "find_noise.py", "search.py",
            "benchmarks/table.py"} <= {word for words in commands(README) for word in words}
    found = {word for page in PAGES for words in commands(page) for word in words}
    assert {"benchmarks/bench.py", "dataset/prepare_pairs.py", "--nproc_per_node"} <= found


def test_no_test_can_write_into_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    for path in (ROOT / "pairs.csv", tmp_path / "link" / "mine.py"):
        with pytest.raises(PermissionError, match="into the checkout"):
            path.write_text("x")
    monkeypatch.chdir(ROOT)
    with pytest.raises(PermissionError, match="into the checkout"):
        Path("photos").mkdir()


def run_elsewhere(folder, *words):
    """Run a script of `folder`, which knows the repository by PYTHONPATH alone; returns what it
    printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_s_weighting_trains(dataset, tmp_path):
    """In a folder of one's own, beside a data.py that has nothing to do with ours."""
    name, source = example()
    assert len(source.splitlines()) <= 12
    (tmp_path / name).write_text(source)
    (tmp_path / "data.py").write_text("raise ImportError('not that of the repository')")
    (options,) = [words[2:] for words in commands(README) if words[1] == name]
    run_elsewhere(tmp_path, name, *options, *dataset("f30k").options, "--vision_model", "tiny",
                  "--batch_size", 4, "--num_workers", 0, "--device", "cpu", "--epochs", 1)
    w = np.load(tmp_path / "logs" / "ex0" / "weights.npz")["w"]
    assert (w == 1).sum() == (w == 0).sum() == w.size / 2  # half of each batch counts


def test_the_example_from_python_runs(tmp_path):
    """docs/python.md in an empty folder."""
    (source,) = blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "mine.py").write_text(source)
    said = run_elsewhere(tmp_path, "mine.py").splitlines()
    assert "clean pairs; nearest to the first image:" in said[-1]
    assert len([line for line in said if line[:2] in ("0.", "1.")]) == 10


@pytest.mark.slow
def test_own_pairs_gain_from_cleaning(tmp_path):
    """docs/own_pairs.sh: wrong captions are removed, and the test scores rise."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "docs" / "own_pairs.sh", tmp_path / "own"],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, re.findall(r"has (\d+) wrong captions", done.stdout))
    assert after < before / 10
    scores = {run: json.loads((tmp_path / "own/logs" / f"test_{run}/eval_test.json").read_text())
              for run in ("all", "cleaned", "robust")}
    for run in ("cleaned", "robust"):
        assert scores[run]["mean_R1"] > scores["all"]["mean_R1"] + 3
        assert scores["all"]["mean_R1"] > scores[run]["initial"]["mean_R1"] + 3


# ---- links ---------------------------------------------------------------------------------------


def anchors(page):
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"),
                  flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_pages_are_reached_from_the_readme():
    text = README.read_text(encoding="utf-8")
    for page in [*(ROOT / "docs").glob("*.md"), DATA, ROOT / "benchmarks" / "README.md"]:
        assert f"]({name_of(page)}" in text


def test_pages_that_the_code_names_exist():
    own = [*ROOT.glob("*.py"), *(path for room in ("clip", "utils", "dataset", "benchmarks")
                                 for path in (ROOT / room).rglob("*.py"))]
    named = {name for path in own
             for name in re.findall(r"\b(?:docs|dataset)/\w+\.md", path.read_text("utf-8"))}
    assert "docs/fidelity.md" in named
    assert not [name for name in named if not (ROOT / name).exists()]


# ---- the README's blocks run from top to bottom, in a copy of the repository: on drawn data, with
# a small CLIP, trained on other drawings, in place of OpenAI's

PHOTOS, CAPTIONS, WRONG = 160, 3, 0.25
WORDS = 512  # of the small CLIP


def use(model, place):
    """Hook of a process: OpenAI's ViT-B/32 is `model`, `place` is the working directory."""
    os.chdir(place)
    clip.tokenize_with_lengths = functools.partial(processes.small_tokens, vocabulary=WORDS)
    weights.CONFIGS["ViT-B/32"] = weights.CONFIGS["tiny"] = {**weights.CONFIGS["tiny"],
                                                             "vocab_size": WORDS}
    weights._find = lambda *_: model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the repository with MSCOCO, photos/ and pairs.csv as the README has them, a larger
    test set in scenes/, and model.pt."""
    place = tmp_path_factory.mktemp("first_day")
    tracked = [*ROOT.glob("*.py"), *(ROOT / "dataset").glob("*.py"),
               *(path for room in ("benchmarks", "clip", "configs", "utils")
                 for path in (ROOT / room).rglob("*") if path.is_file())]
    for path in tracked:
        target = place / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    coco = make_dataset(place / "dataset" / "MSCOCO", "coco")
    for kind in ("ids", "caps"):  # half precision is slow without a GPU
        file = coco.split_folder / f"train_{kind}.txt"
        write_lines(file, coco.lines(file.name)[: 4 if kind == "ids" else 20])
    make_scenes(place / "source", "source", train=600, dev=2, test=2, seed=0)
    run(place, "main_CLIP.py --dataset f30k --dataset_root source --vision_model tiny --epochs 3 "
               "--lr 1e-3 --batch_size 64 --num_workers 0 --experiments pretrained --device cpu")
    model = clip.read_checkpoint(place / "logs" / "pretrained" / "best.pt")["state_dict"]
    torch.save(model, place / "model.pt")

    make_scenes(place / "scenes", "target", train=PHOTOS, dev=2, test=200, seed=0)
    (place / "photos").symlink_to(place / "scenes" / "images")
    names = read_lines(place / "scenes/annotations/scan_split/image_name.txt")
    captions = read_lines(place / "scenes/annotations/scan_split/train_caps.txt")
    rows = [[names[int(image)], captions[5 * k + j]] for k, image in
            enumerate(read_ids(place / "scenes", "train", 5 * PHOTOS, 5, "x")[::5])
            for j in range(CAPTIONS)]
    wrong = random.Random(0).sample(range(len(rows)), int(WRONG * len(rows)))
    for i, caption in zip(wrong, [rows[i][1] for i in wrong[1:] + wrong[:1]], strict=True):
        rows[i][1] = caption
    with open(place / "pairs.csv", "w", newline="") as f:
        csv.writer(f).writerows([("image", "caption"), *rows])
    (place / "wrong.json").write_text(json.dumps(wrong))
    return place


def run(place, line):
    """Do as the command line says; returns what it prints."""
    output = place / "output.txt"
    output.unlink(missing_ok=True)
    words = [found for word in shlex.split(line, comments=True)
             for found in sorted(glob.glob(word, root_dir=place)) or [word]]
    return processes.run(run_script, words, output,
                         hook=functools.partial(use, place / "model.pt", place))


@pytest.fixture(scope="module")
def walked(place):
    """The commands of the README's blocks, and what each printed."""
    text = README.read_text(encoding="utf-8")
    (place / example()[0]).write_text(example()[1])
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    lines += [span for span in text.split("`") if span.startswith(f"python {example()[0]}")]
    return {line: run(place, line.removeprefix("python ")) for line in lines
            if line.startswith("python ")}


def test_every_block_runs(walked):
    scripts = [line.split()[1] for line in walked]
    assert len(scripts) >= 9 and {"main_NPC.py", "main_CLIP.py", "benchmarks/table.py", "mine.py",
                                  "find_noise.py", "search.py"} <= set(scripts)


def test_the_list_of_wrong_pairs_is_right(place, walked):
    wrong = json.loads((place / "wrong.json").read_text())
    with open(place / "logs" / "noise" / "suspicious_pairs.csv", newline="") as f:
        rows = [int(line["row"]) for line in csv.DictReader(f)]
    assert len(rows) == CAPTIONS * PHOTOS
    assert roc_auc_score(np.isin(rows, wrong), range(len(rows), 0, -1)) > 0.85


def test_the_model_for_one_s_own_pairs_is_better_than_zero_shot(place, walked):
    scores = {}
    for name, resume in (("zero", ""), ("mine", "--resume logs/mine/best.pt")):
        run(place, f"main_CLIP.py --eval {resume} --dataset_root scenes --dataset f30k "
                   f"--experiments {name}")
        path = place / "logs" / name / "eval_test.json"
        scores[name] = json.loads(path.read_text())["mean_R1"]
    assert scores["mine"] > scores["zero"] + 3  # 1,000 captions: half a point is chance
    said, = [said for line, said in walked.items() if "--experiments mine" in line]
    assert re.search(r"lr up to 1e-05 after 1\d steps of warm-up", said) and "warning" not in said
