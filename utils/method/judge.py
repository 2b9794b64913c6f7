"""Which pairs are clean.

The paper's judge: the loss of each pair under the initial model, a mixture of two Gaussians on the
losses, the posterior of the low one. Ours, `--judge_rounds` and `--judge_neighbours`, differs in
three points (docs/finding_noise.md has the measurements):

- Rounds. The initial model does not know the domain yet. A copy of it takes a few steps on the
  strict clean set and judges again; a fresh copy then learns from that verdict.
- Neighbours (after LEMoN, Zhang et al. 2025), before the first round: a pair's caption should
  resemble the captions of the images most like its own, and its image the images of the captions
  most like its own.
- Mismatches. An image with the caption of another one is a wrong pair, and shows what wrong pairs
  look like. The scores of such mismatches and of the pairs give the share of wrong pairs (Storey
  2002) and the posterior (one minus the local false discovery rate of Efron et al. 2001). Neither
  assumes a shape of the scores.
"""

import argparse
import copy
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch

import clip
from utils.distributed import main_first
from utils.errors import InputError
from utils.method.batches import Batches
from utils.method.features import (
    Features,
    embed_pairs,
    mean_random_cosine,
    nearest,
    normalised,
    random_rows,
    read_features,
)
from utils.method.memorybank import asks_for_beta
from utils.method.optimizer import adamw, clip_gradients, replays, set_rate
from utils.method.pairs import for_model
from utils.method.passes import Passes, pair_losses
from utils.method.recipes import RECIPES
from utils.progress import progress
from utils.reading.images import Loader
from utils.reading.layout import first_seen

WARMUP = 4  # steps of a round in which the rate rises
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


def judge_pairs(model, pairs, args, precision, log=print):
    """(`Verdict` on `pairs`, (images (u, D), captions (v, D))): what the judge finds that the
    options name, and its features, tensors or `Features`. The judge is `model`, unless --judge or
    --judge_features name another."""
    rng, neighbours = np.random.default_rng(args.noise_seed), args.judge_neighbours
    if args.judge_features:
        features, scale = read_features(args.judge_features, pairs, args.device)
        verdict = verdict_on(features, scale, pairs, args, rng, neighbours)
        log_verdict(pairs, verdict, args, log)
        return verdict, features
    if args.judge:
        with main_first():
            model, preprocess = clip.load(args.judge, device=args.device)
        model = precision.prepare(model)
        own = with_options(args, context_length=min(args.context_length, model.context_length))
        pairs = for_model(pairs, own, preprocess, log=lambda _: None)

    # The model judges as it is, and with the help of neighbours
    verdict, features = embed_and_judge(model, pairs, args, precision, rng, neighbours)
    of_model = {"cosine": verdict.cosine}
    if asks_for_beta(args):
        of_model["beta"] = mean_random_cosine(model, args, precision)

    # In each round a fresh copy of it learns from the last verdict, and judges again
    for number in range(1, args.judge_rounds + 1):
        log(f"judge, round {number} of {args.judge_rounds}: {args.judge_steps} steps at "
            f"{args.judge_lr:g} on {verdict.clean.sum()} pairs")
        rng = np.random.default_rng([args.noise_seed, number])
        trained = train_judge(model, pairs, verdict.clean, args, precision, rng)
        verdict, features = embed_and_judge(trained, pairs, args, precision, rng)
    log_verdict(pairs, verdict, args, log)
    return verdict._replace(**of_model), features


def embed_and_judge(model, pairs, args, precision, rng, neighbours=0):
    """(`Verdict` of a model on `pairs`, its features)."""
    features = embed_pairs(model, pairs, args, precision)
    return verdict_on(features, model.logit_scale, pairs, args, rng, neighbours), features


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
    papers = not (args.judge_rounds or args.judge_neighbours)

    # A caption for each image: in row 0 that of the pair, in the others those of mismatches
    captions, made = pairs.text_of[None], None
    if not papers:
        others = np.stack([mismatched(pairs, rng) for _ in range(MISMATCHES)])
        captions = np.concatenate([captions, pairs.text_of[others]])  # (1 + m, n)
        made = others[0] >= 0  # the same pairs each time
        if not made.any():
            raise InputError(f"{pairs.source}: every caption stands beside every image, so that no "
                             "wrong pair can be made to compare with; --judge_rounds 0 "
                             "--judge_neighbours 0, the paper's judge, needs none")
    image_of, captions = (torch.from_numpy(x).to(images.device) for x in (pairs.image_of, captions))

    in_order = papers and not RECIPES[args.recipe].random_bank_batches
    draws = [draw_batches(len(pairs), args.batch_size, None if in_order else rng)
             for _ in range(1 if papers else DRAWS)]
    losses = [losses_in_batches(images, texts, image_of, captions, logit_scale, draw)
              for draw in draws]
    scores = losses = torch.stack(losses).mean(dim=0)  # (1 + m, n)
    if not losses[0].isfinite().all():
        raise InputError(f"the model's losses are not finite; its logit_scale is "
                         f"{logit_scale.item():.4g}, a log temperature of at most ln 100 is usual")
    if neighbours:
        agreement = agreements(images, texts, image_of, captions, neighbours, args)
        loss, by_image, by_text = (standard_scores(values, values[0])
                                   for values in (losses, *agreement))
        scores = loss - AGREEMENT * (by_image + by_text)

    loss, score = (values[0].double().cpu().numpy() for values in (losses, scores))
    mismatches = components = share_error = None
    if papers:
        posterior, components = mixture_posterior(score, args.noise_seed)
        wrong_share = 1 - posterior.mean()
    else:
        mismatches = scores[1:].double().cpu().numpy()[:, made].ravel()
        wrong_share, share_error = wrong_share_by(score, mismatches)
        posterior = posterior_by_mismatches(score, mismatches, wrong_share)
    clean = strict_clean_set(posterior, score, args.clean_threshold, args.min_clean)
    cosine = torch.cat([(images[i] * texts[t]).sum(1) for i, t in
                        zip(image_of.split(ROWS), captions[0].split(ROWS), strict=True)])
    return Verdict(score, loss, posterior, clean, cosine.float().cpu().numpy(), float(wrong_share),
                   share_error, components, mismatches)


def train_judge(model, pairs, clean, args, precision, rng):
    """A copy of `model` after `--judge_steps` plain CLIP steps on the pairs that are clean, (n,)
    bool, which `rng` shuffles. The rate rises to `--judge_lr` over `WARMUP` steps and stays."""
    batches = draw_steps(np.flatnonzero(clean), args.batch_size, args.judge_steps, rng)
    loader = Loader(args, Batches(pairs, few_shapes=replays(args)), len(batches), pairs.images,
                    sampler=batches, batch_size=None)
    trained, precision = copy.deepcopy(model), precision.anew()
    trained.grad_checkpointing = args.grad_checkpointing
    optimizer = adamw(trained, with_options(args, lr=args.judge_lr))
    steps = progress(loader, desc="judge", unit="step", leave=False)
    for number, batch in enumerate(steps, 1):
        set_rate(optimizer, args.judge_lr * min(1, number / WARMUP))
        passes = Passes(trained, batch.to(args.device), precision, accum_steps=args.accum_steps)
        passes.backward(passes.batch.mean())
        precision.scaler.unscale_(optimizer)
        clip_gradients(trained, args.clip_grad)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            trained.logit_scale.clamp_(max=math.log(100))
    return trained


def draw_steps(chosen, batch_size, steps, rng):
    """The batches of a round's steps, lists of pairs: pass after pass over the `chosen` pairs (k,),
    shuffled each time, without the last incomplete batch of a pass."""
    size = min(batch_size, len(chosen))
    per_pass = len(chosen) // size
    passes = [rng.permutation(chosen)[: per_pass * size].reshape(per_pass, size)
              for _ in range(-(-steps // per_pass))]
    return np.concatenate(passes)[:steps].tolist()


def with_options(args, **values):
    """A copy of the options with other values of some."""
    return argparse.Namespace(**{**vars(args), **values})


# ---- the loss of a pair in a batch ---------------------------------------------------------------


def draw_batches(n, batch_size, rng):
    """0..n-1 in batches (int64 tensors), random and of nearly equal size, as small ones have low
    losses; without `rng` in order, the last one being what is left."""
    if rng is None:
        return torch.arange(n).split(batch_size)
    return torch.from_numpy(rng.permutation(n)).tensor_split(-(-n // batch_size))


def losses_in_batches(images, texts, image_of, captions, logit_scale, batches):
    """Losses (1 + m, n) of each pair against the others of its batch: with its own caption, that of
    row 0 of captions (1 + m, n), and as they would be with that of each other row, all other pairs
    as they are. `batches`: int64 tensors of pairs that cover 0..n-1; images (u, D) and texts (v, D)
    are L2-normalised."""
    losses = torch.empty(captions.shape, dtype=images.dtype, device=images.device)
    logit_scale = logit_scale.detach().to(images.dtype)
    for batch in progress(batches, desc="losses", unit="batch", leave=False):
        batch = batch.to(losses.device)
        image, text = images[image_of[batch]], texts[captions[0, batch]]
        losses[0, batch] = pair_losses(image, text, logit_scale)
        scaled = logit_scale.exp() * image
        rest = (scaled @ text.T).fill_diagonal_(-torch.inf).logsumexp(dim=1)
        for loss, other in zip(losses[1:], captions[1:], strict=True):
            if_other = scaled @ texts[other[batch]].T  # (b, b)
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


def agreements(images, texts, image_of, captions, k, args):
    """[how well the captions agree with the k neighbours of their images, and the images with those
    of their captions], (1 + m, n) each, for the images of the pairs with each row of captions
    (1 + m, n), of which row 0 are the pairs' own."""
    text_of, images_of = captions[0], image_of.expand_as(captions)
    images, texts = centred(images, image_of), centred(texts, text_of)
    among = k, args.search_among, args.noise_seed
    return [agreement(images, texts, image_of, text_of, images_of, captions, *among, "image"),
            agreement(texts, images, text_of, image_of, captions, images_of, *among, "caption")]


def centred(features, item_of):
    """`Features` (items, D) less their mean over the pairs, whose items are item_of (n,), at length
    1."""
    total = sum(features[rows].sum(dim=0) for rows in item_of.split(ROWS))
    return Features(features, centre=total / len(item_of), normalise=True)


def agreement(items, partners, item_of, partner_of, given, of, k, most, seed, title):
    """Mean cosine of the partners `of` with the partners of the k neighbours of the items `given`,
    weighted by the neighbours' similarity, NaN where no neighbour is left: of the shape of both.

    Items are images and partners captions, or the other way round; item_of, partner_of: (n,), those
    of each pair. Partners that are the very same do not count. Neighbours are looked for among
    `most` random items, drawn by `seed`, or among all.
    """
    device = item_of.device
    some = torch.from_numpy(random_rows(len(items), most, seed)).to(device)
    at, here = position_among(some, torch.arange(len(items), device=device))
    cosine, near = nearest(items, Features(items, chosen=some), k, torch.where(here, at, -1),
                           f"{title} neighbours")
    near = near.int()  # which takes half the memory

    # Of each of `some` the sum of the features of its partners, and their number
    total = torch.zeros(len(some), partners.shape[1], dtype=partners.dtype, device=device)
    count = torch.zeros_like(some)
    for item, partner in zip(item_of.split(ROWS), partner_of.split(ROWS), strict=True):
        at, here = position_among(some, item)
        total.index_add_(0, at[here], partners[partner[here]])
        count.index_add_(0, at[here], torch.ones_like(at[here]))
    # How often each item stands beside each partner
    keys, times = (item_of * len(partners) + partner_of).unique(return_counts=True)

    found, size = [], BLOCK // max(1, near.shape[1] * partners.shape[1]) or 1
    blocks = list(zip(given.flatten().split(size), of.flatten().split(size), strict=True))
    for item, partner in progress(blocks, desc="agreement", unit="block", leave=False):
        neighbour = near[item]  # (b, k)
        at, here = position_among(keys, some[neighbour] * len(partners) + partner[:, None])
        same = torch.where(here, times[at], 0)
        left = count[neighbour] - same
        dots = torch.einsum("bd,bkd->bk", partners[partner], total[neighbour]) - same
        weight = cosine[item].clamp(min=0) * (left > 0)
        found.append((weight * dots / left.clamp(min=1)).sum(dim=1) / weight.sum(dim=1))
    return torch.cat(found).view(given.shape)


def position_among(items, wanted):
    """(place of the wanted items among items (m,), ascending, whether they are there): int64 and
    bool, of the shape of `wanted`."""
    at = torch.searchsorted(items, wanted).clamp(max=len(items) - 1)
    return at, items[at] == wanted


def standard_scores(values, of):
    """How many standard deviations of `of` (n,) each of the values is from its mean; 0 for NaN and
    where `of` has fewer than two numbers beside NaN."""
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
