"""Recall at K against a full sort, ties and a collapsed model included; measures of weights against
known noise, and what TensorBoard is given of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Lookup, pairs_for, parsed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import utils.scoring.retrieval
from utils.errors import InputError
from utils.method.optimizer import Precision
from utils.scoring.diagnostics import noise_measures, pictures, show_weights
from utils.scoring.retrieval import (
    KS,
    best_ranks,
    evaluate,
    evaluate_test,
    fold_recalls,
    intervals,
    ranks_of,
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
    texts, own = small_integers(len(image_of), 3, seed + 100), torch.arange(15)
    ranks = ranks_of(images, texts, image_of)
    assert ranks["i2t"].tolist() == brute_ranks(images, texts, own, image_of)
    assert ranks["t2i"].tolist() == brute_ranks(texts, images, image_of, own)


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
    scores = recalls(ranks_of(images, texts, image_of))
    assert scores == pytest.approx(brute_recalls(images, texts, image_of), abs=1e-9)
    assert 5 < scores["i2t_R@1"] < 100


@pytest.mark.parametrize("per_image", [1, 5])
def test_a_collapsed_model_scores_at_chance(per_image):
    n = 40
    images = torch.ones(n, 8) / 8**0.5
    image_of = torch.arange(n).repeat_interleave(per_image)
    scores = recalls(ranks_of(images, images[image_of], image_of))
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


COCO, ARGS = (parsed("clip", dataset=name, eval_batch_size=4, num_workers=0, device="cpu")
              for name in ("coco", None))
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
    """MSCOCO's five folds come from the same pass."""
    model, pairs = example()
    images, texts = F.normalize(model.images, dim=1), F.normalize(model.texts, dim=1)
    features = images, texts[pairs.text_of], torch.from_numpy(pairs.image_of)
    scores = evaluate(model, pairs, ARGS, FP32)
    assert scores == pytest.approx(brute_recalls(*features), abs=1e-9)
    assert model.encoded == {"images": 11, "texts": len(model.texts)}
    rows, _ = evaluate_test(model, pairs, COCO, FP32)
    assert model.encoded == {"images": 22, "texts": 2 * len(model.texts)}
    assert rows == {"5K": scores, "1K": fold_recalls(*features, 5)}


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


# ---- measures of weights -------------------------------------------------------------------------


def test_measures_count_pairs_in_the_wrong_order():
    wrong = np.array([True, False, True, False, False])
    suspicion = np.array([5.0, 4.0, 3.0, 2.0, 1.0])  # 5 of 6 (wrong, right) pairs are in order
    measures = noise_measures(suspicion, wrong)
    assert measures["auc"] == pytest.approx(5 / 6)
    assert measures["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert measures["mean_noise_rank"] == pytest.approx((5 + 3) / 2)
    assert measures["optimum"] == pytest.approx((5 + 4) / 2)
    assert measures["chance"] == 3


def test_equal_suspicion_is_chance():
    measures = noise_measures(np.zeros(6), np.arange(6) < 2)
    assert measures["auc"] == 0.5
    assert measures["mean_noise_rank"] == measures["chance"] == 3.5


@pytest.mark.parametrize("wrong", [np.zeros(3, bool), np.ones(3, bool)])
def test_one_kind_of_pairs_has_no_measure(wrong):
    assert noise_measures(np.arange(3.0), wrong) is None


def test_tensorboard_gets_histograms_auc_and_the_lowest_pairs(tmp_path):
    wrong = np.arange(30) % 3 == 0
    w = np.where(wrong, 0.2, 0.9) + np.arange(30) / 1000
    w[5] = np.nan  # a pair that was not drawn
    pairs = pairs_for(range(30), range(30))
    pairs.wrong = wrong
    writer = SummaryWriter(tmp_path)
    show_weights(writer, 1, w, pairs)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert set(tags["histograms"]) == {"w/all", "w/truly_clean", "w/truly_noisy"}
    assert tags["images"] == ["w/lowest"]
    assert events.Scalars("noise/auc_of_w")[0].value == 1
    assert events.Histograms("w/all")[0].histogram_value.num == 29
    assert events.Histograms("w/truly_noisy")[0].histogram_value.num == 10


def test_pictures_stand_in_rows_and_marked_words_are_red():
    images = [torch.full((3, 8, 8), 8 * k, dtype=torch.uint8) for k in range(6)]
    figure = pictures(images, [f"$x^{k}$" for k in range(6)], np.arange(6) == 1)
    for k, axis in enumerate(figure.axes):
        assert (axis.images[0].get_array() == 8 * k).all()
        assert axis.get_title() == f"$x^{k}$" and not axis.title.get_parse_math()
        assert axis.title.get_color() == ("firebrick" if k == 1 else "black")
        spec = axis.get_subplotspec()
        assert (spec.rowspan.start, spec.colspan.start) == divmod(k, 5)
