"""Which pairs are clean.

The paper's judge: the loss of each pair under the initial model, a mixture of two Gaussians on the
losses, the posterior of the low one. Ours, `--judge_rounds` and `--judge_neighbours`, differs in
three points (docs/finding_noise.md has the measurements):

- Rounds (utils.method.rounds). The initial model does not know the domain yet. A copy of it takes a
  few steps on the strict clean set and judges again; a fresh copy then learns from that verdict.
- Neighbours (after LEMoN, Zhang et al. 2025), before the first round: a pair's caption should
  resemble the captions of the images most like its own, and its image the images of the captions
  most like its own.
- Mismatches. An image with the caption of another one is a wrong pair, and shows what wrong pairs
  look like. The scores of such mismatches and of the pairs give the share of wrong pairs (Storey
  2002) and the posterior (one minus the local false discovery rate of Efron et al. 2001). Neither
  assumes a shape of the scores.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import InputError
from utils.method.features import Features, nearest, normalised, random_rows
from utils.method.pairs import first_seen
from utils.method.passes import pair_losses
from utils.method.recipes import RECIPES
from utils.progress import progress

DRAWS = 4  # random divisions into batches; a pair's loss is the mean over them
MISMATCHES = 4  # mismatches made of each pair
AGREEMENT = 0.375  # weight of each neighbour agreement beside the loss, both in standard scores
BLIND = 0.58  # AUC of pairs against mismatches, below which a judge cannot be trusted
PERCENTILE = 80  # of the mismatches, above which a right pair hardly scores
ROWS, BLOCK = 2**14, 2**25  # rows, and numbers, that are held at a time


class Verdict(NamedTuple):
    """What is known of n pairs.

    score: what ranks the pairs, high is suspicious; loss: in a batch of other pairs; posterior of
    being clean (all (n,) float64); clean (n,) bool: the strict clean set; cosine (n,) float32.
    wrong_share: estimated share of wrong pairs; share_error: its standard error, None for the
    paper's judge. components: (weight, mean, variance) of the paper's mixture, the low one first,
    or None; mismatches: (m,) scores of the mismatches, or None. beta: `mean_random_cosine` of the
    model, None unless `--weighting osa` asks for it.
    """

    score: np.ndarray
    loss: np.ndarray
    posterior: np.ndarray
    clean: np.ndarray
    cosine: np.ndarray
    wrong_share: float
    share_error: float | None = None
    components: list | None = None
    mismatches: np.ndarray | None = None
    beta: float | None = None


def verdict_on(features, logit_scale, pairs, args, rng, neighbours=0):
    """`Verdict` on `pairs` from the features of their distinct images (u, D) and captions (v, D),
    tensors or `Features`, and the log temperature.

    It is the paper's verdict without `--judge_rounds` and `--judge_neighbours`. `rng` draws batches
    and mismatches; `neighbours`: with how many nearest neighbours a pair must agree, 0 for none.
    Raises InputError when losses are not finite, or no mismatch can be made.
    """
    if len(pairs) < 2:
        raise InputError(f"{pairs.source} has {len(pairs)} pair; a memory bank needs at least two")
    images, texts = map(normalised, features)
    image_of, text_of = (torch.from_numpy(x).to(images.device)
                         for x in (pairs.image_of, pairs.text_of))
    data = images, texts, image_of, text_of, logit_scale.detach().to(images.dtype)
    mismatches = components = share_error = None
    if args.judge_rounds or args.judge_neighbours:
        loss, score, mismatches = beside_mismatches(*data, pairs, args, rng, neighbours)
    else:
        in_order = not RECIPES[args.recipe].random_bank_batches
        batches = draw_batches(len(pairs), args.batch_size, None if in_order else rng)
        loss = score = losses_in_batches(*data, batches)
    loss, score = loss.double().cpu().numpy(), score.double().cpu().numpy()
    if not np.isfinite(loss).all():
        raise InputError(f"the model's losses are not finite; its logit_scale is "
                         f"{logit_scale.item():.4g}, a log temperature of at most ln 100 is usual")
    if mismatches is None:
        posterior, components = mixture_posterior(score, args.noise_seed)
        wrong_share = 1 - posterior.mean()
    else:
        mismatches = mismatches.double().cpu().numpy()
        wrong_share, share_error = wrong_share_by(score, mismatches)
        posterior = posterior_by_mismatches(score, mismatches, wrong_share)
    clean = strict_clean_set(posterior, score, args.clean_threshold, args.min_clean)
    cosine = torch.cat([(images[i] * texts[t]).sum(1) for i, t in
                        zip(image_of.split(ROWS), text_of.split(ROWS), strict=True)])
    return Verdict(score, loss, posterior, clean, cosine.float().cpu().numpy(), float(wrong_share),
                   share_error, components, mismatches)


def beside_mismatches(images, texts, image_of, text_of, logit_scale, pairs, args, rng, neighbours):
    """(loss (n,), score (n,), scores of the mismatches (m,)) of `pairs`, tensors."""
    data, device = (images, texts, image_of, text_of, logit_scale), images.device
    others = [mismatched(pairs, rng) for _ in range(MISMATCHES)]
    made = others[0] >= 0  # the same pairs each time
    if not made.any():
        raise InputError(f"{pairs.source}: every caption stands beside every image, so that no "
                         "wrong pair can be made to compare with; --judge_rounds 0 "
                         "--judge_neighbours 0, the paper's judge, needs none")
    other_texts = [text_of[torch.from_numpy(other).to(device)] for other in others]
    draws = [draw_batches(len(pairs), args.batch_size, rng) for _ in range(DRAWS)]
    loss = mean(losses_in_batches(*data, draw) for draw in draws)
    other_losses = mean(losses_if(*data, draw, other_texts) for draw in draws)
    score, mismatches = loss, other_losses
    if neighbours:
        agreements = Agreements(images, texts, pairs, neighbours, args.search_among,
                                args.noise_seed)
        own = loss, *agreements(text_of)
        score = combined(own, own)
        mismatches = torch.stack([combined((other_loss, *agreements(other)), own)
                                  for other_loss, other in
                                  zip(other_losses, other_texts, strict=True)])
    return loss, score, mismatches[:, torch.from_numpy(made).to(device)].flatten()


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
    for batch in progress(batches, desc="losses", unit="batch", leave=False):
        batch = batch.to(losses.device)
        losses[batch] = pair_losses(images[image_of[batch]], texts[text_of[batch]], logit_scale)
    return losses


def losses_if(images, texts, image_of, text_of, logit_scale, batches, other_of):
    """Loss (m, n) that each pair would have in its batch if its caption were one of the m other_of
    (n,) instead of text_of, with all other pairs as they are."""
    losses = torch.empty(len(other_of), len(image_of), dtype=images.dtype, device=images.device)
    for batch in progress(batches, desc="losses of mismatches", unit="batch", leave=False):
        batch = batch.to(losses.device)
        scaled = logit_scale.exp() * images[image_of[batch]]
        logits = scaled @ texts[text_of[batch]].T  # (b, b)
        rest = logits.fill_diagonal_(-torch.inf).logsumexp(dim=1)
        for loss, other in zip(losses, other_of, strict=True):
            if_other = scaled @ texts[other[batch]].T
            own = if_other.diagonal()
            loss[batch] = (torch.logaddexp(rest, own) + if_other.logsumexp(dim=0)) / 2 - own
    return losses


def mismatched(pairs, rng):
    """(n,) int64: for each pair another pair, whose caption makes a mismatch with its image.

    Drawn uniformly among all pairs whose caption stands nowhere beside this image; captions that
    differ in case and white space alone count as one. -1 where there is no such pair.
    """
    n, image_of = len(pairs), pairs.image_of
    text_of = first_seen([" ".join(text.casefold().split()) for text in pairs.captions])[1]
    by_text, size = np.argsort(text_of, kind="stable"), np.bincount(text_of)
    start = size.cumsum() - size  # the pairs of text t are by_text[start[t]:][:size[t]]
    image, text = np.divmod(np.unique(image_of * n + text_of), n)  # which texts each image has
    count = np.bincount(image)
    first = count.cumsum() - count
    fitting = n - np.bincount(image, size[text]).astype(np.int64)  # pairs, by image

    left = np.flatnonzero(fitting[image_of] > 0)
    place = np.full(n, -1)
    place[left] = rng.integers(fitting[image_of[left]])
    for k in range(count.max()):  # step over the image's own texts, in ascending order
        left = left[count[image_of[left]] > k]
        own = text[first[image_of[left]] + k]
        place[left] += size[own] * (place[left] >= start[own])
    return np.where(place < 0, -1, by_text[place])


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
        for item, partner in progress(blocks, desc="agreement", total=-(-len(item_of) // size),
                                      unit="block", leave=False):
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


def wrong_share_by(scores, mismatches, percentile=PERCENTILE):
    """(estimated share of wrong pairs, its standard error) from the scores of the pairs (n,) and of
    mismatches (m,).

    Storey's estimate: hardly a right pair scores above the 80th percentile of the mismatches, but a
    fifth of the wrong ones do, so that the share is five times that of the pairs there. The error
    is binomial; one pair more on either side of the percentile keeps it above 0.
    """
    n, tail = len(scores), 1 - percentile / 100
    above = int((scores > np.percentile(mismatches, percentile)).sum())
    chance = (above + 1) / (n + 2)
    return min(1.0, above / n / tail), math.sqrt(chance * (1 - chance) / n) / tail


def posterior_by_mismatches(scores, mismatches, wrong_share):
    """Posterior (n,) of being clean, from the scores of the pairs (n,) and of mismatches (m,) and
    the share of wrong pairs.

    It is 1 - wrong_share f_wrong / f. The ratio of both densities is monotone in the score and
    comes from the isotonic regression of "is a pair, no mismatch".
    """
    from sklearn.isotonic import IsotonicRegression

    weight = np.repeat([1.0, len(scores) / len(mismatches)], [len(scores), len(mismatches)])
    is_pair = np.repeat([1.0, 0.0], [len(scores), len(mismatches)])
    fit = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(
        np.concatenate([scores, mismatches]), is_pair, weight)
    is_pair = fit.predict(scores).clip(1e-12)
    return 1 - (wrong_share * (1 - is_pair) / is_pair).clip(0, 1)


def auc_against_mismatches(verdict):
    """AUC of the scores of a `Verdict`: the chance that a mismatch scores above a pair. .5 is that
    of a blind judge; a perfect one reaches 1 less half the share of wrong pairs, which are like
    mismatches."""
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([verdict.score, verdict.mismatches])
    return roc_auc_score(np.arange(len(scores)) < len(verdict.score), -scores)


def strict_clean_set(posterior, scores, threshold, min_share):
    """(n,) bool: pairs with posterior > threshold. Where these are fewer than min_share of all
    (at least 2), the set is the pairs of smallest score, that many; ties go to the lower index."""
    clean = posterior > threshold
    least = min(len(scores), max(2, math.ceil(min_share * len(scores))))
    if clean.sum() < least:
        clean = np.zeros(len(scores), bool)
        clean[np.argsort(scores, kind="stable")[:least]] = True
    return clean


def share_in_words(verdict, args):
    """The estimated share of wrong pairs with its standard error, and whether it is a bound."""
    if verdict.share_error is None:
        return f"{verdict.wrong_share:.1%}"
    random_noise = args.noise_ratio and args.noise_kind == "random"
    bound = "" if random_noise else ", a lower bound where wrong captions resemble right ones"
    return f"{verdict.wrong_share:.1%} (standard error {verdict.share_error:.1%}{bound})"


def doubts(verdict):
    """A list with the sentence that says that the judge cannot judge, if it cannot."""
    if verdict.mismatches is None or (auc := auc_against_mismatches(verdict)) >= BLIND:
        return []
    return [f"warning: the judge hardly tells the pairs from mismatches (AUC {auc:.2f}, chance "
            "0.5): most pairs are wrong, or it does not know such images or captions. Then neither "
            "the share nor the posteriors mean anything: take another model (--judge), fine-tune "
            "first and judge by that checkpoint (--resume), or label a sample (--labels)."]


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
    log(f"estimated share of wrong pairs: {share_in_words(verdict, args)}; strict clean set: "
        f"{clean.sum()} of {len(pairs)} pairs ({clean.mean():.1%})")
    if pairs.wrong is not None:
        right = ~pairs.wrong
        hits = (clean & right).sum()
        log(f"against the injected noise, in {pairs.wrong.mean():.1%} of the pairs: precision "
            f"{hits / clean.sum():.3f}, recall {hits / max(1, right.sum()):.3f}")
    for line in doubts(verdict):
        log(line)
