"""Recall at K between images and captions."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.errors import InputError
from utils.method.features import embed_pairs

KS = (1, 5, 10)
RESAMPLES = 2000  # of the bootstrap
BLOCK = 2**24  # scores that are held at a time: 64 MiB in fp32


def best_ranks(queries, gallery, query_group, gallery_group):
    """Rank (0-based) of each query's best correct item: shape (q,), int64.

    queries (q, D), gallery (g, D): features whose dot product is the score. Item j is correct for
    query i when query_group[i] == gallery_group[j], (q,) and (g,) int64. Equal scores rank by
    index: a model that scores everything alike is at chance. Higher scores are counted, in blocks
    of queries; nothing is sorted.
    """
    sorted_group, order = gallery_group.sort(stable=True)
    start = torch.searchsorted(sorted_group, query_group)  # (q,)
    count = torch.searchsorted(sorted_group, query_group, right=True) - start
    nth = torch.arange(max(1, int(count.max())), device=queries.device)
    valid = nth < count[:, None]  # (q, most correct items of a query)
    correct = order[(start[:, None] + nth).clamp(max=len(gallery) - 1)]

    ranks = torch.empty_like(start)
    position = torch.arange(len(gallery), device=queries.device)
    for rows in torch.arange(len(queries), device=queries.device).split(
            max(1, BLOCK // len(gallery))):
        scores = queries[rows] @ gallery.T  # (b, g)
        own = scores.gather(1, correct[rows]).masked_fill(~valid[rows], -torch.inf)
        best = own.amax(dim=1, keepdim=True)  # (b, 1)
        ahead = (scores > best).sum(dim=1, dtype=torch.int32)  # int64 takes twice as long
        if ((scores >= best).sum(dim=1, dtype=torch.int32) > ahead + 1).any():
            first = correct[rows].masked_fill(own < best, len(gallery)).amin(dim=1, keepdim=True)
            ahead += ((scores == best) & (position < first)).sum(dim=1)
        ranks[rows] = ahead.long()
    return ranks


def ranks_of(image_features, text_features, image_of):
    """{"i2t": (n,), "t2i": (t,)} int64: the rank (0-based) of the best correct item of each query,
    for captions (t, D) of images (n, D). image_of: (t,) int64, the image of each caption."""
    images = torch.arange(len(image_features), device=image_features.device)
    return {"i2t": best_ranks(image_features, text_features, images, image_of),
            "t2i": best_ranks(text_features, image_features, image_of, images)}


def recalls(ranks):
    """Recall at 1, 5 and 10 in percent, both ways, from `ranks_of`; i2t counts a hit if any of the
    image's captions is in the top K. Also `mean_R1`, the mean of both R@1, and `rsum`, the sum of
    the six."""
    scores = {f"{way}_R@{k}": 100 * (ranks[way] < k).double().mean().item()
              for way in ranks for k in KS}
    return {**scores, "mean_R1": (scores["i2t_R@1"] + scores["t2i_R@1"]) / 2,
            "rsum": sum(scores.values())}


def intervals(ranks, image_of, seed=0):
    """95 % intervals {name: [low, high]} of i2t R@1, t2i R@1 and their mean, by bootstrap: images
    are drawn with replacement, each with its captions, `RESAMPLES` times."""
    image_of, (i2t, t2i) = image_of.cpu(), ((ranks[way] < 1).double().cpu() for way in ranks)
    n = len(i2t)
    captions = torch.zeros(n, dtype=torch.double).index_add_(0, image_of, torch.ones_like(t2i))
    hits = torch.zeros(n, dtype=torch.double).index_add_(0, image_of, t2i)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    drawn = torch.from_numpy(drawn).double()  # how often each image occurs
    found = {"i2t_R@1": 100 * drawn @ i2t / n, "t2i_R@1": 100 * drawn @ hits / (drawn @ captions)}
    found["mean_R1"] = (found["i2t_R@1"] + found["t2i_R@1"]) / 2
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.double)
    return {name: values.quantile(quantiles).tolist() for name, values in found.items()}


def fold_recalls(image_features, text_features, image_of, folds=5):
    """Mean `recalls` over consecutive folds of the images: MSCOCO 1K is five folds of 1,000."""
    results = []
    for rows in torch.arange(len(image_features), device=image_of.device).tensor_split(folds):
        own = (image_of >= rows[0]) & (image_of <= rows[-1])
        results.append(recalls(ranks_of(image_features[rows], text_features[own],
                                        image_of[own] - rows[0])))
    return {key: float(np.mean([scores[key] for scores in results])) for key in results[0]}


def evaluate(model, pairs, args, precision):
    """`recalls` of `model` on a retrieval split."""
    return recalls(ranks_of(*_features(model, pairs, args, precision)))


def evaluate_test(model, pairs, args, precision):
    """({row of the table: scores}, `intervals`) of `model` on the test split, from one pass of the
    model. coco has the rows "5K", all images, and "1K", the mean of five folds; other data sets
    have the row "test"."""
    if args.dataset == "coco" and len(pairs.images) < 5:
        raise InputError(f"{pairs.source} has captions of {len(pairs.images)} images; MSCOCO's 1K "
                         "scores need at least one image in each of five folds")
    features = _features(model, pairs, args, precision)
    ranks = ranks_of(*features)
    rows = ({"5K": recalls(ranks), "1K": fold_recalls(*features)} if args.dataset == "coco"
            else {"test": recalls(ranks)})
    return rows, intervals(ranks, features[-1])


def _features(model, pairs, args, precision):
    images, texts = (F.normalize(x, dim=1) for x in embed_pairs(model, pairs, args, precision))
    text_of = torch.from_numpy(pairs.text_of).to(texts.device)
    return images, texts[text_of], torch.from_numpy(pairs.image_of).to(texts.device)
