"""The commands on small data sets: what they write, and what equals what."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, banks, make_dataset, options, tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip
import construct_noise
import export_hf
import get_memorybank
import interpolate
import main_CLIP
import main_NPC
import search
from data import retrieval_split
from params import parse_args
from utils.method import weightings
from utils.method.optimizer import Precision
from utils.reading.layout import read_lines
from utils.scoring.retrieval import evaluate

SCORES = {"i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mean_R1", "rsum"}
COMMON = ["--vision_model", "tiny", "--device", "cpu", "--num_workers", "0", "--batch_size", "16"]
TRAINING = [*COMMON, "--noise_ratio", "0.4", "--epochs", "2", "--lr", "1e-3", "--warmup", "2",
            "--display", "1"]
PAIRS, STEPS = 60, 3  # 48 of the 60 pairs are drawn in an epoch


def checkpoint(path):
    return clip.read_checkpoint(path)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    with np.load(folder / "weights.npz", allow_pickle=False) as data:
        assert data.files == ["w", "pairs"]
        return data["w"]


def same_tensors(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of the commands on one f30k data set, each made when first asked for: name -> folder."""
    place = tmp_path_factory.mktemp("trained")
    data = make_dataset(place / "data", "f30k")

    def run(name, main, *more):
        main([*data.options, *TRAINING, "--checkpoint_path", str(place), "--experiments", name,
              *map(str, more)])
        return place / name

    clip_folder = run("clip", main_CLIP.main)
    npc_folder = run("npc", main_NPC.main)
    return SimpleNamespace(data=data, run=run, clip=clip_folder, npc=npc_folder, place=place)


@pytest.fixture(scope="module")
def bank(trained):
    """The bank that main_NPC.py built."""
    with np.load(banks(trained.data.root)["0.4_mbank"]) as data:
        arrays = {key: data[key] for key in data.files}
    return SimpleNamespace(**{**arrays, "info": json.loads(arrays["info"].tobytes())})


# ---- what a run writes --------------------------------------------------------------------------


def test_training_writes_its_files_and_no_others(trained, datasets):
    own = {"epoch1.pt", "epoch2.pt", "best.pt", "log.txt", "log.jsonl", "options.json",
           ".lock"}
    for folder, more in ((trained.clip, set()), (trained.npc, {"weights.npz"})):
        files = tree(folder)
        events = {file for file in files if file.startswith("events.out.tfevents")}
        assert len(events) == 1 and files - events == own | more
    (bank,) = banks(trained.data.root).values()  # made, as it was missing, like the noise
    assert tree(trained.data.root) - tree(datasets["f30k"].root) == {
        "annotations/scan_split/0.4_noise_train_caps.txt",
        str(bank.relative_to(trained.data.root))}


@pytest.mark.parametrize("name", ["CLIP", "NPC"])
def test_checkpoints_hold_weights_optimiser_and_origin(trained, name):
    folder = trained.clip if name == "CLIP" else trained.npc
    for epoch in (1, 2):
        content = checkpoint(folder / f"epoch{epoch}.pt")
        assert content["epoch"] == epoch and content["name"] == name
        assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.2
        assert content["args"]["noise_ratio"] == 0.4
        model, _ = clip.load(folder / f"epoch{epoch}.pt", device="cpu")
        assert same_tensors(model.state_dict(), content["state_dict"])
    assert ("siamese_optimizer" in content) == (name == "NPC")


@pytest.mark.parametrize("name, parts", [
    ("clip", {"batch_loss", "grad_norm", "exp_logit_scale"}),
    ("npc", {"loss", "batch_loss", "weighted_loss", "memory_image_loss", "memory_text_loss",
             "grad_norm", "w", "w<1"})])
def test_log_jsonl_has_an_object_per_epoch(trained, name, parts):
    rows = records(getattr(trained, name))
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() >= {"epoch", "lr", "dev"} | parts
        assert all(np.isfinite(row[part]) for part in parts)
        assert row["dev"].keys() == SCORES
        dev = row["dev"]
        assert dev["mean_R1"] == pytest.approx((dev["i2t_R@1"] + dev["t2i_R@1"]) / 2)
        assert dev["rsum"] == pytest.approx(sum(v for k, v in dev.items() if "@" in k))
    if name == "npc":
        for row in rows:
            memory = row["memory_image_loss"] + row["memory_text_loss"]
            assert row["loss"] == pytest.approx(row["weighted_loss"] + memory, rel=1e-5)
            assert 0 < row["w"] <= 1 and 0 <= row["w<1"] <= 1


def test_best_is_the_epoch_of_the_best_mean_recall(trained):
    for folder in (trained.clip, trained.npc):
        scores = [row["dev"]["mean_R1"] for row in records(folder)]
        best = 2 if scores[1] >= scores[0] else 1
        assert checkpoint(folder / "best.pt")["epoch"] == best


def test_weights_are_there_exactly_where_a_pair_was_drawn(trained):
    w = weights(trained.npc)
    assert w.shape == (2, PAIRS) and w.dtype == np.float32
    for epoch, row in enumerate(w):
        drawn = np.random.default_rng([99, epoch]).permutation(PAIRS)[:48]
        assert set(np.flatnonzero(~np.isnan(row))) == set(drawn)
        assert (row[drawn] > 0).all() and (row[drawn] <= 1).all()
        assert np.nanmean(row) == pytest.approx(records(trained.npc)[epoch]["w"], abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "npc"])
def test_tensorboard_has_losses_rate_and_scores(trained, name):
    folder = getattr(trained, name)
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/batch_loss", "train/lr", "train/grad_norm", "train/exp_logit_scale",
                    "dev/i2t_R@1", "dev/mean_R1"}
    assert ("train/loss" in tags) == (name == "npc")  # a sum that the baseline does not have
    assert [event.step for event in events.Scalars("dev/mean_R1")] == [STEPS, 2 * STEPS]
    assert len(events.Scalars("train/lr")) == 2 * STEPS
    rates = [event.value for event in events.Scalars("train/lr")]
    cosine = [0.5e-3 * (1 + np.cos(np.pi * t / 4)) for t in range(4)]
    assert rates == pytest.approx([0.5e-3, 1e-3, *cosine], rel=1e-5)
    scores = [event.value for event in events.Scalars("dev/mean_R1")]
    assert scores == pytest.approx([row["dev"]["mean_R1"] for row in records(folder)])
    if name == "npc":
        assert tags >= {"train/w", "train/w<1", "train/memory_image_loss", "train/weighted_loss"}
        assert events.Tags()["histograms"]


def test_points_are_means_since_the_last_one(trained):
    folder = trained.run("every_second", main_NPC.main, "--display", 2, "--epochs", 1)
    (row,) = records(folder)
    events = [EventAccumulator(str(run)) for run in (folder, trained.npc)]
    for each in events:
        each.Reload()
    for tag in ("batch_loss", "w<1", "memory_text_loss"):
        mean, single = ({e.step: e.value for e in run.Scalars(f"train/{tag}")[:3]}
                        for run in events)
        assert mean == pytest.approx({2: (single[1] + single[2]) / 2, 3: single[3]}, rel=1e-5)
        assert row[tag] == pytest.approx(np.mean([*single.values()]), rel=1e-5)
        assert len(set(single.values())) > 1


def test_the_log_has_only_what_a_recipe_computes(trained):
    folder = trained.run("few", main_NPC.main, "--weighting", "none", "--memory_loss_weight", 0,
                         "--epochs", 1)
    line, = [line for line in (folder / "log.txt").read_text().splitlines() if "step 3 of" in line]
    assert "batch_loss" in line and "memory" not in line and " w " not in line


def test_a_weighting_knows_the_pairs_and_the_step(trained, monkeypatch):
    """Enough for a history of each pair's loss, which a resumed run goes on counting."""
    seen = []

    def remember(batch, indices, step, num_pairs, **_):
        seen.append((int(step), indices.tolist(), num_pairs))
        return torch.ones_like(batch)

    monkeypatch.setitem(weightings.WEIGHTINGS, "remember",
                        weightings.Weighting(remember, "for this test", False, ()))
    for more in ([], ["--resume", "auto"]):
        folder = trained.run("remember", main_NPC.main, "--weighting", "remember", *more,
                             "--epochs", 1 + len(more) // 2)
    assert [step for step, _, _ in seen] == list(range(2 * STEPS))
    assert {n for _, _, n in seen} == {PAIRS}
    for epoch, w in enumerate(weights(folder)):
        drawn = sum((indices for _, indices, _ in seen[epoch * STEPS :][:STEPS]), [])
        assert sorted(drawn) == np.flatnonzero(np.isfinite(w)).tolist()


def test_log_txt_tells_the_epochs_and_the_mixture(trained):
    text = (trained.npc / "log.txt").read_text(encoding="utf-8")
    assert text.count(": dev R@1") == 2 and text.count("mixture: mean") == 2
    assert "strict clean set" in text and "precision" in text and "lr" in text


@pytest.mark.slow
def test_wandb_is_sent_what_tensorboard_gets(trained, tmp_path):
    """With the package itself, offline: its file of records has the curves."""
    pytest.importorskip("wandb")
    argv = ["main_CLIP.py", *trained.data.options, *TRAINING, "--epochs", "1", "--wandb", "mine",
            "--checkpoint_path", tmp_path, "--experiments", "x"]
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (records,) = (tmp_path / "x").glob("wandb/offline-run-*/*.wandb")
    for name in (b"train/batch_loss", b"dev/mean_R1", b"mine"):
        assert name in records.read_bytes()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, *map(str, argv), "--overwrite"], cwd=ROOT,
                          env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: --wandb mine: " in done.stderr and "WANDB_MODE=offline" in done.stderr


# ---- what equals what ---------------------------------------------------------------------------


def test_npc_without_weights_and_memory_is_clip(trained):
    folder = trained.run("npc_none", main_NPC.main, "--weighting", "none",
                         "--memory_loss_weight", 0)
    ours = checkpoint(folder / "epoch2.pt")["state_dict"]
    theirs = checkpoint(trained.clip / "epoch2.pt")["state_dict"]
    first = checkpoint(trained.clip / "epoch1.pt")["state_dict"]
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=2e-5), key
    assert max((theirs[key] - first[key]).abs().max() for key in theirs) > 5e-4
    assert (np.nan_to_num(weights(folder), nan=1) == 1).all()


def test_posterior_weights_are_the_bank_s(trained, bank):
    w = weights(trained.run("gmm", main_NPC.main, "--weighting", "gmm", "--epochs", 1))[0]
    drawn = ~np.isnan(w)
    assert drawn.sum() == 48 and np.allclose(w[drawn], bank.posterior[drawn], atol=1e-7)


@pytest.mark.parametrize("recipe, limit", [("paper", np.log(100)), ("released", np.log(150))])
@pytest.mark.parametrize("main", [main_CLIP.main, main_NPC.main])
def test_paper_recipe_limits_the_logit_scale(trained, tmp_path, main, recipe, limit):
    torch.manual_seed(0)
    state = clip.load("tiny", "cpu")[0].state_dict()
    state["logit_scale"].fill_(np.log(150))
    torch.save(state, tmp_path / "warm.pt")
    folder = trained.run(f"{main.__module__}_{recipe}", main, "--vision_model",
                         tmp_path / "warm.pt", "--recipe", recipe, "--epochs", 1, "--lr", 1e-5)
    assert checkpoint(folder / "epoch1.pt")["state_dict"]["logit_scale"] == pytest.approx(
        limit, abs=1e-3)


def test_accumulation_encodes_in_pieces_and_trains_alike(trained, monkeypatch):
    sizes, encode = [], clip.CLIP.encode_text
    monkeypatch.setattr(clip.CLIP, "encode_text", lambda self, items: (
        sizes.append(len(items)), encode(self, items))[1])
    ours, theirs = (checkpoint(folder / "epoch2.pt")["state_dict"] for folder in (
        trained.run("pieces", main_CLIP.main, "--accum_steps", 3), trained.clip))
    assert max(size for size in sizes if size != 20) <= 6  # of 16; dev has 20
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-5) for key in theirs)


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, main", [("f30k", main_CLIP.main), ("cc", main_NPC.main),
                                          ("coco", main_CLIP.main)])
def test_eval_scores_a_checkpoint_on_the_test_split(trained, datasets, tmp_path, capsys, layout,
                                                    main):
    main(["--eval", "--resume", str(trained.npc / "best.pt"), *datasets[layout].options,
          "--num_workers", "0", "--device", "cpu", "--checkpoint_path", str(tmp_path)])
    scores = json.loads((tmp_path / "ex0" / "eval_test.json").read_text())
    initial, interval = scores.pop("initial"), scores.pop("interval")
    low, high = interval["mean_R1"]
    assert 0 <= low <= (scores["5K"] if layout == "coco" else scores)["mean_R1"] <= high <= 100
    parts = [part for found in (scores, initial)
             for part in (found.values() if layout == "coco" else [found])]
    assert layout != "coco" or scores.keys() == initial.keys() == {"5K", "1K"}
    printed = capsys.readouterr().out
    for part in parts:
        assert part.keys() == SCORES
        assert f"{part['rsum']:.2f}" in printed and f"{part['t2i_R@10']:.2f}" in printed
    assert ("MSCOCO 1K" in printed and "MSCOCO 5K" in printed) == (layout == "coco")
    assert not list((tmp_path / "ex0").glob("*.pt"))
    assert json.loads((tmp_path / "ex0" / "options_eval.json").read_text())["test_images"] == 6


def test_interpolation_scores_both_ends_and_writes_the_best(trained, capsys, tmp_path):
    out = tmp_path / "between.pt"
    interpolate.main(["--resume", str(trained.clip / "epoch2.pt"), "--initial", "tiny", "--out",
                      str(out), *trained.data.options, "--device", "cpu", "--num_workers", "0"])
    rows = {float(line.split()[1]): [float(x) for x in line.split()[2:]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("alpha")}
    assert list(rows) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    args = options(trained.data)
    torch.manual_seed(99)
    initial, preprocess = clip.load("tiny", "cpu")
    scores = evaluate(initial, retrieval_split(args, "dev", preprocess), args,
                      Precision("fp32", args.device))
    for row, expected in ((rows[0], scores), (rows[1], records(trained.clip)[1]["dev"])):
        assert row == pytest.approx([v for k, v in expected.items() if k != "mean_R1"], abs=0.01)

    written = checkpoint(out)
    best = max(rows, key=lambda alpha: (rows[alpha][0] + rows[alpha][3], alpha))
    assert written["alpha"] == best
    start, end = initial.state_dict(), checkpoint(trained.clip / "epoch2.pt")["state_dict"]
    for name, value in written["state_dict"].items():
        assert torch.allclose(value, (1 - best) * start[name] + best * end[name], atol=1e-6), name

    main_CLIP.main(["--eval", "--resume", str(out), *trained.data.options, "--device", "cpu",
                    "--checkpoint_path", str(tmp_path)])
    search.main(["a red bar", "--resume", str(out), *trained.data.options, "--device", "cpu",
                 "--out", str(tmp_path / "found.png")])
    export_hf.main(["--resume", str(out), "--out", str(tmp_path / "hf")])
    trained.run("from_between", main_CLIP.main, "--vision_model", out, "--epochs", 1)
    assert (tmp_path / "ex0" / "eval_test.json").exists() and (tmp_path / "found.png").exists()


def test_interpolation_of_different_architectures_is_refused(trained, tmp_path, refusal):
    torch.save(clip.CLIP(**{**clip.architecture("tiny"), "vision_layers": 1}).state_dict(),
               tmp_path / "other.pt")
    argv = ["--resume", trained.clip / "epoch2.pt", "--initial", tmp_path / "other.pt",
            *trained.data.options, "--device", "cpu"]
    assert "give the model that it started from" in refusal(interpolate.main, argv)


# ---- the other commands -------------------------------------------------------------------------


def test_construct_noise_command(dataset, capsys):
    data = dataset("coco")
    construct_noise.main([*data.options, "--noise_ratio", "0.60", "--seed", "3"])
    path = data.split_folder / "0.6_noise_random_seed3_train_caps.txt"
    clean, noisy = data.lines("train_caps.txt"), read_lines(path)
    assert sorted(noisy) == sorted(clean) and noisy != clean
    changed = sum(a != b for a, b in zip(clean, noisy, strict=True))
    said = capsys.readouterr().out
    assert str(path) in said and f"60 captions, {changed} of them" in said


@pytest.mark.parametrize("layout", ["coco", "cc"])
def test_memory_bank_command_takes_a_trained_checkpoint(trained, dataset, layout, capsys):
    data = dataset(layout)
    options = [*data.options, "--device", "cpu", "--num_workers", "0", "--noise_ratio", "0.2"]
    get_memorybank.main([*options, "--resume", str(trained.npc / "best.pt")])
    said = capsys.readouterr().out
    assert "mixture" in said and "strict clean set" in said and "precision" in said
    with np.load(banks(data.root)["0.2_mbank"]) as arrays:
        n = len(data.lines("train_caps.txt"))
        assert arrays["image_entry"].shape == (12,) and arrays["caption_entry"].shape == (n,)
        assert arrays["clean"][arrays["caption_entry"]].all()


def test_each_seed_has_its_noise_and_its_bank(trained, dataset, capsys):
    data = dataset("f30k")
    initial = ["--vision_model", str(trained.npc / "best.pt")]  # else random weights, of --seed

    def train(seed, *more):
        main_NPC.main([*data.options, *COMMON, *initial, "--epochs", "1", "--batch_size", "12",
                       "--noise_ratio", "0.4", "--checkpoint_path", str(data.root.parent),
                       "--experiments", f"s{seed}", "--seed", str(seed), *more])
        return json.loads((data.root.parent / f"s{seed}" / "options.json").read_text())["bank"]

    found = {train(seed) for seed in (1, 2, 99)}
    made = tree(data.root) - tree(trained.data.root)
    assert len(found) == 3 and {name for name in made if "mbank" in name} == {
        f"annotations/frozen_memory_bank/{name}" for name in found}
    noise = [data.lines(f"0.4_noise_{name}train_caps.txt")
             for name in ("random_seed1_", "random_seed2_", "")]
    assert len({str(captions) for captions in noise}) == 3
    before = tree(data.root)
    assert train(3, "--noise_seed", "2") in found and tree(data.root) == before
    assert "0.4_noise_random_seed2_train_caps.txt" in capsys.readouterr().out.split("training:")[-2]
    assert train(4, "--noise_kind", "similar") not in found
    assert "0.4_noise_similar_seed4_train_caps.txt" in {p.name for p in data.split_folder.iterdir()}


def test_memory_bank_command_writes_the_authors_format(trained, dataset, refusal):
    """It has no posterior to weight with."""
    data = dataset("cc")
    get_memorybank.main([*data.options, *COMMON, "--format", "released"])
    images = np.load(data.root / "annotations/memory_bank/0_mbank_img_idx.npy", allow_pickle=True)
    assert set(images.item()) == set(data.ids["train"])
    argv = [*data.options, *COMMON, "--batch_size", "12", "--epochs", "1", "--checkpoint_path",
            str(data.root.parent), "--experiments"]
    main_NPC.main([*argv, "npc"])
    assert not (data.root / "annotations/frozen_memory_bank").exists()
    said = refusal(main_NPC.main, [*argv, "gmm", "--weighting", "gmm"])
    assert "--weighting" in said and "get_memorybank.py" in said


def test_the_readme_s_command_lines_parse():
    args = parse_args("npc", "--batch_size 256 --epochs 5 --lr 2e-7 --vision_model ViT-B/32 "
                      "--noise_ratio 0.2 --num_anns 5 --dataset_root PATH --dataset coco "
                      "--checkpoint_path PATH --device cpu".split())
    assert (args.batch_size, args.lr, args.num_anns, args.precision) == (256, 2e-7, 5, "fp32")
    assert (args.recipe, args.weighting, args.memory_loss_weight) == ("paper", "npc", 1)
    assert (args.beta1, args.beta2, args.eps, args.weight_decay) == (0.9, 0.98, 1e-6, 0.2)
