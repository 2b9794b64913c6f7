"""Which pairs are clean.

The paper's judge: the loss of each pair under the initial model, a mixture of two Gaussians on the
losses, the posterior of the low one. Ours, `--judge_rounds` and `--judge_neighbours`, differs in
three points (docs/finding_noise.md has the measurements):

- Rounds. The initial model does not know the domain yet. A copy of it takes a few steps on the
  strict clean set and judges again, then a fresh copy on that one's set.
- Neighbours (after LEMoN, Zhang et al. 2025), before the first round: a pair's caption should
  resemble the captions of the images most like its own, and its image the images of the captions
  most like its own.
- Mismatches. What wrong pairs look like need not be guessed: each image with the caption of
  another one is a wrong pair. From the scores of such mismatches and of the pairs follow the share
  of wrong pairs (Storey 2002) and the posterior (one minus the local false discovery rate of Efron
  et al. 2001), without any assumption on the shape of either.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import InputError
from utils.method.losses import pair_losses
from utils.method.neighbours import Features, nearest, normalised, random_rows
from utils.method.recipes import RECIPES

DRAWS = 4  # of random batches, over which a loss is averaged
MISMATCHES = 4  # other captions that each image is tried with
AGREEMENT = 0.375  # what the agreement of neighbours counts beside the loss, in standard scores
ROWS, BLOCK = 2**14, 2**25  # rows, and numbers, that are held at a time


class Verdict(NamedTuple):
    """What is known of n pairs. score: what ranks them, a high one is suspicious; loss: in a batch
    of others; posterior of being clean (all float64); clean (bool): the strict clean set; cosine
    (float32); wrong_share: estimated share of wrong pairs. components: (weight, mean, variance) of
    the paper's mixture, the low one first, or None; mismatches: (m,) scores of wrong pairs that
    were made, or None."""

    score: np.ndarray
    loss: np.ndarray
    posterior: np.ndarray
    clean: np.ndarray
    cosine: np.ndarray
    wrong_share: float
    components: list | None = None
    mismatches: np.ndarray | None = None


def verdict_on(features, logit_scale, pairs, args, number=0):
    """`Verdict` on `pairs` from the features, tensors or `Features`, of their distinct images (u,
    D) and captions (v, D) and the log temperature, after round `number`. Without rounds and
    neighbours it is the paper's. Raises InputError when losses are not finite."""
    images, texts = map(normalised, features)
    n, device = len(pairs), images.device
    if n < 2:
        raise InputError(f"{pairs.source} has {n} pair; a memory bank needs at least two")
    image_of = torch.from_numpy(pairs.image_of).to(device)
    text_of = torch.from_numpy(pairs.text_of).to(device)
    logit_scale = logit_scale.detach().to(images.dtype)
    data = images, texts, image_of, text_of, logit_scale
    rng = np.random.default_rng([args.seed, number] if number else args.seed)
    as_paper = not (args.judge_rounds or args.judge_neighbours)
    components = mismatches = None
    if as_paper:
        in_order = not RECIPES[args.recipe].random_bank_batches
        loss = losses_in_batches(*data, draw_batches(n, args.batch_size, None if in_order else rng))
        score = loss
    else:
        others = [torch.from_numpy(mismatched(pairs.image_of, rng)) for _ in range(MISMATCHES)]
        other_texts = [text_of[other.to(device)] for other in others]
        draws = [draw_batches(n, args.batch_size, rng) for _ in range(DRAWS)]
        loss = mean(losses_in_batches(*data, draw) for draw in draws)
        mismatches = mean(losses_if(*data, draw, other_texts) for draw in draws)
        score = loss
        if args.judge_neighbours and not number:
            agreements = Agreements(images, texts, pairs, args.judge_neighbours,
                                    args.search_among, args.seed)
            own = loss, *agreements(text_of)
            score = combined(own, own)
            mismatches = [combined((other_loss, *agreements(other)), own)
                          for other_loss, other in zip(mismatches, other_texts, strict=True)]
        mismatches = torch.cat(list(mismatches)).double().cpu().numpy()
    loss, score = loss.double().cpu().numpy(), score.double().cpu().numpy()
    if not np.isfinite(loss).all():
        raise InputError(f"the model's losses are not finite; its logit_scale is "
                         f"{logit_scale.item():.4g}, a log temperature of at most ln 100 is usual")
    if as_paper:
        posterior, components = mixture_posterior(score, args.seed)
        wrong_share = 1 - posterior.mean()
    else:
        posterior, wrong_share = posterior_by_mismatches(score, mismatches)
    clean = strict_clean_set(posterior, score, args.clean_threshold, args.min_clean)
    cosine = torch.cat([(images[i] * texts[t]).sum(1) for i, t in
                        zip(image_of.split(ROWS), text_of.split(ROWS), strict=True)])
    return Verdict(score, loss, posterior, clean, cosine.float().cpu().numpy(), float(wrong_share),
                   components, mismatches)


def mean(tensors):
    """Mean of several tensors of one shape."""
    return torch.stack(list(tensors)).mean(dim=0)


# ---- the loss of a pair in a batch ---------------------------------------------------------------


def draw_batches(n, batch_size, rng):
    """0..n-1 in batches (int64 tensors), random and of nearly equal size, as small ones have low
    losses; without `rng` in order, the last one being what is left."""
    if rng is None:
        return torch.arange(n).split(batch_size)
    return torch.from_numpy(rng.permutation(n)).tensor_split(-(-n // batch_size))


def losses_in_batches(images, texts, image_of, text_of, logit_scale, batches):
    """Loss of each pair (n,) against the others of its batch. `batches`: int64 tensors of pairs
    that cover 0..n-1; features are L2-normalised, rows given by image_of and text_of (n,)."""
    losses = torch.empty(len(image_of), dtype=images.dtype, device=images.device)
    for batch in tqdm(batches, desc="losses", unit="batch", disable=None, leave=False):
        batch = batch.to(losses.device)
        losses[batch] = pair_losses(images[image_of[batch]], texts[text_of[batch]], logit_scale)
    return losses


def losses_if(images, texts, image_of, text_of, logit_scale, batches, other_of):
    """Loss (m, n) that each pair would have in its batch if its caption were one of the m other_of
    (n,) instead of text_of, with all other pairs as they are."""
    losses = torch.empty(len(other_of), len(image_of), dtype=images.dtype, device=images.device)
    for batch in tqdm(batches, desc="losses of mismatches", unit="batch", disable=None,
                      leave=False):
        batch = batch.to(losses.device)
        scaled = logit_scale.exp() * images[image_of[batch]]
        logits = scaled @ texts[text_of[batch]].T  # (b, b)
        rest = logits.fill_diagonal_(-torch.inf).logsumexp(dim=1)
        for loss, other in zip(losses, other_of, strict=True):
            if_other = scaled @ texts[other[batch]].T
            own = if_other.diagonal()
            loss[batch] = (torch.logaddexp(rest, own) + if_other.logsumexp(dim=0)) / 2 - own
    return losses


def mismatched(image_of, rng):
    """(n,) int64: a random permutation of the pairs that brings each image (n,) a caption which
    stands beside another image, where there is one."""
    other = rng.permutation(len(image_of))
    for _ in range(20):  # chance leaves few, which swap with anyone
        for i in np.flatnonzero(image_of[other] == image_of):
            j = rng.integers(len(other))
            other[i], other[j] = other[j], other[i]
    return other


# ---- neighbours ----------------------------------------------------------------------------------


class Agreements:
    """How well captions agree with the neighbours of their images, and images with those of their
    captions, by centred features. The k neighbours of an item are looked for among `most` random
    ones, drawn by `seed`, or among all."""

    def __init__(self, images, texts, pairs, k, most=None, seed=0):
        self.image_of, text_of = (torch.from_numpy(x).to(images.device)
                                  for x in (pairs.image_of, pairs.text_of))
        images, texts = centred(images, self.image_of), centred(texts, text_of)
        among = k, most, seed
        self.by_image = Neighbours(images, texts, self.image_of, text_of, *among, "image")
        self.by_text = Neighbours(texts, images, text_of, self.image_of, *among, "caption")

    def __call__(self, text_of):
        """(agreement of captions (n,), agreement of images (n,)) of the pairs' images with the
        captions text_of (n,); NaN where no neighbour is left."""
        return (self.by_image.agreement(self.image_of, text_of),
                self.by_text.agreement(text_of, self.image_of))


class Neighbours:
    """The k nearest neighbours of each item (image or caption) among some of the others, and with
    what these are paired. item_of, partner_of: (n,) int64, of each pair."""

    def __init__(self, items, partners, item_of, partner_of, k, most, seed, title):
        self.partners = partners
        self.some = torch.from_numpy(random_rows(len(items), most, seed)).to(item_of.device)
        self.cosine, self.near = nearest_others(items, k, self.some, f"{title} neighbours")
        # of each of `some` the sum of the features of its partners, and their number
        self.total = torch.zeros(len(self.some), partners.shape[1], dtype=partners.dtype,
                                 device=item_of.device)
        self.count = torch.zeros_like(self.some)
        for item, partner in zip(item_of.split(ROWS), partner_of.split(ROWS), strict=True):
            at, here = position_among(self.some, item)
            self.total.index_add_(0, at[here], partners[partner[here]])
            self.count.index_add_(0, at[here], torch.ones_like(at[here]))
        # how often each item stands beside each partner
        self.keys, self.times = (item_of * len(partners) + partner_of).unique(return_counts=True)

    def agreement(self, item_of, partner_of):
        """Mean cosine (n,) of partners with the partners of their items' neighbours, weighted by
        the neighbours' similarity. Partners that are the very same do not count."""
        found = []
        size = BLOCK // max(1, self.near.shape[1] * self.partners.shape[1]) or 1
        blocks = zip(item_of.split(size), partner_of.split(size), strict=True)
        for item, partner in tqdm(blocks, desc="agreement", total=-(-len(item_of) // size),
                                  unit="block", disable=None, leave=False):
            near = self.near[item]  # (b, k)
            same = self.together(self.some[near], partner[:, None])
            left = self.count[near] - same
            dots = torch.einsum("bd,bkd->bk", self.partners[partner], self.total[near]) - same
            weight = self.cosine[item].clamp(min=0) * (left > 0)
            found.append((weight * dots / left.clamp(min=1)).sum(dim=1) / weight.sum(dim=1))
        return torch.cat(found)

    def together(self, item, partner):
        """How often items stand beside partners, two int64 tensors that broadcast."""
        at, here = position_among(self.keys, item * len(self.partners) + partner)
        return torch.where(here, self.times[at], 0)


def centred(features, item_of):
    """`Features` (items, D) less their mean over the pairs, whose items are item_of (n,), at length
    1."""
    total = sum(features[rows].sum(dim=0) for rows in item_of.split(ROWS))
    return Features(features, centre=total / len(item_of), normalise=True)


def position_among(items, wanted):
    """(place of the wanted items among items (m,), ascending, whether they are there): int64 and
    bool, of the shape of `wanted`."""
    at = torch.searchsorted(items, wanted).clamp(max=len(items) - 1)
    return at, items[at] == wanted


def nearest_others(features, k, items, title):
    """(cosine (q, k), place (q, k) int32 among the items) of the k of the items (m,), ascending,
    that are most similar to each row of features (q, D), itself left out."""
    at, here = position_among(items, torch.arange(len(features), device=items.device))
    own = torch.where(here, at, -1)
    cosine, found = nearest(features, Features(features, chosen=items), k, own, title)
    return cosine, found.int()


def combined(values, of):
    """Score (n,) from the loss and both agreements that are `values`, each as standard scores by
    mean and deviation of those `of` the pairs."""
    loss, *agreements = map(standard_scores, values, of)
    return loss - AGREEMENT * sum(agreements)


def standard_scores(values, of):
    """How many standard deviations of `of` (m,) each of the values (n,) is from its mean; 0 for NaN
    and where `of` has fewer than two numbers beside NaN."""
    known = of[~of.isnan()]
    if len(known) < 2:
        return torch.zeros_like(values)
    return ((values - known.mean()) / known.std().clamp(min=1e-12)).nan_to_num(0.0)


# ---- the posterior and the strict clean set ------------------------------------------------------


def mixture_posterior(losses, seed):
    """Posterior (n,) of the low-mean component of a two-component mixture on losses (n,), and its
    components (weight, mean, variance), the low one first."""
    from sklearn.mixture import GaussianMixture  # a second to import, which a found bank spares

    gmm = GaussianMixture(n_components=2, max_iter=100, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # identical losses: both components coincide, which is said
        posterior = gmm.fit(losses[:, None]).predict_proba(losses[:, None])
    components = zip(gmm.weights_.tolist(), gmm.means_.ravel().tolist(),
                     gmm.covariances_.ravel().tolist(), strict=True)
    return posterior[:, gmm.means_.argmin()], sorted(components, key=lambda c: c[1])


def posterior_by_mismatches(scores, mismatches):
    """(posterior (n,) of being clean, estimated share of wrong pairs) by scores (n,) of the pairs
    and those (m,) of wrong pairs.

    The share is that of pairs above the median mismatch, doubled: right pairs hardly come there.
    The posterior is 1 - share f_wrong / f; the ratio of both densities is monotone in the score and
    comes from the isotonic regression of "is a pair, no mismatch".
    """
    from sklearn.isotonic import IsotonicRegression

    share = min(1.0, 2 * (scores > np.median(mismatches)).mean())
    weight = np.repeat([1.0, len(scores) / len(mismatches)], [len(scores), len(mismatches)])
    is_pair = np.repeat([1.0, 0.0], [len(scores), len(mismatches)])
    fit = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(
        np.concatenate([scores, mismatches]), is_pair, weight)
    is_pair = fit.predict(scores).clip(1e-12)
    return 1 - (share * (1 - is_pair) / is_pair).clip(0, 1), share


def separation(verdict):
    """How well the scores of a verdict tell its pairs, some of which are wrong, from its
    mismatches: the area under the ROC curve, which grows with that for the wrong pairs."""
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([verdict.score, verdict.mismatches])
    is_pair = np.arange(len(scores)) < len(verdict.score)
    return roc_auc_score(is_pair, -scores)


def strict_clean_set(posterior, scores, threshold, min_share):
    """(n,) bool: pairs with posterior > threshold. Where these are fewer than min_share of all
    (at least 2), the set is the pairs of smallest score, that many; ties go to the lower index."""
    clean = posterior > threshold
    least = min(len(scores), max(2, math.ceil(min_share * len(scores))))
    if clean.sum() < least:
        clean = np.zeros(len(scores), bool)
        clean[np.argsort(scores, kind="stable")[:least]] = True
    return clean


def log_verdict(pairs, verdict, args, log):
    """Say what a judge found, and how right it is where the clean captions are at hand."""
    for weight, center, variance in verdict.components or ():
        log(f"mixture: mean {center:.3f}, weight {weight:.3f}, standard deviation "
            f"{variance ** 0.5:.3f}")
    passed, clean = int((verdict.posterior > args.clean_threshold).sum()), verdict.clean
    if passed < clean.sum():
        log(f"warning: only {passed} of {len(pairs)} pairs have a posterior above "
            f"--clean_threshold {args.clean_threshold}; the strict clean set is instead the "
            f"{clean.sum()} least suspicious pairs (--min_clean {args.min_clean})")
    log(f"estimated share of wrong pairs: {verdict.wrong_share:.1%}; strict clean set: "
        f"{clean.sum()} of {len(pairs)} pairs ({clean.mean():.1%})")
    if pairs.wrong is not None:
        right = ~pairs.wrong
        hits = (clean & right).sum()
        log(f"against the injected noise, in {pairs.wrong.mean():.1%} of the pairs: precision "
            f"{hits / clean.sum():.3f}, recall {hits / max(1, right.sum()):.3f}")
