"""The README's blocks run as they stand, from top to bottom, in a copy of the repository: on drawn
data, with a small CLIP, trained on other drawings, in place of OpenAI's."""

import csv
import functools
import glob
import json
import os
import random
import re
import shlex
import shutil

import numpy as np
import processes
import pytest
import torch
from conftest import make_dataset, write_lines
from sklearn.metrics import roc_auc_score
from test_docs import README, ROOT, blocks, example, run_script

import clip
from clip import weights
from dataset.make_scenes import make_scenes
from utils.reading.layout import read_ids, read_lines

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
