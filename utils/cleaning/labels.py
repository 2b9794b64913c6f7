"""A person's decisions on pairs, right or wrong: their file, and what follows from them.

The file is a table with the columns `COLUMNS`: the page's decisions.csv, or suspicious_pairs.csv
with its further columns. A spreadsheet may have saved it in its own dialect. `pair` is the key;
image and caption are checked against the data. Pairs of the random sample have a `stratum` and a
`stratum_size`; what their labels say of all pairs is an `Estimate`.
"""

from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

from utils.cleaning.tables import read_rows
from utils.errors import InputError

SAMPLE, STRATA = 100, 10  # pairs, in strata of equal size over their order

COLUMNS = ("pair", "image", "caption", "stratum", "stratum_size", "decision")
ANSWERS = {"wrong": 1, "right": -1, "skip": 0, "": 0}
NAMES = {1: "wrong", -1: "right", 0: ""}


class Labels(NamedTuple):
    """answer (n,) of each pair: 1 wrong, -1 right, 0 unknown. sample: {pair: (stratum, number of
    pairs in it)} in the order of the draw."""

    answer: np.ndarray
    sample: dict


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


def text_cell(text):
    """A text as a cell of a CSV file. A text that a spreadsheet would run as a formula gets an
    apostrophe in front, which makes it text."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def cells(pairs, i):
    """File name and caption of pair i as cells of a CSV file."""
    return text_cell(pairs.images.names[pairs.image_of[i]]), text_cell(pairs.captions[i])


def read_labels(path, pairs):
    """`Labels` of a file; empty ones if `path` is None. Raises InputError when the file is broken
    or is about other pairs."""
    labels = Labels(np.zeros(len(pairs), np.int8), {})
    advice = "give the decisions.csv that the page of suspicious pairs saves"
    for line, row in enumerate(read_rows(path, COLUMNS, advice) if path else (), 2):
        where = f"{path}, line {line}"
        if isinstance(row, str):
            raise InputError(f"{where}: {row}; {advice}")
        pair, image, caption, stratum, size, decision = (
            "" if value is None else str(value) for value in row.values())
        i = natural(pair)
        if i is None or i >= len(pairs) or (image, caption) != cells(pairs, i):
            raise InputError(f"{where}: {pairs.source} has no pair {pair[:20]} of this image and "
                             "caption; the labels belong to another data set or noise ratio, or a "
                             "spreadsheet changed them; save them as CSV")
        answer = ANSWERS.get(decision.strip().lower())
        if answer is None:
            raise InputError(f"{where}: the decision is '{decision}', not right, wrong or skip")
        if answer and labels.answer[i] == -answer:
            raise InputError(f"{where}: pair {i} has the decisions right and wrong; keep one")
        labels.answer[i] = answer or labels.answer[i]
        if stratum:
            labels.sample[i] = natural(stratum), natural(size)
            if None in labels.sample[i] or not 0 < natural(size) <= len(pairs):
                raise InputError(f"{where}: the stratum_size is '{size}', not a number from 1 to "
                                 f"{len(pairs)}")
    if path and not labels.answer.any() and not labels.sample:
        raise InputError(f"{path} holds no decision; {advice}")
    return labels


def natural(text):
    """The whole number that a text spells in digits, or None."""
    return int(text) if text.isdecimal() and len(text) < 20 else None


def label_findings(labels, posterior, keep_above, wanted):
    """What the answers on the sample say of all pairs: (lines of text, Markdown table). A row of
    the table is a threshold on the posterior of being clean, from which on a pair is kept.

    posterior (n,). keep_above: a threshold that is in the table. wanted: the precision for which a
    threshold is proposed.
    """
    from tabulate import tabulate  # only labels need it

    drawn = np.array(list(labels.sample), int)
    known = drawn[labels.answer[drawn] != 0]
    others = np.count_nonzero(labels.answer) - len(known)
    lines = [f"Labels: {len(known)} of the {len(drawn)} pairs of the random sample and {others} "
             "others."]
    if not len(known):
        return [*lines, "Label pairs of the random sample for an estimate of the noise share."], ""
    stratum, size = np.array([labels.sample[i] for i in known.tolist()]).T
    wrong = labels.answer[known] == 1

    def share(hits, among):
        return estimate(hits, among, stratum, size)

    lines.append(f"Noise share by the labels: {share(wrong, np.ones(len(known), bool))}, a "
                 "stratified estimate with its 95 % interval (Clopper and Pearson's, at the "
                 "effective sample size).")
    covered = size[np.unique(stratum, return_index=True)[1]].sum()
    if covered < len(posterior):
        lines.append(f"These estimates are for {covered} of the {len(posterior)} pairs: the others "
                     "have no score, or no pair of their stratum has an answer.")
    quantiles = np.quantile(posterior, np.arange(0.05, 1, 0.05))
    quantiles = np.minimum(np.floor(quantiles * 1e6) / 1e6, 1 - 1e-6)  # what the option can say
    rows = []
    for threshold in sorted({0.0, keep_above, *quantiles.tolist()}):
        kept = posterior >= threshold
        k = kept[known]
        recall = Estimate(1, 1, 1) if kept.all() else share(~wrong & k, ~wrong)
        rows.append((threshold, kept.sum(), share(~wrong & k, k), recall))
    found = [row for row in rows if row[2].value >= wanted]
    if found:
        threshold, n, precision, recall = found[0]
        lines.append(f"--keep_above {threshold:g} is the lowest threshold with an estimated "
                     f"precision of {100 * wanted:g} %: of the {n} pairs that it keeps {precision} "
                     f"are right, and they are {recall} of all right ones.")
    else:
        lines.append(f"No threshold reaches a precision of {100 * wanted:g} %.")
    return lines, tabulate(rows, ["--keep_above", "pairs kept", "precision: right among the kept",
                                  "recall: kept among the right"], "pipe")


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
