"""find_noise.py: its ranking, what it says about it, the page, and the cleaned data set."""

import base64
import csv
import html
import io
import re
import shlex
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import CHROMIUM, Browser
from conftest import options, tree, write_lines
from PIL import Image
from processes import run_in_two, save_small
from scipy.special import betainc
from scipy.stats import binomtest

import clip
import find_noise
import main_CLIP
from data import training_pairs
from utils.cleaning import noise_page
from utils.cleaning.labels import COLUMNS, Estimate, cells, draw_sample, estimate, read_labels
from utils.method.judge import Verdict
from utils.reading.layout import read_captions

EVIL = ("=1+1 <script>document.title='owned'</script> "
        '"><img src=x onerror="document.title=\'owned\'"> &amp;')


def embedding(data, spread):
    """Stands in for the model: captions lie near the image that they belong to in the clean file,
    `spread` (0: on it) away from it."""
    own = dict(zip(data.lines("train_caps.txt"), np.repeat(data.ids["train"], data.num_anns),
                   strict=True))
    rng = np.random.default_rng(0)
    place = {image_id: rng.normal(size=16) for image_id in data.ids["train"]}

    def embed_pairs(model, pairs, args, precision):
        texts = dict(zip(pairs.text_of, pairs.captions, strict=True))
        images = [place[image_id] for image_id in pairs.image_ids]
        texts = [place[own[texts[k]]] + spread * rng.normal(size=16) for k in range(len(texts))]
        return tuple(F.normalize(torch.tensor(np.array(x), dtype=torch.float32), dim=1)
                     for x in (images, texts))

    return embed_pairs


@pytest.fixture
def find(tmp_path, monkeypatch, capsys):
    """Run find_noise.py on a data set; returns what it printed and the rows of the CSV file. With a
    `spread` the features are made ones, without it those of a small random model."""

    def run(data, *more, spread=None):
        if spread is not None:
            monkeypatch.setattr("utils.method.judge.embed_pairs", embedding(data, spread))
        find_noise.main([*data.options, "--vision_model", "tiny", "--num_workers", "0", "--device",
                         "cpu", "--batch_size", "256", "--out", str(tmp_path / "out"), "--recipe",
                         "paper", *map(str, more)])
        with open(tmp_path / "out" / "suspicious_pairs.csv", encoding="utf-8", newline="") as f:
            return capsys.readouterr().out, list(csv.DictReader(f))

    return run


@pytest.fixture
def fails(find, capsys):
    """Run find_noise.py where it must fail; returns its one line on stderr."""

    def run(*args, **kwargs):
        with pytest.raises(SystemExit) as stop:
            find(*args, **kwargs)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


def page(tmp_path):
    return tmp_path / "out" / "suspicious_pairs.html"


def wrong_lines(data, ratio):
    """Pairs whose caption is none of their image's, told from the two caption files alone."""
    clean, noisy = data.lines("train_caps.txt"), data.lines(f"{ratio}_noise_train_caps.txt")
    k = data.num_anns
    own = [clean[i // k * k :][:k] for i in range(len(clean))]
    return {i for i, caption in enumerate(noisy) if caption not in own[i]}


# ---- the ranking --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["loss", "cosine"])
def test_wrong_pairs_come_first(dataset, find, score):
    data = dataset()
    out, rows = find(data, "--noise_ratio", 0.4, "--score", score, spread=0.1)
    wrong = wrong_lines(data, 0.4)
    assert len(wrong) > 10
    assert {int(row["pair"]) for row in rows[: len(wrong)]} == wrong
    assert [int(row["rank"]) for row in rows] == list(range(1, 61))
    assert sorted(int(row["pair"]) for row in rows) == list(range(60))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=score == "loss")
    assert re.search(r"AUC 1.000, average precision 1.000, .*suspicious 1.000", out)

    noisy = data.lines("0.4_noise_train_caps.txt")
    for row in rows:
        i, j = int(row["pair"]), int(row["clean_pair"])
        assert row["caption"] == noisy[i] and row["clean_caption"] == noisy[j]
        assert row["image"] == data.name(data.ids["train"][i // 5])
        assert row["clean_image"] == data.name(data.ids["train"][j // 5])
        assert j not in wrong
        assert (float(row["posterior"]) < 0.5) == (i in wrong)
        assert j == i or i in wrong or float(row["posterior"]) < 0.95  # clean ones are their own


def test_printed_measures(dataset, find):
    data = dataset()
    out, rows = find(data, "--noise_ratio", 0.4, "--score", "cosine", spread=4)
    wrong = wrong_lines(data, 0.4)
    marks = np.array([int(row["pair"]) in wrong for row in rows])
    score = np.array([float(row["score"]) for row in rows])
    m, n = marks.sum(), len(marks)
    auc = np.mean([(a < b) + (a == b) / 2 for a in score[marks] for b in score[~marks]])
    hits = np.flatnonzero(marks) + 1  # in the order from most to least suspicious
    share = 1 - np.mean([float(row["posterior"]) for row in rows])
    taken = round(share * n)
    assert 0.6 < auc < 0.99
    for said in (f"injected noise, in {m} of {n} pairs", f"AUC {auc:.3f}", f"share: {share:.1%}",
                 f"average precision {np.mean(np.arange(1, m + 1) / hits):.3f}",
                 f"mean noise rank {np.mean(n + 1 - hits):.1f}",
                 f"optimum {np.mean(np.arange(n - m + 1, n + 1)):.1f}, chance {(n + 1) / 2:.1f}",
                 f"precision of the {taken} most suspicious {marks[:taken].mean():.3f}"):
        assert said in out, said


def test_mean_weight_of_a_run(dataset, find, tmp_path):
    data = dataset("cc")
    w = np.ones((3, 12), np.float32)
    w[:, 4] = 0.2, np.nan, 0.4
    w[:, 7] = np.nan, np.nan, 0.1
    w[:, 9] = np.nan
    np.savez(tmp_path / "weights.npz", w=w)
    out, rows = find(data, "--score", "npc", "--weights", tmp_path / "weights.npz")
    assert [int(row["pair"]) for row in rows[:2]] == [7, 4]
    assert [row["score"] for row in rows[:2]] == ["0.1", "0.3"]
    assert (rows[-1]["pair"], rows[-1]["score"]) == ("9", "")
    assert "1 of 12 pairs have no weight" in out
    assert page(tmp_path).read_text().count("<article") == 11
    assert "injected" not in out  # nothing was shuffled


def test_errors_come_before_a_model_is_loaded(dataset, fails, tmp_path, monkeypatch):
    """A wrong data set, --weights or --labels is told before a model is fetched."""
    data = dataset("cc")
    monkeypatch.setattr("utils.training.run.Run.load_model", lambda *_: pytest.fail("loaded"))
    np.savez(tmp_path / "other.npz", w=np.ones((3, 11)))
    np.savez(tmp_path / "empty.npz", w=np.full((3, 12), np.nan))
    np.savez(tmp_path / "infinite.npz", w=np.where(np.arange(36).reshape(3, 12) == 4, np.inf, 1))
    np.savez(tmp_path / "others.npz", w=np.ones((3, 12)), pairs="0" * 64)
    content = bytearray((tmp_path / "others.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(content[:100])
    content[140] ^= 255  # a number
    (tmp_path / "flipped.npz").write_bytes(content)
    for name, said in (("other", "11 pairs"), ("others", "other captions"), ("empty", "no weight"),
                       ("infinite", "infinite weights"), ("cut", "damaged"),
                       ("flipped", "damaged"), ("absent", "not exist")):
        assert said in fails(data, "--score", "npc", "--weights", tmp_path / f"{name}.npz")
    assert "not exist" in fails(data, "--labels", tmp_path / "none.csv")
    assert "not exist" in fails(data, "--dataset_root", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    assert f"error: {tmp_path}/file: File exists" in fails(data, "--out", tmp_path / "file")


def test_one_of_two_processes_writes(dataset, tmp_path):
    """As under torchrun, the cleaned data set too."""
    data = dataset()
    argv = [*data.options, "--vision_model", save_small(tmp_path / "model.pt"), "--context_length",
            12, "--num_workers", 0, "--device", "cpu", "--out", tmp_path / "out", "--noise_ratio",
            0.4, "--judge_rounds", 0, "--write_clean", tmp_path / "clean", "--keep_above", 0]
    said = run_in_two(find_noise.main, list(map(str, argv)), tmp_path / "said")
    assert "wrote" in said[0] and said[1] == ""
    assert len((tmp_path / "out" / "suspicious_pairs.csv").read_text().splitlines()) == 61
    assert len(read_captions(tmp_path / "clean/annotations/scan_split/train_caps.txt")) == 60


def test_the_table_streams(dataset, find, monkeypatch):
    """Each row goes to the file for itself: no text of all pairs is made."""
    sizes, write_table = [], find_noise.write_table

    class Watched:
        def __init__(self, f):
            self.write = lambda text: sizes.append(text.count("\n")) or f.write(text)

    monkeypatch.setattr(find_noise, "write_table",
                        lambda f, *more: write_table(Watched(f), *more))
    assert len(find(dataset())[1]) == 60 and sizes == [1] * 61


# ---- the page -----------------------------------------------------------------------------------


@pytest.fixture
def evil_page(dataset, find, tmp_path):
    """A page of a data set with hostile captions and odd images, and the rows of the CSV file."""
    data = dataset("cc")
    captions = data.lines("train_caps.txt")
    captions[3], captions[5] = EVIL, 'a "quoted", comma\u202e and </q></article>'
    write_lines(data.split_folder / "train_caps.txt", captions)
    images = [data.root / "images" / data.name(image_id) for image_id in data.ids["train"]]
    for k, (mode, form) in enumerate([("CMYK", "JPEG"), ("P", "PNG"), ("I;16", "PNG"),
                                      ("RGBA", "WEBP"), ("LA", "PNG"), ("P", "GIF")]):
        Image.new(mode, (90, 50), 1).save(images[k], form)
    Image.new("RGB", (50, 90), (255, 0, 255)).save(images[6], "PNG")
    out, rows = find(data, "--worst", 11)
    return page(tmp_path), rows


def test_page_is_whole_and_escaped(evil_page):
    path, rows = evil_page
    text = path.read_text(encoding="utf-8")
    assert text.count("<article") == 12 and text.count('data-worst=""') == 1
    assert text.count("<script") == 1 and text.count("</q>") == 24
    loads = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: loads.extend(
        value for name, value in attributes if name in ("src", "href", "xlink:href"))
    parser.feed(text)
    assert len(loads) > 20 and all(value.startswith(("data:image/jpeg", "#")) for value in loads)
    assert not re.search(r"<link|@import|url\((?!#)", text)
    assert "script-src 'sha256-" in text
    shown = [html.unescape(q) for q in re.findall(r"<q [^>]*>(.*?)</q>", text)]
    in_cells = [f"'{q}" if q[0] == "=" else q for q in shown[::2]]  # the others: best captions
    assert in_cells == [row["caption"] for row in rows]
    assert f"'{EVIL}" in in_cells
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == 24
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.convert("RGB").size == (160, 160)


def test_what_the_model_would_rather(dataset, find, tmp_path):
    data = dataset()
    find(data, "--noise_ratio", 0.4, "--worst", 5, spread=0.1)
    truth = dict(zip(data.lines("train_caps.txt"),
                     [data.name(i) for i in data.ids["train"] for _ in range(5)], strict=True))
    for card in page(tmp_path).read_text(encoding="utf-8").split("<article")[1:6]:
        own, best = (html.unescape(q) for q in re.findall(r"<q [^>]*>(.*?)</q>", card))
        file, best_file = re.findall(r'class="file">(.*?)<', card)
        assert truth[own] != file  # the worst pairs are wrong
        assert truth[best] == file and truth[own] == best_file


SHOWN = "[...document.querySelectorAll('article:not([hidden])')]"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def visible(browser):
    """Captions of the pairs that are shown."""
    return browser.value(SHOWN + ".map(card => card.querySelector('q').textContent)")


@needs_browser
def test_page_in_a_browser(evil_page, tmp_path):
    path, rows = evil_page
    captions = [row["caption"].removeprefix("'") for row in rows]
    with Browser(tmp_path) as browser:
        browser.open(path.as_uri())
        assert browser.value("document.title") == "Suspicious pairs"
        assert visible(browser) == captions[:11]
        shown = "document.getElementById('shown').textContent"
        assert browser.value(shown) == "showing 11 of 11, 0 answered"
        with Image.open(io.BytesIO(browser.screenshot())) as image:
            colours = Counter(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))
        for field, value in (("min", float(rows[7]["score"]) - 1e-3),
                             ("max", float(rows[2]["score"]) + 1e-3)):
            browser.click(f"#{field}")
            browser.ask("Input.insertText", text=f"{value:.6f}")
        assert visible(browser) == captions[2:8]
        assert browser.value(shown) == "showing 6 of 11, 0 answered"
        browser.open(f"{path.as_uri()}#tab=sample")
        assert sorted(visible(browser)) == sorted(captions)
    magenta = sum(n for (r, g, b), n in colours.items() if r > 240 and g < 15 and b > 240)
    assert magenta > 3000  # the picture of this colour is there


@needs_browser
def test_labels_survive_a_reload_and_come_back(dataset, find, tmp_path):
    data = dataset("cc")
    captions = data.lines("train_caps.txt")
    captions[3] = EVIL
    write_lines(data.split_folder / "train_caps.txt", captions)
    _, rows = find(data, "--worst", 3)
    with Browser(tmp_path) as browser:
        browser.open(page(tmp_path).as_uri())
        assert len(visible(browser)) == 3
        browser.click("article:not([hidden]) [value=right]")  # the first one, with the mouse
        browser.press("j")  # the second one, with the keyboard
        browser.press("w")
        browser.press("s")
        browser.click("#sample")
        drawn = [captions.index(caption) for caption in visible(browser)]
        seen = "card => getComputedStyle(card.querySelector('.rather')).visibility == 'visible'"
        assert browser.value(f"{SHOWN}.filter({seen}).length") == 3  # those that are answered
        assert sorted(drawn) == list(range(12))
        browser.press("ArrowDown")
        browser.press("w")
        browser.press("w")
        browser.press("k")
        browser.press("w")  # the same answer again takes it back
        before = browser.value("document.body.innerHTML")
        for _ in range(9):  # Chromium's storage may not have reached the next process yet
            browser.load("Page.reload")
            browser.click("#sample")
            if (after := browser.value("document.body.innerHTML")) == before:
                break
        assert after == before
        browser.click("#download")
        browser.wait_for("Browser.downloadProgress", state="completed")
    with open(tmp_path / "decisions.csv", encoding="utf-8", newline="") as f:
        decisions = list(csv.DictReader(f))
    assert [int(row["pair"]) for row in decisions] == drawn
    expected = {int(row["pair"]): answer
                for row, answer in zip(rows[:3], ["right", "wrong", "skip"], strict=True)}
    expected |= {drawn[0]: "wrong", drawn[1]: ""}
    assert {int(row["pair"]): row["decision"] for row in decisions if row["decision"]} == {
        pair: decision for pair, decision in expected.items() if decision}
    assert [(row["caption"], row["stratum"]) for row in sorted(rows, key=lambda r: int(r["pair"]))
            ] == [(row["caption"], row["stratum"])
                  for row in sorted(decisions, key=lambda r: int(r["pair"]))]
    out, again = find(data, "--labels", tmp_path / "decisions.csv")
    known = {pair: answer for pair, answer in expected.items() if answer in ("right", "wrong")}
    assert {int(row["pair"]): row["decision"] for row in again if row["decision"]} == known
    assert f"Labels: {len(known)} of the 12 pairs" in out


# ---- labels -------------------------------------------------------------------------------------


def decide(path, rows, answers):
    """Fill in the decisions of a suspicious_pairs.csv that `find` has read."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, rows[0].keys())
        table.writeheader()
        table.writerows({**row, "decision": answers(row)} for row in rows)
    return path


def test_labels_measure_the_noise_and_overrule_the_ranking(dataset, find, tmp_path):
    data = dataset()
    _, rows = find(data, "--noise_ratio", 0.4, spread=1)
    wrong = wrong_lines(data, 0.4)
    assert {row["stratum"] for row in rows} == {str(h) for h in range(1, 11)}  # all 60 are drawn
    first, last = int(rows[0]["pair"]), int(rows[-1]["pair"])

    def answer(row):  # the truth, but for the two ends
        if int(row["pair"]) in (first, last):
            return "Right" if int(row["pair"]) == first else " wrong"
        return "wrong" if int(row["pair"]) in wrong else "right"

    labels = decide(tmp_path / "labels.csv", rows, answer)
    out, again = find(data, "--noise_ratio", 0.4, "--labels", labels, "--write_clean",
                      tmp_path / "clean", "--wanted_precision", 0.9, spread=1)
    said_wrong = [row for row in rows if answer(row).strip() == "wrong"]
    assert [row["pair"] for row in again[: len(said_wrong)]] == [row["pair"] for row in said_wrong]
    assert {row["decision"] for row in again[: len(said_wrong)]} == {"wrong"}
    assert {row["decision"] for row in again[len(said_wrong):]} == {"right"}
    share = 100 * len(said_wrong) / 60
    assert f"Noise share by the labels: {share:.1f} % ({share:.1f} to {share:.1f} %)" in out
    kept = sorted(int(row["pair"]) for row in rows if answer(row) in ("right", "Right"))
    noisy = data.lines("0.4_noise_train_caps.txt")
    assert read_captions(tmp_path / "clean" / "annotations" / "scan_split" / "train_caps.txt") == [
        noisy[i] for i in kept]

    # the table and the proposal, from the posteriors of the CSV file
    posterior = {int(row["pair"]): float(row["posterior"]) for row in rows}
    table = [re.split(r" *\| *", line.strip("| ")) for line in out.splitlines()
             if re.match(r"\| *0\.", line)]
    assert len(table) > 5 and "0.5" in [line[0] for line in table]
    least = None
    for threshold, n, precision, recall in table:
        above = sum(value >= float(threshold) for value in posterior.values())
        assert abs(int(n) - above) <= 1  # both numbers are rounded
        right = len(set(sorted(posterior, key=posterior.get)[-int(n):]) & set(kept))
        assert precision.startswith(f"{100 * right / int(n):.1f} %")
        assert recall.startswith(f"{100 * right / len(kept):.1f} %")
        least = least or (threshold if right / int(n) >= 0.9 else None)
    assert f"--keep_above {least} is the lowest threshold" in out


def test_labels_of_part_of_the_sample(dataset, find, tmp_path):
    """Only what was drawn counts for the estimate, and the sample stays what it was."""
    data = dataset()
    _, rows = find(data, spread=1)
    strata = {row["pair"]: row["stratum"] for row in rows}
    answers = {row["pair"]: "right" for row in rows[6:30]}
    answers |= {row["pair"]: "wrong" for row in rows[:6]}  # which are those of the first stratum
    for row in rows[:3]:
        row["stratum"] = row["stratum_size"] = ""
    labels = decide(tmp_path / "labels.csv", rows, lambda row: answers.get(row["pair"], "skip"))
    out, again = find(data, "--labels", labels, "--score", "cosine", spread=1)
    assert "Labels: 27 of the 57 pairs of the random sample and 3 others" in out
    assert "Noise share by the labels: 20.0 % (" in out  # a stratum of the five that were answered
    assert "These estimates are for 30 of the 60 pairs" in out
    kept = {row["pair"]: row["stratum"] for row in again}
    assert kept == {pair: "" if pair in [row["pair"] for row in rows[:3]] else stratum
                    for pair, stratum in strata.items()}


@pytest.mark.parametrize("right, wrong", [(5, 3), (57, 3), (60, 0)])
def test_pairs_labelled_right_are_not_shown_as_suspicious(dataset, find, tmp_path, right, wrong):
    """They come last, and the page holds them, so that decisions.csv still has their answers."""
    data = dataset()
    _, rows = find(data, spread=1)
    for row in rows[:50]:
        row["stratum"] = row["stratum_size"] = ""  # not in the sample
    answers = {row["pair"]: "right" if rank < right else "wrong" if rank < right + wrong else ""
               for rank, row in enumerate(rows)}
    labels = decide(tmp_path / "labels.csv", rows, lambda row: answers[row["pair"]])
    _, again = find(data, "--labels", labels, "--worst", 10, spread=1)
    cards = re.findall(r'data-worst="(\d*)"\s+data-sample="\d*" data-row="\[(\d+),.*?'
                       r'data-answer="(\w*)"', page(tmp_path).read_text(), re.DOTALL)
    shown = {pair: answer for place, pair, answer in cards if place}
    assert len(shown) == min(10, 60 - right) and "right" not in shown.values()
    assert list(shown) == [row["pair"] for row in again[: len(shown)]]
    assert list(shown.values())[:wrong] == ["wrong"] * wrong
    assert {pair for _, pair, answer in cards if answer == "right"} == {
        pair for pair, answer in answers.items() if answer == "right"}
    assert all(row["decision"] == "right" for row in again[60 - right:])


@pytest.mark.parametrize("encoding, dialect", [
    ("utf-8", {"lineterminator": "\n"}), ("utf-8-sig", {}), ("utf-8-sig", {"delimiter": ";"}),
    ("utf-8", {"delimiter": "\t"}), ("utf-8", {"quoting": csv.QUOTE_ALL})])
def test_labels_as_a_spreadsheet_saves_them(dataset, tmp_path, encoding, dialect):
    data = dataset("cc")
    captions = data.lines("train_caps.txt")
    captions[2:6] = 'a "red", or; é\tone', '"Red"', "=1+1", "'tis"
    write_lines(data.split_folder / "train_caps.txt", captions)
    pairs = training_pairs(options(data, command="find_noise"), clip.Preprocess(8))
    with open(tmp_path / "decisions.csv", "w", encoding=encoding, newline="") as f:
        table = csv.writer(f, **dialect)
        table.writerow(COLUMNS)
        table.writerows([i, *cells(pairs, i), i % 3 + 1, 4, "wrong" if i == 2 else "Right"]
                        for i in range(12))
    labels = read_labels(tmp_path / "decisions.csv", pairs)
    assert labels.answer.tolist() == [1 if i == 2 else -1 for i in range(12)]
    assert labels.sample == {i: (i % 3 + 1, 4) for i in range(12)}


def test_broken_labels(dataset, find, fails, tmp_path):
    data = dataset("cc")
    _, rows = find(data)
    labels = tmp_path / "labels.csv"

    def error(**changed):
        decide(labels, [{**rows[0], **changed}], lambda row: changed.get("decision", "right"))
        return fails(data, "--labels", labels)

    assert "cc/annotations/scan_split/train_caps.txt has no pair 12 of this" in error(pair=12)
    assert "another data set" in error(caption="another")
    assert "another data set" in error(image="x.jpg")
    assert "'perhaps', not right, wrong or skip" in error(decision="perhaps")
    assert "stratum_size is '13'" in error(stratum_size=13)
    assert f"has no pair {20 * '9'} of" in error(pair="9" * 5000)
    decide(labels, [{**rows[0], "rank": 1}, {**rows[0], "rank": 2}],
           lambda row: "right" if row["rank"] == 1 else "wrong")
    assert "has the decisions right and wrong" in fails(data, "--labels", labels)
    labels.write_text("pair,decision\n1,right\n")
    assert "no column 'image'" in fails(data, "--labels", labels)
    decide(labels, [rows[0]], lambda row: "")
    labels.write_text(labels.read_text().splitlines()[0])
    assert "holds no decision" in fails(data, "--labels", labels)
    labels.write_bytes(b"\x81" * 40)
    assert "save it as UTF-8" in fails(data, "--labels", labels)
    labels.write_text("pair\timage", encoding="utf-16")
    assert "save it as CSV in UTF-8" in fails(data, "--labels", labels)


# ---- estimates, against closed forms and against populations that are known --------------------


def exact(hits, n):
    """Clopper and Pearson's interval."""
    return tuple(binomtest(hits, n).proportion_ci(method="exact"))


def test_a_sample_has_as_many_of_each_stratum():
    order = np.random.default_rng(0).permutation(1234)
    sample = draw_sample(order, 7)
    assert len(sample) == 100 and sample == draw_sample(order, 7) != draw_sample(order, 8)
    place = {pair: k for k, pair in enumerate(order.tolist())}
    edges = np.cumsum([0, *[124] * 4, *[123] * 6])
    for pair, (stratum, size) in sample.items():
        assert edges[stratum - 1] <= place[pair] < edges[stratum] == edges[stratum - 1] + size
    taken = [stratum for stratum, _ in sample.values()]
    assert taken == list(range(1, 11)) * 10  # whoever stops early has seen all strata
    drawn = Counter(pair for seed in range(200) for pair in draw_sample(order[:200], seed))
    assert 60 < min(drawn.values()) and max(drawn.values()) < 140  # each one as often: 100


@pytest.mark.parametrize("n", [1, 3, 12, 99, 100])
def test_a_sample_of_few_pairs_is_all_of_them(n):
    sample = draw_sample(np.arange(n), 0)
    assert sorted(sample) == list(range(n))
    assert sum({stratum: size for stratum, size in sample.values()}.values()) == n


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_one_stratum_is_clopper_and_pearson(hits):
    """With k of k (k + 1) pairs answered, the finite population makes up for the added pair."""
    answers = np.arange(20) < hits
    found = estimate(answers, np.ones(20, bool), np.zeros(20, int), np.full(20, 420))
    assert found == pytest.approx((hits / 20, *exact(hits, 20)))


def test_strata_are_weighted_by_their_size():
    hits = np.array([1, 1, 1, 0] + [1, 0, 0, 0, 0, 0], bool)
    among = np.array([1, 1, 1, 0] + [1, 1, 0, 0, 0, 1], bool)
    stratum, size = np.repeat([3, 9], [4, 6]), np.repeat([100, 900], [4, 6])
    everything = np.ones(10, bool)
    assert estimate(hits, everything, stratum, size).value == pytest.approx(.1 * 3 / 4 + .9 / 6)
    assert estimate(hits, among, stratum, size).value == pytest.approx(
        (100 * 3 / 4 + 900 / 6) / (100 * 3 / 4 + 900 * 3 / 6))
    # the variance by hand: of the residuals, with one more pair of their mean square
    share = .1 * 3 / 4 + .9 / 6
    squares = np.array([3 * (1 - share)**2 + share**2, (1 - share)**2 + 5 * share**2])
    within = np.array([3 / 4, 5 / 6]) + squares.sum() / 10
    variance = (np.array([100 * 96, 900 * 894]) * within / np.array([16, 36])).sum() / 1000**2
    n = share * (1 - share) / variance
    low, high = estimate(hits, everything, stratum, size)[1:]
    for hits, p, chance in ((share * n, low, .025), (share * n + 1, high, .975)):
        assert betainc(hits, n - hits + 1, p) == pytest.approx(chance)  # of this many or more


def test_what_is_known_is_certain_and_what_is_not_is_unknown():
    stratum, size, everything = np.repeat([1, 2], 2), np.full(4, 2), np.ones(4, bool)
    hits = np.array([1, 0, 0, 0], bool)
    assert estimate(hits, everything, stratum, size) == Estimate(.25, .25, .25)
    nothing = estimate(hits & False, everything & False, stratum, size)
    assert np.isnan(nothing.value) and nothing[1:] == (0, 1) and str(nothing) == "unknown"
    assert str(Estimate(.25, .125, .5)) == "25.0 % (12.5 to 50.0 %)"


@pytest.mark.parametrize("share, separation", [(.02, 1.3), (.2, 2), (.5, 2.5)])
def test_intervals_cover_about_as_often_as_they_say(share, separation):
    rng = np.random.default_rng(3)
    wrong = rng.random(3000) < share
    score = rng.normal(size=3000) + separation * wrong
    order = np.argsort(-score)
    kept = np.ones(3000, bool)
    kept[order[:900]] = False
    right = ~wrong
    truth = wrong.mean(), right[kept].mean(), kept[right].mean()
    found = []
    for seed in range(300):
        sample = draw_sample(order, seed)
        i, (stratum, size) = np.array(list(sample)), np.array(list(sample.values())).T
        found.append([estimate(wrong[i], np.ones(100, bool), stratum, size),
                      estimate((right & kept)[i], kept[i], stratum, size),
                      estimate((right & kept)[i], right[i], stratum, size)])
    value, low, high = np.array(found).transpose(2, 0, 1)  # (300, 3) each
    assert value.mean(axis=0) == pytest.approx(truth, abs=0.01)
    covered = ((low <= truth) & (truth <= high)).mean(axis=0)
    assert covered.min() > 0.93  # 300 draws: the standard error is 0.013
    if share > 0.1:
        simple = np.subtract(*exact(round(100 * share), 100)[::-1])
        assert (high - low)[:, 0].mean() < 0.85 * simple  # what the strata are for


# ---- the cleaned data set -----------------------------------------------------------------------


def train(printed, tmp_path):
    """Train with the command that find_noise.py printed; returns the log."""
    words = shlex.split(re.search(r"python main_CLIP.py (.*)", printed)[1])
    main_CLIP.main([*words, "--vision_model", "tiny", "--epochs", "1", "--batch_size", "4",
                    "--num_workers", "0", "--device", "cpu", "--warmup", "1", "--checkpoint_path",
                    str(tmp_path), "--experiments", "run"])
    return (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("layout, least", [("f30k", .5), ("coco", .5), ("cc", .5), ("pairs", .5),
                                           ("f30k", 0)])
def test_cleaned_data_can_be_trained_on(dataset, find, tmp_path, layout, least):
    data = dataset("f30k" if layout == "pairs" else layout)
    data.options[1] = layout
    clean = tmp_path / "my clean data"
    out, rows = find(data, "--noise_ratio", 0.4, "--write_clean", clean, "--batch_size", 20,
                     "--keep_above", least)
    kept = sorted(int(row["pair"]) for row in rows if float(row["posterior"]) >= least)
    assert 2 < len(kept) and (len(kept) < len(rows)) == (least > 0)
    folder = clean / "annotations" / "scan_split"
    noisy = data.lines("0.4_noise_train_caps.txt")
    assert read_captions(folder / "train_caps.txt") == [noisy[i] for i in kept]
    assert (folder / "train_ids.txt").read_text().split() == [
        data.ids["train"][i // data.num_anns] for i in kept]
    assert f"train: {len(kept)} captions" in train(out, tmp_path)
    for source in data.split_folder.glob("[dti]*_*.txt"):
        if "train" not in source.name:
            assert (folder / source.name).read_bytes() == source.read_bytes()


def test_cleaned_data_is_neither_empty_nor_over_other_data(dataset, fails, tmp_path):
    """Of twelve times the same pair, the mixture cannot tell its components apart."""
    data = dataset("cc")
    write_lines(data.split_folder / "train_caps.txt", ["the same"] * 12)
    write_lines(data.split_folder / "train_ids.txt", [data.ids["train"][0]] * 12)
    before = tree(data.root)
    assert "not an empty folder" in fails(data, "--write_clean", data.root)
    assert "keeps 0 of 12" in fails(data, "--write_clean", tmp_path / "new", "--keep_above", 0.9)
    assert tree(data.root) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("same, unit", [(True, "nats"), (False, "standard deviations")])
def test_the_histogram_has_a_unit_and_says_what_it_shows(same, unit, monkeypatch):
    """The line of mismatches is as high as the highest bar, however small their share."""
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.stairs", lambda self, heights, *_, label, **__:
                        drawn.append((heights.max(), label)))
    scores = np.repeat([0.0, 1.0, 5.0], [50, 30, 1])
    verdict = Verdict(scores, scores if same else scores + 1, scores, scores > 1, scores, 0.01)
    svg = noise_page.histogram(verdict._replace(mismatches=np.full(9, 4.0)))
    assert f"({unit})" in svg and "score of the judge" in svg and "component" not in svg
    assert drawn == [(50, "mismatches made of these images and captions, at their own scale")]
    svg = noise_page.histogram(verdict._replace(components=[(0.9, 1, 0.1), (0.1, 5, 0.1)]))
    assert "component of low loss" in svg and "component of high loss" in svg and len(drawn) == 1
