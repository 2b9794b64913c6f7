"""What the labels of a few pairs say of all pairs: a sample in strata, and estimates from it."""

from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

SAMPLE, STRATA = 100, 10  # pairs, in strata of equal size over their order


class Estimate(NamedTuple):
    """An estimated share with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        if np.isnan(self.value):
            return "unknown"
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f} %)"


def draw_sample(order, seed):
    """Draw `SAMPLE` of the pairs order (n,), sorted by score, the same number in each of `STRATA`
    strata: {pair: (stratum from 1, pairs in that stratum)}. Strata take turns: a person who stops
    early has seen pairs of all of them."""
    rng = np.random.default_rng(seed)
    strata = np.array_split(order, min(STRATA, len(order)))
    drawn = [[(int(i), (h, len(stratum))) for i in rng.permutation(stratum)[: SAMPLE // STRATA]]
             for h, stratum in enumerate(strata, 1)]
    return dict(entry for turn in zip_longest(*drawn) for entry in turn if entry)


def estimate(hits, among, stratum, size):
    """`Estimate` of the share of hits among some pairs of a population, from k pairs of a sample.

    hits, among: (k,) bool, where hits are a subset of among; stratum (k,) int; size (k,) int, the
    number of pairs of the population in that stratum. If no pair of the sample is `among`, the
    share is NaN and its interval from 0 to 1.

    The share is the ratio of two stratified totals, and its variance that of the linearised ratio
    (Cochran 1977, 6.11). For the variance each stratum gets one more pair, whose deviation is the
    mean one: a few answers that agree do not prove that a stratum is pure. The interval is Clopper
    and Pearson's for as many simple random draws as have this variance (Korn and Graubard 1998).
    """
    _, first, h = np.unique(stratum, return_index=True, return_inverse=True)
    size, answers = size[first].astype(float), np.bincount(h)  # of each stratum
    weight = (size / answers)[h]
    total = weight @ among
    if total == 0:
        return Estimate(np.nan, 0.0, 1.0)
    share = weight @ hits / total
    if (answers == size).all():  # the whole population is known
        return Estimate(share, share, share)
    deviation = hits - share * among
    squares = np.bincount(h, deviation**2) - np.bincount(h, deviation) ** 2 / answers
    variance = (size * (size - answers) * (squares + np.mean(deviation**2)) / answers**2).sum()
    n = share * (1 - share) * total**2 / variance if variance > 0 else among.sum()
    low, high = beta.ppf(0.025, share * n, n - share * n + 1), beta.ppf(
        0.975, share * n + 1, n - share * n)
    return Estimate(share, np.nan_to_num(low, nan=0.0), np.nan_to_num(high, nan=1.0))
