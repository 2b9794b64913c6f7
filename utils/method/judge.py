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
from utils.method.neighbours import Features, nearest, random_rows
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


def verdict_on(images, texts, logit_scale, pairs, args, number=0):
    """`Verdict` on `pairs` from L2-normalised features, tensors or `Features`, of their distinct
    images (u, D) and captions (v, D) and the log temperature, after round `number`. Without rounds
    and neighbours it is the paper's. Raises InputError when losses are not finite."""
    n, device = len(pairs), images.device
    if n < 2:
        raise InputError(f"{pairs.source} has {n} pair; a memory bank needs at least two")
    as_paper = not (args.judge_rounds or args.judge_neighbours)
    image_of = torch.from_numpy(pairs.image_of).to(device)
    text_of = torch.from_numpy(pairs.text_of).to(device)
    logit_scale = logit_scale.detach().to(images.dtype)
    rng = np.random.default_rng([args.seed, number] if number else args.seed)
    components = mismatches = None
    if as_paper:
        in_order = not RECIPES[args.recipe].random_bank_batches
        batches = draw_batches(n, args.batch_size, None if in_order else rng)
        loss = score = losses_in_batches(images, texts, image_of, text_of, logit_scale, batches)
    else:
        others = [torch.from_numpy(mismatched(pairs.image_of, rng)) for _ in range(MISMATCHES)]
        other_texts = [text_of[other.to(device)] for other in others]
        draws = [draw_batches(n, args.batch_size, rng) for _ in range(DRAWS)]
        loss = mean(losses_in_batches(images, texts, image_of, text_of, logit_scale, draw)
                    for draw in draws)
        mismatches = mean(losses_if(images, texts, image_of, text_of, other_texts, logit_scale,
                                    draw) for draw in draws)
        score = loss
        if args.judge_neighbours and not number:
            agreements = Agreements(images, texts, pairs, args.judge_neighbours,
                                    args.search_among, args.seed)
            own = agreements(text_of)
            standard = [Standard(values) for values in (loss, *own)]
            score = combined(standard, loss, own)
            mismatches = [combined(standard, bad, agreements(other))
                          for bad, other in zip(mismatches, other_texts, strict=True)]
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


def losses_in_batches(image_features, text_features, image_of, text_of, logit_scale, batches):
    """Loss of each pair (n,) against the others of its batch. `batches`: int64 tensors of pairs
    that cover 0..n-1; features are L2-normalised, rows given by image_of and text_of (n,)."""
    losses = empty(len(image_of), image_features)
    for batch in tqdm(batches, desc="losses", unit="batch", disable=None, leave=False):
        batch = batch.to(losses.device)
        losses[batch] = pair_losses(image_features[image_of[batch]], text_features[text_of[batch]],
                                    logit_scale)
    return losses


def losses_if(image_features, text_features, image_of, text_of, other_of, logit_scale, batches):
    """Loss (m, n) that each pair would have in its batch if its caption were one of the m other_of
    (n,) instead of text_of, with all other pairs as they are."""
    losses = empty((len(other_of), len(image_of)), image_features)
    for batch in tqdm(batches, desc="losses of mismatches", unit="batch", disable=None,
                      leave=False):
        batch = batch.to(losses.device)
        images = logit_scale.exp() * image_features[image_of[batch]]
        logits = images @ text_features[text_of[batch]].T  # (b, b)
        rest = logits.fill_diagonal_(-torch.inf).logsumexp(dim=1)
        for loss, other in zip(losses, other_of, strict=True):
            if_other = images @ text_features[other[batch]].T
            own = if_other.diagonal()
            loss[batch] = (torch.logaddexp(rest, own) + if_other.logsumexp(dim=0)) / 2 - own
    return losses


def empty(shape, features):
    """An uninitialised tensor of the type and on the device of features."""
    return torch.empty(shape, dtype=features.dtype, device=features.device)


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
    captions: mean cosine, weighted by the neighbours' similarity. Features are centred before.
    Neighbours that stand beside the very same caption (or image) are left out. The k neighbours of
    an item are looked for among `most` random ones, drawn by `seed`, or among all."""

    def __init__(self, images, texts, pairs, k, most=None, seed=0):
        device = images.device
        self.image_of = torch.from_numpy(pairs.image_of).to(device)
        text_of = torch.from_numpy(pairs.text_of).to(device)
        self.images, self.texts = centred(images, self.image_of), centred(texts, text_of)
        self.some_images, self.some_texts = (
            torch.from_numpy(random_rows(len(x), most, seed)).to(device) for x in (images, texts))
        self.near_images = nearest_others(self.images, k, self.some_images, "image neighbours")
        self.near_texts = nearest_others(self.texts, k, self.some_texts, "caption neighbours")
        self.captions_of = partners(self.texts, self.image_of, text_of, self.some_images)
        self.images_of = partners(self.images, text_of, self.image_of, self.some_texts)
        # how often each image stands beside each caption
        keys = self.image_of * len(texts) + text_of
        self.keys, self.counts = keys.unique(return_counts=True)

    def __call__(self, text_of):
        """(agreement of captions (n,), agreement of images (n,)) of the pairs' images with the
        captions text_of (n,); NaN where no neighbour is left."""
        by_image, by_text = [], []
        k = self.near_images[0].shape[1] + self.near_texts[0].shape[1]
        width = self.texts.shape[1]
        rows = torch.arange(len(text_of), device=text_of.device)
        size = BLOCK // max(1, k * width) or 1
        for block in tqdm(rows.split(size), desc="agreement", unit="block",
                          disable=None, leave=False):
            image, text = self.image_of[block], text_of[block]
            near = [x[image] for x in self.near_images]
            same = self.together(self.some_images[near[1]], text[:, None])
            by_image.append(agreement(self.texts[text], *near, *self.captions_of, same))
            near = [x[text] for x in self.near_texts]
            same = self.together(image[:, None], self.some_texts[near[1]])
            by_text.append(agreement(self.images[image], *near, *self.images_of, same))
        return torch.cat(by_image), torch.cat(by_text)

    def together(self, image, text):
        """How often images stand beside captions, two int64 tensors that broadcast."""
        key = image * len(self.texts) + text
        at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[at] == key, self.counts[at], 0)


def centred(features, item_of):
    """`Features` (items, D) less their mean over the pairs, whose items are item_of (n,), at length
    1."""
    total = sum(features[rows].sum(dim=0) for rows in item_of.split(ROWS))
    return Features(features, centre=total / len(item_of), normalise=True)


def partners(features, item_of, partner_of, items):
    """Of each of the items (m,), ascending, the sum of the features of its partners (m, D), and
    their number (m,). item_of, partner_of: (n,) int64, of each pair."""
    total = torch.zeros(len(items), features.shape[1], dtype=features.dtype, device=items.device)
    count = torch.zeros_like(items)
    for item, partner in zip(item_of.split(ROWS), partner_of.split(ROWS), strict=True):
        at, here = position_among(items, item)
        total.index_add_(0, at[here], features[partner[here]])
        count.index_add_(0, at[here], torch.ones_like(at[here]))
    return total, count


def position_among(items, wanted):
    """(place (b,) of wanted items (b,) among items (m,), ascending, whether they are there)."""
    at = torch.searchsorted(items, wanted).clamp(max=len(items) - 1)
    return at, items[at] == wanted


def nearest_others(features, k, items, title):
    """(cosine (q, k), place (q, k) int32 among the items) of the k of the items (m,), ascending,
    that are most similar to each row of features (q, D), itself left out."""
    at, here = position_among(items, torch.arange(len(features), device=items.device))
    own = torch.where(here, at, -1)
    cosine, found = nearest(features, Features(features, chosen=items), k, own, title)
    return cosine, found.int()


def agreement(own, cosine, near, total, count, same):
    """Weighted mean cosine (b,) of features own (b, D) with the partners of their neighbours near
    (b, k), of which `same` (b, k) are the item itself and do not count."""
    left = count[near] - same
    dots = torch.einsum("bd,bkd->bk", own, total[near]) - same
    weight = cosine.clamp(min=0) * (left > 0)
    return (weight * dots / left.clamp(min=1)).sum(dim=1) / weight.sum(dim=1)


class Standard:
    """Standard scores by the mean and standard deviation of values (n,), NaN left out; of fewer
    than two there are none."""

    def __init__(self, values):
        known = values[~values.isnan()]
        self.mean, self.deviation = torch.nan, 1
        if len(known) > 1:
            self.mean, self.deviation = known.mean(), known.std().clamp(min=1e-12)

    def __call__(self, values):
        return ((values - self.mean) / self.deviation).nan_to_num(0.0)


def combined(standard, loss, agreements):
    """Score (n,) of pairs from their loss and agreements, by three `Standard`s."""
    of_loss, *of_agreements = standard
    return of_loss(loss) - AGREEMENT * sum(of(value) for of, value in
                                           zip(of_agreements, agreements, strict=True))


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
        log(f"against train_caps.txt: precision {hits / clean.sum():.3f}, recall "
            f"{hits / max(1, right.sum()):.3f}; {pairs.wrong.mean():.1%} of the pairs are wrong")
