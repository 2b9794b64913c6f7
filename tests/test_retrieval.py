"""Recall at K against a full sort, ties and a collapsed model included."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Lookup, pairs_for, parsed

import utils.scoring.retrieval
from utils.errors import InputError
from utils.method.optimizer import Precision
from utils.scoring.retrieval import (
    KS,
    best_ranks,
    evaluate,
    evaluate_test,
    fold_recalls,
    intervals,
    recalls,
)


def brute_ranks(queries, gallery, query_group, gallery_group):
    """Rank of the best correct item in a full sort, equal scores in the order of their index."""
    ranks = []
    for query, group in zip(queries.tolist(), query_group.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery.tolist()]
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        ranks.append(next((r for r, j in enumerate(order) if gallery_group[j] == group),
                          len(scores)))
    return ranks


def brute_recalls(images, texts, image_of):
    own = torch.arange(len(images))
    result = {}
    for way, ranks in (("i2t", brute_ranks(images, texts, own, image_of)),
                       ("t2i", brute_ranks(texts, images, image_of, own))):
        for k in KS:
            result[f"{way}_R@{k}"] = 100 * sum(r < k for r in ranks) / len(ranks)
    result["rsum"] = sum(result.values())
    result["mean_R1"] = (result["i2t_R@1"] + result["t2i_R@1"]) / 2
    return result


def small_integers(n, width, seed):
    """Features whose scores are exact, so that ties abound and are real."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-1, 2, (n, width))).double()


def captions_of(n, seed, most=4):
    """Image of each caption: 1 to `most` captions an image, in any order."""
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n), rng.integers(1, most + 1, n))
    return torch.from_numpy(rng.permutation(image_of))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [1, 37, 2**24])
def test_ranks_are_those_of_a_full_sort_with_ties_by_index(monkeypatch, seed, block):
    monkeypatch.setattr(utils.scoring.retrieval, "BLOCK", block)
    images, image_of = small_integers(15, 3, seed), captions_of(15, seed)
    texts = small_integers(len(image_of), 3, seed + 100)
    own = torch.arange(15)
    ranks = best_ranks(images, texts, own, image_of)
    assert ranks.tolist() == brute_ranks(images, texts, own, image_of)
    ranks = best_ranks(texts, images, image_of, own)
    assert ranks.tolist() == brute_ranks(texts, images, image_of, own)


@pytest.mark.parametrize("block", [1, 2**24])
def test_a_query_without_a_correct_item_ranks_behind_all_and_spoils_no_other(monkeypatch, block):
    monkeypatch.setattr(utils.scoring.retrieval, "BLOCK", block)
    queries, gallery = torch.ones(3, 2), torch.ones(2, 2)
    ranks = best_ranks(queries, gallery, torch.tensor([7, 1, 9]), torch.tensor([0, 1]))
    assert ranks.tolist() == [2, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_recalls_are_those_of_a_full_sort(seed):
    image_of = captions_of(14, seed)
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(14, 4, generator=generator, dtype=torch.float64), dim=1)
    noise = torch.randn(len(image_of), 4, generator=generator, dtype=torch.float64)
    texts = F.normalize(images[image_of] + 0.7 * noise, dim=1)
    scores = recalls(images, texts, image_of)
    assert scores == pytest.approx(brute_recalls(images, texts, image_of), abs=1e-9)
    assert 5 < scores["i2t_R@1"] < 100


@pytest.mark.parametrize("per_image", [1, 5])
def test_a_collapsed_model_scores_at_chance(per_image):
    n = 40
    images = torch.ones(n, 8) / 8**0.5
    image_of = torch.arange(n).repeat_interleave(per_image)
    scores = recalls(images, images[image_of], image_of)
    assert scores["t2i_R@1"] == pytest.approx(100 / n) and scores["t2i_R@10"] == 100 * 10 / n
    assert scores["i2t_R@1"] == pytest.approx(100 / n)
    assert scores["i2t_R@10"] == pytest.approx(100 * (10 if per_image == 1 else 2) / n)


@pytest.mark.parametrize("n, folds", [(25, 5), (12, 3), (11, 5), (6, 5), (5, 5)])
def test_folds_are_consecutive_images_with_their_captions(n, folds):
    image_of = captions_of(n, seed=n)
    images, texts = small_integers(n, 4, 1), small_integers(len(image_of), 4, 2)
    expected = []
    for part in np.array_split(np.arange(n), folds):
        own = [j for j, image in enumerate(image_of.tolist()) if image in part]
        expected.append(brute_recalls(images[part], texts[own],
                                      torch.tensor([int(image_of[j]) - part[0] for j in own])))
    assert len(expected) == folds
    scores = fold_recalls(images, texts, image_of, folds)
    for key, value in scores.items():
        assert value == pytest.approx(np.mean([fold[key] for fold in expected]), abs=1e-9), key


# ---- with a model -------------------------------------------------------------------------------


COCO = parsed("clip", dataset="coco", eval_batch_size=4, num_workers=0, device="cpu")
ARGS = parsed("clip", eval_batch_size=4, num_workers=0, device="cpu")
FP32 = Precision("fp32", torch.device("cpu"))


def example(n=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image_of = captions_of(n, seed).tolist()
    first = {}
    image_of = [first.setdefault(k, len(first)) for k in image_of]
    text_of = [*range(len(image_of) - 2), 0, 1]  # two captions occur twice
    images = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    texts = torch.randn(len(image_of) - 2, 4, generator=generator, dtype=torch.float64)
    return Lookup(images, texts), pairs_for(image_of, text_of)


def test_evaluation_normalises_and_encodes_each_image_and_caption_once():
    model, pairs = example()
    scores = evaluate(model, pairs, ARGS, FP32)
    images, texts = F.normalize(model.images, dim=1), F.normalize(model.texts, dim=1)
    expected = brute_recalls(images, texts[pairs.text_of], torch.from_numpy(pairs.image_of))
    assert scores == pytest.approx(expected, abs=1e-9)
    assert model.encoded == {"images": 11, "texts": len(model.texts)}


def test_coco_scores_all_images_and_five_folds_from_one_pass():
    model, pairs = example()
    scores, _ = evaluate_test(model, pairs, COCO, FP32)
    assert model.encoded == {"images": 11, "texts": len(model.texts)}
    assert list(scores) == ["5K", "1K"]
    images, texts = F.normalize(model.images, dim=1), F.normalize(model.texts, dim=1)
    features = images, texts[pairs.text_of], torch.from_numpy(pairs.image_of)
    assert scores["5K"] == recalls(*features) and scores["1K"] == fold_recalls(*features, 5)


def test_intervals_are_those_of_resampled_images():
    """Against a loop that draws images and scores their captions; more images, less width."""
    image_of = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    ranks = {"i2t": torch.tensor([0, 3, 0, 1]), "t2i": torch.tensor([0, 1, 0, 2, 0, 0, 4])}
    rng, found = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = rng.integers(0, 4, 4)
        hits = np.concatenate([(ranks["t2i"][image_of == k] < 1).numpy() for k in drawn])
        i2t, t2i = 100 * (ranks["i2t"][drawn] < 1).double().mean().item(), 100 * hits.mean()
        found.append((i2t, t2i, (i2t + t2i) / 2))
    expected = np.quantile(found, [0.025, 0.975], axis=0).T
    got = intervals(ranks, image_of)
    np.testing.assert_allclose(list(got.values()), expected, atol=4)
    assert intervals(ranks, image_of) == got  # the seed is fixed
    many = intervals({way: rank.repeat(25) for way, rank in ranks.items()},
                     torch.cat([image_of + 4 * k for k in range(25)]))
    for name, (low, high) in many.items():
        assert high - low < 0.4 * (got[name][1] - got[name][0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tower", ["images", "texts"])
def test_features_that_are_not_finite_are_refused(tower, value):
    model, pairs = example()
    getattr(model, tower)[3, 1] = value
    with pytest.raises(InputError, match=f"{tower[:-1]} features that are not finite"):
        evaluate(model, pairs, ARGS, FP32)
