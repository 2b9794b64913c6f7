"""Features that need not fit in memory, and the search for the most similar ones, in blocks."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.progress import progress

QUERIES, KEYS = 4096, 4096  # of a block of similarities: 64 MiB in fp32


class Features:
    """Features (n, D) of which only the rows in use are held.

    features: any float dtype, a tensor, one that is mapped from a file, or other `Features`. A
    slice or an int64 tensor as index gives these rows on the device, in `dtype` (fp32, or float64
    where the features are): of those that are `chosen` (n,) int64 where given, less `centre` (D,)
    where given, at length 1 with `normalise`.
    """

    def __init__(self, features, chosen=None, centre=None, normalise=False, dtype=None):
        self.features, self.chosen = features, chosen
        self.centre, self.normalise = centre, normalise
        self.device = features.device
        self.dtype = dtype or torch.promote_types(features.dtype, torch.float32)
        self.shape = (len(features if chosen is None else chosen), features.shape[1])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if self.chosen is not None:
            index = self.chosen[index]
        rows = self.features[index].to(self.dtype)
        if self.centre is not None:
            rows = rows - self.centre
        return F.normalize(rows, dim=1) if self.normalise else rows


def normalised(features):
    """`Features` (n, D) at length 1."""
    return Features(features, normalise=True)


def random_rows(n, most, seed):
    """Rows (min(n, most),) int64 of n by chance, ascending; all where `most` is None."""
    if most is None or most >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, n]).choice(n, most, replace=False))


def nearest(queries, keys, k=1, without=None, title="nearest"):
    """(similarity (q, k), row (q, k) int64) of the k keys with the largest dot product with each
    query, the best first, the lowest row of equals.

    queries (q, D), keys (m, D): tensors or `Features`. without: (q,) int64, the key that a query
    must not find, -1 for none. k is at most the number of keys that every query may find. The time
    is that of 2 q m D floating-point operations.
    """
    device, total = queries.device, len(keys)
    k = min(k, total - (without is not None))
    similarity = torch.empty(len(queries), k, dtype=queries.dtype, device=device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=device)
    if k == 0:  # of one key, which the queries must not find
        return similarity, found
    room = torch.empty(min(QUERIES, len(queries)) * min(KEYS, total), dtype=queries.dtype,
                       device=device)  # fresh memory for each block would cost a tenth of the time
    with progress(total=len(queries) * total, desc=title, unit="", unit_scale=True,
                  leave=False) as bar:
        for first in range(0, len(queries), QUERIES):
            block = queries[first : first + QUERIES]
            best = similarity[first : first + QUERIES].fill_(-torch.inf)
            row = found[first : first + QUERIES].zero_()
            for start in range(0, total, KEYS):
                some = keys[start : start + KEYS]
                scores = room[: len(block) * len(some)].view(len(block), len(some))
                torch.mm(block, some.T, out=scores)
                if without is not None:
                    own = without[first : first + QUERIES] - start
                    here = ((own >= 0) & (own < len(some))).nonzero()[:, 0]
                    scores[here, own[here]] = -torch.inf
                better = (scores.amax(dim=1) > best[:, -1]).nonzero()[:, 0]  # few, after a while
                values, columns = largest(scores[better], k)
                values, order = torch.cat([best[better], values], dim=1).sort(
                    dim=1, descending=True, stable=True)
                columns = torch.cat([row[better], columns + start], dim=1)
                best[better], row[better] = values[:, :k], columns.gather(1, order[:, :k])
                bar.update(scores.numel())
    return similarity, found


def largest(scores, k):
    """(value, column) (b, up to k) of the largest of scores (b, w), descending, the lowest column
    of equals."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    equal = (values[:, 1:] == values[:, :-1]).any(dim=1)
    if equal.any():  # of which topk takes any
        sort = scores[equal].sort(dim=1, descending=True, stable=True)
        values[equal], columns[equal] = (x[:, : values.shape[1]] for x in sort)
    return values[:, :k], columns[:, :k]
