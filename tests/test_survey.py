"""Estimates from labelled samples against closed forms, and against populations that are known."""

from collections import Counter

import numpy as np
import pytest
from scipy.special import betainc
from scipy.stats import binomtest

from utils.cleaning.survey import Estimate, draw_sample, estimate


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
