"""Which pairs a person found right or wrong: the file of these decisions, and what follows of it.

A table with the columns `COLUMNS`, of which the page's decisions.csv has no others and
suspicious_pairs.csv some more. A spreadsheet may have saved it its own way. `pair` is the key;
image and caption are checked against the data.
`stratum` and `stratum_size` are there for the pairs of the random sample (utils.cleaning.survey).
"""

from typing import NamedTuple

import numpy as np

from utils.cleaning.survey import Estimate, estimate
from utils.cleaning.tables import read_rows
from utils.cleaning.text import markdown, text_cell
from utils.errors import InputError

COLUMNS = ("pair", "image", "caption", "stratum", "stratum_size", "decision")
ANSWERS = {"wrong": 1, "right": -1, "skip": 0, "": 0}
NAMES = {1: "wrong", -1: "right", 0: ""}


class Labels(NamedTuple):
    """answer (n,) of each pair: 1 wrong, -1 right, 0 unknown. sample: {pair: (stratum, its pairs)}
    in the order in which they were drawn."""

    answer: np.ndarray
    sample: dict


def cells(pairs, i):
    """File name and caption of pair i as cells of a CSV file."""
    return text_cell(pairs.images.names[pairs.image_of[i]]), text_cell(pairs.captions[i])


def read_labels(path, pairs):
    """`Labels` of a file, of nothing where `path` is None. Raises InputError when it is broken or
    speaks of other pairs."""
    labels = Labels(np.zeros(len(pairs), np.int8), {})
    advice = "give the decisions.csv that the page of suspicious pairs saves"
    for line, row in enumerate(read_rows(path, COLUMNS, advice) if path else (), 2):
        where = f"{path}, line {line}"
        if isinstance(row, str):
            raise InputError(f"{where}: {row}; {advice}")
        read_row({name: "" if value is None else str(value) for name, value in row.items()}, where,
                 pairs, labels)
    return labels


def read_row(row, where, pairs, labels):
    """Add a row of the file to `labels`."""
    number = {name: int(row[name]) if row[name].isdecimal() and len(row[name]) < 20 else None
              for name in ("pair", "stratum", "stratum_size")}
    i, size = number["pair"], number["stratum_size"]
    if i is None or i >= len(pairs) or (row["image"], row["caption"]) != cells(pairs, i):
        raise InputError(f"{where}: pair {row['pair'][:20]} is not this one in {pairs.source}; the "
                         "labels belong to another data set or noise ratio, or were changed by a "
                         "spreadsheet, which should save them as CSV")
    decision = row["decision"].strip().lower()
    if decision not in ANSWERS:
        raise InputError(f"{where}: the decision is '{decision}', not right, wrong or skip")
    if ANSWERS[decision]:
        if labels.answer[i] == -ANSWERS[decision]:
            raise InputError(f"{where}: pair {i} is said to be right and to be wrong")
        labels.answer[i] = ANSWERS[decision]
    if number["stratum"] is not None:
        if size is None or not 0 < size <= len(pairs):
            raise InputError(f"{where}: the stratum_size is '{row['stratum_size']}', not a number "
                             f"from 1 to {len(pairs)}")
        labels.sample[i] = number["stratum"], size


def label_findings(labels, posterior, keep_above, wanted):
    """(lines, table): what the answers on the sample say of all pairs, as lines of text and as a
    Markdown table of thresholds, from which on a pair's posterior of being clean keeps it.

    posterior (n,); keep_above: a threshold that the table shall have; wanted: the precision for
    which one is proposed.
    """
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
        lines.append(f"It and what follows speak of {covered} of the {len(posterior)} pairs: the "
                     "others are of strata without an answer, or have no score.")
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
    return lines, markdown(["--keep_above", "pairs kept", "precision: right among the kept",
                            "recall: kept among the right"],
                           [[f"{t:g}", str(n), str(p), str(r)] for t, n, p, r in rows])
