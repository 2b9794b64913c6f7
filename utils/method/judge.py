"""Which pairs are clean: losses of the initial model, a mixture fitted to them, the strict clean
set."""

import warnings
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import InputError
from utils.method.losses import pair_losses
from utils.method.recipes import RECIPES


class Verdict(NamedTuple):
    """What is known of each of n pairs: loss and posterior of being clean (float64), clean (bool,
    the strict clean set), cosine (float32); and the fitted mixture."""

    loss: np.ndarray
    posterior: np.ndarray
    clean: np.ndarray
    cosine: np.ndarray
    mixture: object


def judge(images, texts, logit_scale, pairs, args, log):
    """`Verdict` on `pairs` by L2-normalised features of their distinct images (u, D) and captions
    (v, D) and the log temperature. Raises InputError when losses are not finite."""
    n = len(pairs)
    if n < 2:
        raise InputError(f"{pairs.source} has {n} pair; a memory bank needs at least two")
    image_of = torch.from_numpy(pairs.image_of).to(images.device)
    text_of = torch.from_numpy(pairs.text_of).to(images.device)
    if RECIPES[args.recipe].random_bank_batches:  # of nearly equal size: small ones have low losses
        order = torch.from_numpy(np.random.default_rng(args.seed).permutation(n))
        batches = order.to(images.device).tensor_split(-(-n // args.batch_size))
    else:
        batches = torch.arange(n, device=images.device).split(args.batch_size)
    losses = losses_in_batches(images, texts, image_of, text_of,
                               logit_scale.detach().to(images.dtype), batches)
    losses = losses.double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise InputError(f"the model's losses are not finite; its logit_scale is "
                         f"{logit_scale.item():.4g}, a log temperature of at most ln 100 is usual")
    cosine = torch.cat([(images[i] * texts[t]).sum(1) for i, t in
                        zip(image_of.split(2**16), text_of.split(2**16), strict=True)])
    posterior, mixture = clean_posterior(losses, args.seed)
    clean = strict_clean_set(posterior, losses, args.clean_threshold, args.min_clean)
    report(pairs, losses, posterior, clean, mixture, args, log)
    return Verdict(losses, posterior, clean, cosine.float().cpu().numpy(), mixture)


def losses_in_batches(image_features, text_features, image_of, text_of, logit_scale, batches):
    """Loss of each pair (n,) against the others of its batch. `batches`: int64 tensors of pairs
    that cover 0..n-1; features are L2-normalised, rows given by image_of and text_of (n,)."""
    losses = image_features.new_empty(len(image_of))
    for batch in batches:
        losses[batch] = pair_losses(image_features[image_of[batch]], text_features[text_of[batch]],
                                    logit_scale)
    return losses


def clean_posterior(losses, seed):
    """Posterior (n,) of the low-mean component of a two-component mixture on losses (n,), and the
    fitted `GaussianMixture`."""
    from sklearn.mixture import GaussianMixture  # a second to import, which a found bank spares

    gmm = GaussianMixture(n_components=2, max_iter=100, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # identical losses: both components coincide, which is said
        posterior = gmm.fit(losses[:, None]).predict_proba(losses[:, None])
    return posterior[:, gmm.means_.argmin()], gmm


def strict_clean_set(posterior, losses, threshold, min_share):
    """(n,) bool: pairs with posterior > threshold. Where these are fewer than min_share of all
    (at least 2), the set is the pairs of smallest loss, that many; ties go to the lower index."""
    clean = posterior > threshold
    least = min(len(losses), max(2, int(np.ceil(min_share * len(losses)))))
    if clean.sum() < least:
        clean = np.zeros(len(losses), bool)
        clean[np.argsort(losses, kind="stable")[:least]] = True
    return clean


def report(pairs, losses, posterior, clean, gmm, args, log):
    """Say what the mixture found, and how right it is where the clean captions are at hand."""
    for k in gmm.means_.ravel().argsort():
        log(f"mixture: mean {gmm.means_[k, 0]:.3f}, weight {gmm.weights_[k]:.3f}, "
            f"standard deviation {gmm.covariances_[k, 0, 0] ** 0.5:.3f}")
    passed = int((posterior > args.clean_threshold).sum())
    if passed < clean.sum():
        log(f"warning: only {passed} of {len(losses)} pairs have a posterior above "
            f"--clean_threshold {args.clean_threshold}; the strict clean set is instead the "
            f"{clean.sum()} pairs of smallest loss (--min_clean {args.min_clean})")
    log(f"strict clean set: {clean.sum()} of {len(losses)} pairs ({clean.mean():.1%})")
    if pairs.wrong is not None:
        right = ~pairs.wrong
        hits = (clean & right).sum()
        log(f"against train_caps.txt: precision {hits / clean.sum():.3f}, recall "
            f"{hits / max(1, right.sum()):.3f}; {pairs.wrong.mean():.1%} of the pairs are wrong")
