"""The judge: two rounds, and the bank after them, against a literal transcription; losses,
neighbours and posteriors against brute force and known mixtures; its banks and its relatives
through the commands.

The transcription follows docs/finding_noise.md point by point: every loss by passes of its own,
neighbours by double loops. Of the repository it uses the towers alone, and the order of its random
numbers.
"""

import copy
import csv
import dataclasses
import hashlib
import json

import conftest
import naive
import numpy as np
import pytest
import test_npc_step
import torch
import torch.nn.functional as F
from conftest import Watched, pairs_for, parsed
from PIL import Image
from processes import BANK, run, run_in_two, save_small
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score
from test_npc_step import FP32, make_data, make_model, reference_adamw

import clip
import data
import find_noise
import get_memorybank
import main_CLIP
import main_NPC
from dataset.make_scenes import make_scenes
from params import parse_args
from utils.errors import InputError
from utils.method import features as features_module
from utils.method import judge
from utils.method.building import bank_of, build_bank, nearest_clean
from utils.method.features import Features, nearest, normalised, random_rows
from utils.method.judge import (
    agreements,
    judge_pairs,
    mismatched,
    posterior_by_mismatches,
    share_in_words,
    standard_scores,
    verdict_on,
    with_options,
    wrong_share_by,
)
from utils.method.pairs import Pairs

STEPS, RATE, SEED, K, BATCH = 32, 3e-4, 3, 3, 10  # the steps are those by default


def reference_features(model, pairs):
    """(images (u, D), captions (v, D), temperature), as long as they are."""
    with torch.no_grad():
        images = torch.stack([pairs.images[k] for k in range(len(pairs.images))]).double()
        return (model.encode_image((images / 255 - naive.MEAN) / naive.STD),
                model.encode_text(pairs.tokens), model.logit_scale.exp())


def cosines(features):
    return features / features.norm(dim=1, keepdim=True)


def losses_of(image, text, scale):
    """Losses (b,) of a batch of features."""
    logits = scale * cosines(image) @ cosines(text).T
    return (logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diag()


def agreement(items, partners, item_of, partner_of, own_item, own_partner, among=None):
    """(n,) mean cosine of each pair's partner with those of its item's K nearest other items, or
    of the nearest of those `among` them."""
    among = range(len(items)) if among is None else among
    items, partners = (cosines(x - x[of].mean(0)) for x, of in ((cosines(items), item_of),
                                                              (cosines(partners), partner_of)))
    result = []
    for item, partner in zip(own_item, own_partner, strict=True):
        similar = items @ items[item]
        others = [j for j in np.argsort(-similar.numpy(), kind="stable") if j in among]
        others = [j for j in others if j != item][:K]
        total = weight = 0.0
        for j in others:
            theirs = [p for p in partner_of[item_of == j] if p != partner]
            if theirs and similar[j] > 0:
                total += similar[j] * (partners[theirs] @ partners[partner]).mean()
                weight += similar[j]
        result.append(float(total / weight) if weight else np.nan)
    return np.array(result)


def standard(values, of):
    known = of[~np.isnan(of)]
    return np.nan_to_num((values - known.mean()) / known.std(ddof=1))


def reference_mismatch(pairs, rng):
    """(n,) captions: for each pair that of a random pair whose caption stands nowhere beside its
    image. The pairs to draw from are ordered by when their caption first occurs."""
    n, text_of = len(pairs), list(pairs.text_of)
    beside = [{text_of[j] for j in range(n) if pairs.image_of[j] == image}
              for image in pairs.image_of]
    fitting = [[j for j in sorted(range(n), key=lambda j: text_of.index(text_of[j]))
                if text_of[j] not in beside[i]] for i in range(n)]
    drawn = rng.integers([len(fit) for fit in fitting])
    return np.array([text_of[fit[k]] for fit, k in zip(fitting, drawn, strict=True)])


def reference_verdict(features, pairs, rng, neighbours):
    """(score, loss, posterior, clean) (n,) each and the share of wrong pairs."""
    images, texts, scale = features
    n, image_of, text_of = len(pairs), pairs.image_of, pairs.text_of
    others = [reference_mismatch(pairs, rng) for _ in range(4)]
    loss, if_other = np.zeros(n), np.zeros((4, n))
    for _ in range(4):  # draws of batches
        for batch in np.array_split(rng.permutation(n), n // BATCH):
            image, text = images[image_of[batch]], texts[text_of[batch]]
            loss[batch] += losses_of(image, text, scale).numpy() / 4
            for k, other in enumerate(others):
                for place, i in enumerate(batch):
                    exchanged = text.clone()
                    exchanged[place] = texts[other[i]]
                    if_other[k, i] += losses_of(image, exchanged, scale)[place].item() / 4
    score, mismatches = loss, if_other
    if neighbours:  # before the first round neighbours count too, 3/8 each of the loss
        def both(text):
            return (agreement(images, texts, image_of, text_of, image_of, text),
                    agreement(texts, images, text_of, image_of, text, image_of))

        def scored(loss_of_them, text):
            agreements = zip(both(text), both(text_of), strict=True)
            return standard(loss_of_them, loss) - 0.375 * sum(
                standard(values, own) for values, own in agreements)

        score = scored(loss, text_of)
        mismatches = [scored(bad, other) for bad, other in zip(if_other, others, strict=True)]
    mismatches = np.concatenate(mismatches)
    share = min(1.0, 5 * np.mean(score > np.quantile(mismatches, 0.8)))
    is_pair = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(
        np.concatenate([score, mismatches]), np.repeat([1.0, 0.0], [n, 4 * n]),
        np.repeat([1.0, 0.25], [n, 4 * n])).predict(score).clip(1e-12)
    posterior = 1 - (share * (1 - is_pair) / is_pair).clip(0, 1)
    clean = posterior > 0.8
    if clean.sum() < n / 10:
        clean = np.isin(np.arange(n), np.argsort(score, kind="stable")[: n // 10])
    return score, loss, posterior, clean, share


def reference_lesson(model, pairs, clean, args, rng):
    """A copy of the model after a round's steps: warm-up over four, the gradient's norm clipped,
    the clean pairs in a new order whenever no whole batch is left."""
    taught, batches = copy.deepcopy(model), []
    size = min(BATCH, clean.sum())
    while len(batches) < STEPS:
        order = rng.permutation(np.flatnonzero(clean))
        batches += [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
    optimizer = reference_adamw(taught, args)
    for step, batch in enumerate(batches[:STEPS]):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 4)
        optimizer.zero_grad()
        naive.losses(taught, pairs, batch).mean().backward()
        norm = torch.stack([p.grad.norm() for p in taught.parameters()]).norm()
        for p in taught.parameters():
            p.grad *= min(1.0, args.clip_grad / (norm + 1e-6))
        optimizer.step()
    return taught


def nearest_pair(queries, pair_features, clean):
    """Of each query the clean pair with the largest cosine, the lowest of equals."""
    similar = cosines(queries) @ cosines(pair_features).T
    similar[:, ~torch.from_numpy(clean)] = -2
    return (similar > similar.amax(dim=1, keepdim=True) - 1e-12).int().argmax(dim=1).numpy()


def test_two_rounds_equal_the_literal_transcription():
    pairs, _ = make_data()
    pairs.captions = [f"caption {k}" for k in pairs.text_of]
    model = make_model("vit")
    args = test_npc_step.options(
        recipe="robust", batch_size=BATCH, lr=RATE, judge_neighbours=K, min_clean=0.1, seed=SEED,
        clip_grad=0.3, context_length=12)
    initial = copy.deepcopy(model)
    bank = build_bank(model, pairs, args, FP32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 initial.state_dict().values(), strict=True))

    features = reference_features(initial, pairs)
    cosine = (cosines(features[0])[pairs.image_of] * cosines(features[1])[pairs.text_of]).sum(1)
    verdict, sets = reference_verdict(features, pairs, np.random.default_rng(SEED), K), []
    before = judge_pairs(model, pairs, with_options(args, judge_rounds=0), FP32)[0]
    np.testing.assert_allclose(before.score, verdict[0], atol=1e-6)
    for number in (1, 2):
        sets.append(verdict[3])
        rng = np.random.default_rng([SEED, number])
        taught = reference_lesson(initial, pairs, verdict[3], args, rng)
        features = reference_features(taught, pairs)
        verdict = reference_verdict(features, pairs, rng, 0)
    _, loss, posterior, clean, share = verdict
    assert not np.array_equal(*sets) and not np.array_equal(clean, sets[1])  # the rounds matter
    assert sorted(np.flatnonzero(posterior > 0.8)) == sorted(np.flatnonzero(clean))
    np.testing.assert_allclose(bank.loss, loss, atol=1e-6)
    np.testing.assert_allclose(bank.posterior, posterior, atol=1e-6)
    assert np.array_equal(bank.clean, clean)
    assert bank.info["wrong_share"] == pytest.approx(share, abs=1e-6)
    np.testing.assert_allclose(bank.cosine, cosine, atol=1e-6)
    images, texts, _ = features
    entries = nearest_pair(images, images[pairs.image_of], clean)
    own = {k: i for i in reversed(np.flatnonzero(clean)) for k in [pairs.image_of[i]]}
    assert bank.image_entry.tolist() == [own.get(k, entry) for k, entry in enumerate(entries)]
    entries = nearest_pair(texts[pairs.text_of], texts[pairs.text_of], clean)
    assert bank.caption_entry.tolist() == np.where(clean, np.arange(len(pairs)), entries).tolist()


N_IMAGES, N_TEXTS, N = 9, 14, 30


@pytest.fixture(scope="module")
def example():
    """(images, texts, pairs) of random features; some captions occur beside several images and
    some twice beside one."""
    rng = np.random.default_rng(0)
    image_of = np.sort(np.r_[np.arange(N_IMAGES), rng.integers(0, N_IMAGES, N - N_IMAGES)])
    text_of = rng.permutation(np.r_[np.arange(N_TEXTS), rng.integers(0, N_TEXTS, N - N_TEXTS)])
    features = [F.normalize(torch.from_numpy(rng.normal(size=(n, 6))), dim=1)
                for n in (N_IMAGES, N_TEXTS)]
    return *features, pairs_for(image_of.tolist(), text_of.tolist())


def judged(features, pairs, neighbours=0, scale=2.0, **options):
    """The verdict on features after a round, or before the first one, by neighbours."""
    args = parsed("memorybank", **{"seed": 0, "batch_size": 10, "judge_rounds": 1, **options})
    return verdict_on(features, torch.tensor(scale), pairs, args, np.random.default_rng(0),
                      neighbours)


# ---- parts ---------------------------------------------------------------------------------------


def variants(pairs):
    """The same pairs with captions whose case and white space vary."""
    spell = (str, str.upper, "  {}".format, lambda text: text.replace(" ", "\t"))
    captions = [spell[i % 4](text) for i, text in enumerate(pairs.captions)]
    return dataclasses.replace(pairs, captions=captions)


def test_mismatches_are_drawn_evenly_from_captions_that_stand_nowhere_beside_the_image(example):
    pairs, rng = variants(example[2]), np.random.default_rng(0)
    draws = np.array([mismatched(pairs, rng) for _ in range(3000)])
    beside = {image: {pairs.text_of[i] for i in np.flatnonzero(pairs.image_of == image)}
              for image in pairs.image_of}
    for i in range(N):
        fit = [j for j in range(N) if pairs.text_of[j] not in beside[pairs.image_of[i]]]
        drawn = np.bincount(draws[:, i], minlength=N)
        assert set(np.flatnonzero(drawn)) == set(fit)
        assert np.allclose(drawn[fit] / 3000, 1 / len(fit), atol=0.03)


def test_a_pair_without_a_possible_mismatch_is_left_out(example):
    pairs = pairs_for([0, 0, 1, 2], [0, 1, 0, 1])
    assert (mismatched(pairs, np.random.default_rng(0))[:2] == -1).all()
    assert set(mismatched(pairs, np.random.default_rng(0))[2:]) <= {0, 1, 2, 3}
    images, texts = example[0][:3], example[1][:2]
    assert len(judged((images, texts), pairs).mismatches) == 4 * 2
    with pytest.raises(InputError, match="every caption stands beside every image"):
        judged((images[:1], texts), pairs_for([0, 0], [0, 1]))


def test_the_judge_draws_its_batches_whatever_the_recipe(example):
    *features, pairs = example
    ours, released = (judged(features, pairs, recipe=name).loss for name in ("paper", "released"))
    assert np.array_equal(ours, released)


@pytest.mark.parametrize("common, share", [("two captions", 0.25), ("half share one", 0.2)])
def test_common_captions_do_not_spoil_the_share(common, share):
    """20 % are wrong. Of two captions the other one is right for a wrong pair, so that a fifth of
    the mismatches fits, and the share is .2 / .8."""
    rng, n = np.random.default_rng(0), 4000
    right = rng.integers(0, 2, n) if common == "two captions" else np.where(
        rng.random(n) < 0.5, 0, np.arange(n))
    text_of, right = np.unique(right, return_inverse=True)
    texts = F.normalize(torch.from_numpy(rng.normal(size=(len(text_of), 32))), dim=1)
    images = F.normalize(texts[right] + torch.from_numpy(rng.normal(size=(n, 32))) / 8, dim=1)
    other, wrong = rng.permutation(right), np.zeros(n, bool)
    wrong[np.flatnonzero(other != right)[: n // 5]] = True
    noisy = np.where(wrong, other, right)
    pairs = variants(Pairs(None, None, np.arange(n), [f"text {k}" for k in noisy], noisy, None, ""))
    verdict = judged((images, texts), pairs, batch_size=100)
    assert abs(verdict.wrong_share - share) < max(0.02, 2 * verdict.share_error)


@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize("block", [1, 2**25])
def test_agreement_is_that_of_a_double_loop(monkeypatch, example, block, most):
    monkeypatch.setattr(judge, "BLOCK", block)
    monkeypatch.setattr(judge, "ROWS", min(block + 6, 2**14))
    images, texts, pairs = example
    text_of = np.random.default_rng(2).permutation(pairs.text_of)
    captions = torch.from_numpy(np.stack([pairs.text_of, text_of]))
    args = parsed("memorybank", search_among=most, noise_seed=4)
    got = agreements(images, texts, torch.from_numpy(pairs.image_of), captions, K, args)
    found = random_rows(N_IMAGES, most, 4), random_rows(N_TEXTS, most, 4)
    ways = ((images, texts, pairs.image_of, pairs.text_of, pairs.image_of, text_of, found[0]),
            (texts, images, pairs.text_of, pairs.image_of, text_of, pairs.image_of, found[1]))
    for values, way in zip(got, ways, strict=True):
        np.testing.assert_allclose(values[1], agreement(*way), atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("shape", ["skewed", "normal"])
def test_share_and_posterior_of_a_known_mixture(share, shape):
    """Whatever the shape of the scores: the share is right, its standard error is that of many
    repetitions, and of the pairs with a posterior of about p a share p is clean."""
    rng = np.random.default_rng(3)

    def draw(n):
        wrong = rng.random(n) < share
        if shape == "skewed":
            right_scores, bad = rng.exponential(0.4, n), lambda m: 3 + rng.gamma(2, 0.8, m) - 2.5
        else:
            right_scores, bad = rng.normal(0, 1, n), lambda m: rng.normal(3, 1.5, m)
        return wrong, np.where(wrong, bad(n), right_scores), bad(4 * n)

    wrong, scores, mismatches = draw(20_000)
    estimate, error = wrong_share_by(scores, mismatches)
    assert estimate == pytest.approx(share, abs=0.025)
    posterior = posterior_by_mismatches(scores, mismatches, estimate)
    for low in np.arange(0, 1, 0.25):
        some = (posterior >= low) & (posterior <= low + 0.25)
        if some.sum() > 300:
            assert posterior[some].mean() == pytest.approx((~wrong)[some].mean(), abs=0.06)
    shares, errors = np.array([wrong_share_by(*draw(500)[1:]) for _ in range(300)]).T
    assert 0.8 * shares.std() < errors.mean() < 1.3 * shares.std() + 0.011


def test_the_share_is_said_with_its_error_and_as_a_bound_unless_noise_is_random():
    verdict = judge.Verdict(*[np.zeros(3)] * 5, 0.2034, 0.031)
    for options, bound in (({}, True), ({"noise_ratio": 0.2}, False),
                           ({"noise_ratio": 0.2, "noise_kind": "similar"}, True)):
        said = share_in_words(verdict, parsed("find_noise", **options))
        assert said.startswith("20.3% (standard error 3.1%") and said.endswith(")")
        assert (", a lower bound where wrong captions resemble right ones" in said) == bound
    paper = verdict._replace(share_error=None)
    assert share_in_words(paper, parsed("memorybank")) == "20.3%"


@pytest.mark.parametrize("blind", [False, True])
def test_a_judge_that_cannot_tell_pairs_from_mismatches_says_so(blind):
    """At 60 % noise a good judge says nothing, random features do."""
    rng, n = np.random.default_rng(0), 1000
    images, texts = (F.normalize(torch.from_numpy(rng.normal(size=(n, 16))), dim=1)
                     for _ in range(2))
    texts[: 2 * n // 5] = texts[: 2 * n // 5] if blind else images[: 2 * n // 5]
    pairs = Pairs(None, None, np.arange(n), [*map(str, range(n))], np.arange(n), None, "")
    verdict, said = judged((images, texts), pairs, batch_size=100), []
    judge.log_verdict(pairs, verdict, parsed("find_noise"), said.append)
    doubts = [line for line in said if "hardly tells the pairs from mismatches" in line]
    assert len(doubts) == blind and doubts == judge.doubts(verdict)
    assert all(way in line for line in doubts for way in ("--judge", "fine-tune", "--labels",
                                                          "AUC 0.", "chance 0.5"))


def test_defaults_of_the_judge_and_of_robust():
    """docs/finding_noise.md has the measurements behind them."""
    for command in ("npc", "clip", "find_noise"):
        args = parsed(command, recipe="robust")
        assert (args.judge_rounds, args.judge_steps, args.judge_neighbours) == (2, 32, 15)
        assert (args.clean_threshold, args.judge_lr) == (0.8, 1e-5)
    assert parsed("npc", recipe="robust").epochs == 13
    assert parsed("npc", recipe="paper").epochs == 10
    assert parsed("clip", lr=3e-4).judge_lr == 3e-4
    assert parsed("clip", lr=3e-4, judge_lr=1e-4).judge_lr == 1e-4
    assert parsed("npc", precision="fp16", device="cpu").judge_lr == 2e-7


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "fast"])
def test_a_rate_of_the_rounds_that_is_no_positive_number_is_refused(rate, capsys):
    with pytest.raises(SystemExit):
        parsed("find_noise", judge_lr=rate)
    assert f"--judge_lr: expected a number above 0, got '{rate}'" in capsys.readouterr().err


@pytest.mark.parametrize("values, scores", [
    ([], [0.0]), ([3.0], [0.0]), ([3.0, 3.0], [0.0]), ([1.0, 3.0], [2**-0.5])])
@pytest.mark.filterwarnings("error")
def test_standard_scores_of_few_known_values(values, scores):
    known = torch.tensor([torch.nan, *values])
    assert standard_scores(torch.tensor([3.0]), known).tolist() == pytest.approx(scores)


# ---- features, and the search for the nearest ones -----------------------------------------------


@pytest.fixture(params=[(4096, 4096), (7, 5), (1, 1), (4, 64)])
def blocks(request, monkeypatch):
    for name, size in zip(("QUERIES", "KEYS"), request.param, strict=True):
        monkeypatch.setattr(features_module, name, size)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_are_those_of_a_full_sort_the_lowest_row_of_equals(blocks, k, itself, seed):
    rng = np.random.default_rng(seed)
    keys = torch.from_numpy(rng.integers(-1, 2, (33, 3))).double()  # exact scores, many ties
    queries = keys if itself else torch.from_numpy(rng.integers(-1, 2, (20, 3))).double()
    without = torch.arange(33) if itself else None
    similarity, found = nearest(queries, keys, k, without)
    scores = queries @ keys.T
    if itself:
        scores.fill_diagonal_(-torch.inf)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found, expected.indices[:, :k])
    assert torch.equal(similarity, expected.values[:, :k])


def test_a_query_misses_only_the_key_that_it_must_not_find(blocks):
    features = torch.eye(6)[[0, 0, 0, 1, 1, 2]]
    found = nearest(features, features, 2, torch.tensor([0, -1, 1, 4, -1, 5]))[1]
    assert found.tolist() == [[1, 2], [0, 1], [0, 2], [3, 0], [3, 4], [0, 1]]


def test_fewer_keys_than_wanted(blocks):
    keys = torch.eye(3)
    assert nearest(keys, keys, 10)[1].shape == (3, 3)
    assert nearest(keys, keys, 10, torch.arange(3))[1].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert nearest(keys[:0], keys)[1].shape == (0, 1)


def test_random_rows():
    some = random_rows(1000, 50, 3)
    assert len(np.unique(some)) == 50 and (np.diff(some) > 0).all() and some[0] < 100 < some[-1]
    assert np.array_equal(some, random_rows(1000, 50, 3))
    assert not np.array_equal(some, random_rows(1000, 50, 4))
    for most in (None, 20, 21):
        assert random_rows(20, most, 3).tolist() == list(range(20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_those_of_the_whole(dtype):
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = features if dtype == torch.float64 else features.float()
    centre, chosen = values.mean(dim=0), torch.tensor([3, 3, 29, 0])
    whole = F.normalize(F.normalize(values, dim=1) - centre, dim=1)
    rows = Features(normalised(features), centre=centre, normalise=True)
    some = Features(rows, chosen=chosen)
    assert rows.dtype == some.dtype == values.dtype
    assert rows.shape == (30, 5) and some.shape == (4, 5) and len(some) == 4
    for index in (slice(4, 9), slice(None), chosen):
        assert torch.equal(rows[index], whole[index])
    assert torch.equal(some[1:3], whole[[3, 29]])
    assert torch.equal(some[torch.tensor([2])], whole[[29]])


# ---- rounds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A noisy set of drawings and a CLIP that has seen some of another look."""
    place = tmp_path_factory.mktemp("drawings")
    for domain, train in (("source", 600), ("target", 120)):
        make_scenes(place / domain, domain, train, dev=20, test=20, seed=0)
    common = ["--dataset", "f30k", "--device", "cpu", "--num_workers", "0", "--seed", "0"]
    main_CLIP.main([*common, "--dataset_root", str(place / "source"), "--vision_model", "tiny",
                    "--epochs", "2", "--lr", "1e-3", "--warmup", "4", "--batch_size", "64",
                    "--checkpoint_path", str(place), "--experiments", "initial"])
    return place, [*common, "--dataset_root", str(place / "target"), "--noise_ratio", "0.4",
                   "--batch_size", "64", "--vision_model", str(place / "initial" / "best.pt")]


def banks(root):
    return {name: dict(np.load(path)) for name, path in conftest.banks(root).items()}


def quality(bank, root):
    """AUC of the loss, precision of the strict clean set, error of the share of wrong pairs."""
    lines = [(root / "annotations" / "scan_split" / name).read_text().splitlines()
             for name in ("train_caps.txt", "0.4_noise_random_seed0_train_caps.txt")]
    own = [set(lines[0][k // 5 * 5 : k // 5 * 5 + 5]) for k in range(len(lines[0]))]
    right = np.array([line in o for line, o in zip(lines[1], own, strict=True)])
    info = json.loads(bank["info"].tobytes())
    return (roc_auc_score(~right, bank["loss"]), right[bank["clean"]].mean(),
            abs(info["wrong_share"] - (1 - right.mean())))


def test_rounds_make_a_better_judge(drawings, monkeypatch):
    place, options = drawings
    root, steps = place / "target", []
    make = judge.Passes
    monkeypatch.setattr(judge, "Passes",
                        lambda *args, **more: steps.append(1) or make(*args, **more))
    get_memorybank.main(options)
    assert not steps  # the paper's judge trains nothing
    rounds = [*options, "--judge_rounds", "2", "--judge_steps", "16", "--judge_lr", "3e-4"]
    get_memorybank.main(rounds)
    assert len(steps) == 2 * 16
    found = banks(root)
    assert found.keys() == {"0.4_mbank", "0.4_mbank_rounds2x16_neighbours15"}
    paper, ours = (quality(found[name], root) for name in sorted(found))
    assert ours[0] > paper[0] + 0.01 and ours[1] > paper[1] and ours[2] < 0.05, (paper, ours)

    get_memorybank.main(rounds)  # the same again, bit for bit
    again = banks(root)["0.4_mbank_rounds2x16_neighbours15"]
    assert all(np.array_equal(again[k], found["0.4_mbank_rounds2x16_neighbours15"][k])
               for k in again)


def test_runs_use_the_bank_of_their_judge_and_find_noise_is_of_one_mind(drawings, capsys,
                                                                       tmp_path):
    """The rounds of a training take its --lr; find_noise.py, told the same rate, finds the same."""
    place, options = drawings
    training = [*options, "--epochs", "1", "--warmup", "1", "--lr", "3e-4", "--checkpoint_path",
                str(tmp_path)]
    judged = ["--judge_rounds", "1", "--judge_steps", "4"]
    main_NPC.main([*training, "--experiments", "npc"])
    assert "0.4_mbank" in (said := capsys.readouterr().out) and "rounds" not in said
    main_CLIP.main([*training, "--experiments", "clip", "--train_on", "clean", *judged])
    main_NPC.main([*training, "--experiments", "robust", "--recipe", "robust", *judged])
    find_noise.main([*options, "--out", str(tmp_path / "found"), "--worst", "3", "--judge_lr",
                     "3e-4", *judged])
    said = capsys.readouterr().out
    first, again = (line for line in said.splitlines() if line.startswith("judge, round 1"))
    assert first == again and "4 steps at 0.0003 on" in first
    path = conftest.banks(place / "target")["0.4_mbank_rounds1x4_neighbours15"]
    assert f"building {path}" in said and f"memory bank: {path}" in said
    # robust is CLIP on the same clean set, and no more
    a, b = (clip.read_checkpoint(tmp_path / name / "epoch1.pt") for name in ("clip", "robust"))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert "siamese_optimizer" not in b
    bank = banks(place / "target")["0.4_mbank_rounds1x4_neighbours15"]
    w = np.load(tmp_path / "robust" / "weights.npz")["w"][0]
    assert np.isnan(w[~bank["clean"]]).all()
    assert (w[bank["clean"]][~np.isnan(w[bank["clean"]])] == 1).all()
    info = json.loads(bank["info"].tobytes())
    assert f"noise share: {info['wrong_share']:.1%} (standard error " in said
    with open(tmp_path / "found" / "suspicious_pairs.csv", newline="") as f:
        found = {int(row["pair"]): float(row["posterior"]) for row in csv.DictReader(f)}
    assert np.allclose([found[i] for i in range(len(found))], bank["posterior"], atol=1e-5)


def test_two_processes_judge_as_one(tmp_path, datasets, dataset):
    data_set, results = dataset(), []
    model = str(save_small(tmp_path / "small.pt"))
    options = [*data_set.options, "--vision_model", model, "--device", "cpu", "--num_workers", "0",
               "--batch_size", "20", "--noise_ratio", "0.4", "--context_length", "12",
               "--judge_rounds", "1", "--judge_steps", "3", "--judge_lr", "1e-3",
               "--clean_threshold", "0.9999999", "--min_clean", "0.5"]  # no tie
    for in_processes in (run, run_in_two):
        in_processes(BANK, options, tmp_path / f"{in_processes.__name__}.txt")
        results.append(banks(data_set.root)["0.4_mbank_rounds1x3_neighbours15"])
    assert np.allclose(results[0]["loss"], results[1]["loss"], atol=1e-4)
    assert np.array_equal(results[0]["clean"], results[1]["clean"])


# ---- other judges --------------------------------------------------------------------------------


def test_another_model_judges(drawings, tmp_path):
    place, options = drawings
    root = place / "target"
    config = {**clip.architecture("tiny"), "image_resolution": 24, "embed_dim": 32}
    torch.manual_seed(1)
    torch.save(clip.CLIP(**config).state_dict(), tmp_path / "other.pt")
    get_memorybank.main([*options, "--judge", str(tmp_path / "other.pt")])
    get_memorybank.main(options)
    found = banks(root)
    assert not np.allclose(found["0.4_mbank"]["loss"], found["0.4_mbank_other.pt"]["loss"])


@pytest.fixture(scope="module")
def features(drawings):
    """An .npz file of the initial model's own features of the drawings."""
    place, options = drawings
    data.main(["--list_items", str(place / "items"), *options[:2], "--dataset_root",
               str(place / "target"), "--noise_ratio", "0.4", "--seed", "0"])
    model, preprocess = clip.load(str(place / "initial" / "best.pt"), device="cpu")
    lines = {name: (place / "items" / name).read_text().splitlines()
             for name in ("images.txt", "captions.txt", "items.sha256")}
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(path))
                              for path in lines["images.txt"]])
        arrays = {"images": model.encode_image(images).numpy(),
                  "texts": model.encode_text(clip.tokenize(lines["captions.txt"])).numpy(),
                  "items": np.array(lines["items.sha256"]),
                  "logit_scale": model.logit_scale.detach().numpy()}
    return place, options, arrays


def write_folder(folder, arrays, dtype=np.float32):
    """Features as a folder, which `data.py --list_items` would have begun."""
    folder.mkdir()
    for name in ("images", "texts"):
        np.save(folder / f"{name}.npy", arrays[name].astype(dtype))
    (folder / "items.sha256").write_text(f"{arrays['items'].item()}\n")
    (folder / "logit_scale.txt").write_text(f"{float(arrays['logit_scale'])}\n")


def test_features_of_any_model_judge_in_any_form(features, tmp_path):
    """As the model itself does: a file, a folder, half precision, a row for each pair."""
    place, options, arrays = features
    pairs = pairs_of(options)
    np.savez(tmp_path / "file.npz", **arrays)
    np.savez(tmp_path / "per_pair.npz", **{**arrays, "images": arrays["images"][pairs.image_of],
                                           "texts": arrays["texts"][pairs.text_of]})
    write_folder(tmp_path / "single", arrays)
    write_folder(tmp_path / "half", arrays, np.float16)
    before = (tmp_path / "half" / "images.npy").read_bytes()
    judged = [*options, "--judge_neighbours", "15"]
    get_memorybank.main(judged)
    for name in ("file.npz", "per_pair.npz", "single", "half"):
        get_memorybank.main([*judged, "--judge_features", str(tmp_path / name)])
    assert (tmp_path / "half" / "images.npy").read_bytes() == before
    found = banks(place / "target")
    own = found["0.4_mbank_neighbours15"]
    file, *others, half = (found[f"0.4_mbank_features_{name}_neighbours15"]
                           for name in ("file", "per_pair", "single", "half"))
    for name in ("loss", "posterior", "clean", "image_entry", "caption_entry"):
        assert all(np.array_equal(file[name], other[name]) for other in others)
    assert np.allclose(own["loss"], file["loss"], atol=1e-4)
    assert 0 < np.abs(file["loss"] - half["loss"]).max() < 0.02
    assert all((file["clean"] == other["clean"]).mean() > 0.99 for other in (own, half))


def spoilt(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def resaved(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def with_nan(values):
    values[-1, -1] = np.nan
    return values


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: (folder / "texts.npy").unlink(), "texts.npy does not exist"),
    (lambda folder: (folder / "items.sha256").unlink(), "items.sha256 does not exist"),
    (spoilt("items.sha256", b"0" * 64), "in another order"),
    (spoilt("items.sha256", b"\xff"), "items.sha256 is not a hash"),
    (spoilt("images.npy", b"not an array"), "images.npy is not an array of features"),
    (lambda folder: (folder / "texts.npy").write_bytes((folder / "texts.npy").read_bytes()[:-9]),
     "texts.npy is not an array of features"),
    (spoilt("logit_scale.txt", b"warm"), "logit_scale.txt is not a log temperature"),
    (resaved("images.npy", lambda values: values[1:]), "a row for each of 120 distinct images"),
    (resaved("images.npy", lambda values: values.astype(int)), "'images' must be finite floating"),
    (resaved("images.npy", lambda values: values.astype(">f4")), "images.npy is not an array of"),
    (resaved("images.npy", lambda values: values.astype(object)), "images.npy is not an array of"),
    (resaved("texts.npy", with_nan), "'texts' must be finite floating"),
    (resaved("texts.npy", lambda values: values[:, 1:]), "must lie in one space"),
    ({"items": np.array(hashlib.sha256(b"").hexdigest())}, "in another order"),
    ({"items": None}, "is not a file of features"),
    ({"images": np.array([{}], dtype=object)}, "is not a file of features")])
def test_features_that_do_not_fit_are_refused(features, tmp_path, capsys, spoil, said):
    """In a folder, or, with `spoil` a dictionary of other arrays, in a file."""
    _, options, arrays = features
    path = tmp_path / ("features.npz" if isinstance(spoil, dict) else "folder")
    if isinstance(spoil, dict):
        np.savez(path, **{name: value for name, value in {**arrays, **spoil}.items()
                          if value is not None})
    else:
        write_folder(path, arrays)
        spoil(path)
    with pytest.raises(SystemExit) as stop:
        get_memorybank.main([*options, "--judge_features", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_features_need_neither_model_nor_tokens(features, tmp_path, monkeypatch):
    place, options, arrays = features
    write_folder(tmp_path / "folder", arrays)
    called = []
    for owner, name in ((clip, "load"), (clip, "build"), (clip, "tokenize_with_lengths")):
        monkeypatch.setattr(owner, name, lambda *args, name=name, **more: called.append(name))
    words = [*options[: options.index("--vision_model")], "--judge_features",
             str(tmp_path / "folder")]
    get_memorybank.main(words)
    find_noise.main([*words, "--out", str(tmp_path / "out"), "--worst", "3"])
    assert f"features {tmp_path}/folder" in (tmp_path / "out/suspicious_pairs.html").read_text()
    data.main(["--list_items", str(tmp_path / "items"), *options[:2], "--dataset_root",
               str(place / "target"), "--noise_ratio", "0.4", "--seed", "0"])
    assert (tmp_path / "items/items.sha256").read_text().strip() == arrays["items"].item()
    assert not called


def test_features_are_used_in_blocks(monkeypatch):
    """Judging and searching take a few rows at a time, however many pairs there are."""
    for module, name, value in ((judge, "ROWS", 64), (judge, "BLOCK", 64 * 5 * 8),
                                (features_module, "QUERIES", 64), (features_module, "KEYS", 50)):
        monkeypatch.setattr(module, name, value)
    n, rng = 1500, torch.Generator().manual_seed(0)
    pairs = Pairs(None, None, np.arange(n) // 5, [*map(str, range(n))], np.arange(n), None, "-")
    images, texts = (Watched(torch.randn(m, 8, generator=rng).half()) for m in (n // 5, n))
    verdict = judged((images, texts), pairs, judge_neighbours=5, neighbours=5, batch_size=50)
    bank_of(verdict, images, texts, pairs, parsed("memorybank", batch_size=50, device="cpu"))
    assert images.most == texts.most == 64


def test_a_pool_of_all_is_the_whole_search_and_a_small_one_is_not(features, tmp_path):
    place, options, arrays = features
    np.savez(tmp_path / "file.npz", **arrays)
    words = [*options, "--judge_features", str(tmp_path / "file.npz"), "--judge_neighbours", "15"]
    tables = {}
    for most in ("", "600", "40"):
        among = ["--search_among", most] if most else []
        find_noise.main([*words, *among, "--out", str(tmp_path / f"out{most}")])
        with open(tmp_path / f"out{most}" / "suspicious_pairs.csv", newline="") as f:
            tables[most] = list(csv.DictReader(f))
    assert tables[""] == tables["600"]
    assert [row["posterior"] for row in tables[""]] != [row["posterior"] for row in tables["40"]]
    few, all_of_them = ({row["best_caption"] for row in tables[most]} for most in ("40", ""))
    assert len(few) <= 40 < len(all_of_them)
    # the bank's entries are the nearest among all clean pairs, whatever the neighbours were
    get_memorybank.main([*words, "--search_among", "40"])
    bank = banks(place / "target")["0.4_mbank_features_file_neighbours15_among40"]
    images = normalised(torch.from_numpy(arrays["images"]))
    entries = nearest_clean(images, pairs_of(options).image_of, bank["clean"])
    assert np.array_equal(entries, bank["image_entry"])


def pairs_of(options):
    return data.training_pairs(parse_args("memorybank", options), None,
                               lambda _: None)
