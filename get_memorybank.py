"""Build the memory bank: for each training image and caption, a clean pair that resembles it.

    python get_memorybank.py --dataset coco --dataset_root PATH --noise_ratio 0.4

The initial model scores every pair, a Gaussian mixture tells clean from noisy losses, and what is
surely clean becomes the strict clean set, in which every image and caption finds its nearest entry.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

from data import training_pairs
from params import parse_args
from utils.distributed import anyone, is_main, main_first
from utils.method.features import embed_pairs
from utils.errors import InputError, command
from utils.reading.layout import ratio_name
from utils.method.losses import pair_losses
from utils.method.memorybank import MemoryBank, bank_path, load_bank, save_bank, save_released
from utils.method.recipes import RECIPES
from utils.training.run import Run

BLOCK = 2**25  # similarities that are held at a time: 128 MiB in fp32


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


def nearest(queries, keys):
    """Row (q,) int64 of the key most similar (dot product) to each query, the lowest one of equals.

    queries (q, D), keys (k, D). Blocks on both sides bound the memory.
    """
    result = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    width = min(len(keys), 8192)
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, BLOCK // width)):
        best = queries.new_full((len(rows),), -torch.inf)
        found = torch.zeros_like(rows)
        for start in range(0, len(keys), width):
            scores = queries[rows] @ keys[start : start + width].T  # (b, w)
            top, first = scores.max(dim=1)  # of equal ones, the first
            better = top > best
            best = torch.where(better, top, best)
            found = torch.where(better, first + start, found)
        result[rows] = found
    return result


def nearest_clean(features, item_of, clean, own_first=True):
    """Nearest strict-clean pair of each distinct item (image or caption): (items,) int64.

    features (items, D), compared by dot product; item_of (n,) the item of each pair; clean (n,)
    bool. The lowest clean pair stands for its item. With `own_first` an item that has a clean pair
    finds itself, as it does by cosine.
    """
    clean_pairs = np.flatnonzero(clean)
    clean_items, first = np.unique(item_of[clean_pairs], return_index=True)
    keys = torch.from_numpy(clean_items).to(features.device)
    entry = clean_pairs[first]  # of each clean item, its lowest clean pair
    result = np.empty(len(features), np.int64)
    searched = np.arange(len(features))
    if own_first:
        result[clean_items] = entry
        searched = np.setdiff1d(searched, clean_items)
    queries = features[torch.from_numpy(searched).to(features.device)]
    result[searched] = entry[nearest(queries, features[keys]).cpu().numpy()]
    return result


def build_bank(model, pairs, args, precision, log=print):
    """The `MemoryBank` of `pairs` under `model`: losses, mixture, strict clean set, neighbours."""
    features = embed_pairs(model, pairs, args, precision, normalise=False)
    return bank_from_features(*features, model.logit_scale, pairs, args, log)


def bank_from_features(raw_images, raw_texts, logit_scale, pairs, args, log=print):
    """The same from the features, not normalised, of the distinct images (u, D) and captions (v, D)
    and the log temperature."""
    n = len(pairs)
    if n < 2:
        raise InputError(f"{pairs.source} has {n} pair; a memory bank needs at least two")

    # 1. The loss of every pair, in random batches of nearly equal size: small ones have low losses
    recipe = RECIPES[args.recipe]
    images, texts = F.normalize(raw_images, dim=1), F.normalize(raw_texts, dim=1)
    image_of = torch.from_numpy(pairs.image_of).to(images.device)
    text_of = torch.from_numpy(pairs.text_of).to(images.device)
    if recipe.random_bank_batches:
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

    # 2. and 3. The mixture, and the pairs that are surely clean
    posterior, gmm = clean_posterior(losses, args.seed)
    clean = strict_clean_set(posterior, losses, args.clean_threshold, args.min_clean)
    report(pairs, losses, posterior, clean, gmm, args, log)

    # 4. The nearest clean pair of each image and caption. By cosine a clean pair is its own; with
    # embeddings as they are, as released, long ones win
    images_or_raw, texts_or_raw = ((images, texts) if recipe.cosine_bank
                                   else (raw_images, raw_texts))
    image_entry = nearest_clean(images_or_raw, pairs.image_of, clean, recipe.cosine_bank)
    caption_entry = nearest_clean(texts_or_raw, pairs.text_of, clean, recipe.cosine_bank)
    caption_entry = caption_entry[pairs.text_of]  # (n,)
    if recipe.cosine_bank:
        caption_entry[clean] = np.flatnonzero(clean)

    cosine = torch.cat([(images[i] * texts[t]).sum(1) for i, t in
                        zip(image_of.split(2**16), text_of.split(2**16), strict=True)])
    beta = (mean_feature(images, image_of) @ mean_feature(texts, text_of)).item()
    info = {"vision_model": str(args.vision_model), "resume": args.resume, "seed": args.seed,
            "recipe": args.recipe, "batch_size": args.batch_size, "beta": beta,
            "clean_threshold": args.clean_threshold, "min_clean": args.min_clean,
            "means": gmm.means_.ravel().tolist(), "weights": gmm.weights_.tolist(),
            "variances": gmm.covariances_.ravel().tolist()}
    return MemoryBank(image_entry, caption_entry, clean, losses.astype(np.float32),
                      posterior.astype(np.float32), cosine.float().cpu().numpy(), info)


def mean_feature(features, item_of):
    """Mean (D,) over the pairs of the features (items, D) of their items, item_of (n,)."""
    count = torch.bincount(item_of, minlength=len(features))
    return count.to(features.dtype) @ features / len(item_of)


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


def memory_bank(model, pairs, args, precision, log=print, resumed=False):
    """The bank of `pairs` from the data folder, or a new one, built by `model` and kept there.

    Raises InputError when none is there and the run is `resumed`: `model` is no initial one then.
    """
    found = load_bank(args.dataset_root, args.noise_ratio, pairs)
    if anyone(not found, args.device):
        path = bank_path(args.dataset_root, args.noise_ratio)
        if resumed:
            raise InputError(f"{path} does not exist, and only the initial model can build it, not "
                             f"{args.resume}: run get_memorybank.py with that model first, or "
                             "start from these weights with --vision_model")
        log(f"No memory bank for noise ratio {ratio_name(args.noise_ratio)} yet: building {path}")
        features = embed_pairs(model, pairs, args, precision, normalise=False)  # by all processes
        with main_first():
            if is_main():
                bank = bank_from_features(*features, model.logit_scale, pairs, args, log)
                save_bank(bank, pairs, path, replace=False)  # of two runs the first one's stays
        found = load_bank(args.dataset_root, args.noise_ratio, pairs)
    else:
        log(f"memory bank: {found[1]}")
    bank = found[0]
    for key in ("vision_model", "recipe", "clean_threshold", "min_clean", "batch_size", "seed"):
        if key in bank.info and bank.info[key] != getattr(args, key):
            log(f"warning: that bank was built with --{key} {bank.info[key]}, this run has "
                f"{getattr(args, key)}; get_memorybank.py builds it anew")
    return bank


@command
def main(argv=None):
    args = parse_args("memorybank", argv)
    run = Run(args)
    model, preprocess = run.load_model()
    pairs = training_pairs(args, preprocess, run.log)
    bank = build_bank(model, pairs, args, run.precision, run.log)
    if not is_main():
        return
    if args.format == "released":
        paths = save_released(bank, pairs, args.dataset_root, args.noise_ratio)
    else:
        paths = [bank_path(args.dataset_root, args.noise_ratio)]
        save_bank(bank, pairs, paths[0])
    run.log(f"wrote {' and '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
