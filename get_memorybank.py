"""Build the memory bank: for each training image and caption, a clean pair that resembles it.

    python get_memorybank.py --dataset coco --dataset_root PATH --noise_ratio 0.4

The initial model scores every pair, a Gaussian mixture tells clean from noisy losses, and what is
surely clean becomes the strict clean set, in which every image and caption finds its nearest entry.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import training_pairs
from params import parse_args
from utils.distributed import any_process, is_main, main_first
from utils.errors import InputError, command
from utils.method.features import embed_pairs
from utils.method.judge import judge
from utils.method.memorybank import MemoryBank, bank_path, load_bank, nearest_clean, save_bank
from utils.method.recipes import RECIPES
from utils.method.released_bank import save_released
from utils.reading.layout import BANK_FOLDERS, ratio_name
from utils.training.run import Run

COMPARED = ("vision_model", "recipe", "clean_threshold", "min_clean", "batch_size", "seed")


def build_bank(model, pairs, args, precision, log=print):
    """The `MemoryBank` of `pairs` under `model`: losses, mixture, strict clean set, neighbours."""
    features = embed_pairs(model, pairs, args, precision, normalise=False)
    return bank_from_features(*features, model.logit_scale, pairs, args, log)


def bank_from_features(raw_images, raw_texts, logit_scale, pairs, args, log=print):
    """The same from the features, not normalised, of the distinct images (u, D) and captions (v, D)
    and the log temperature."""
    # 1. to 3. The loss of every pair, the mixture, and the pairs that are surely clean
    images, texts = F.normalize(raw_images, dim=1), F.normalize(raw_texts, dim=1)
    verdict = judge(images, texts, logit_scale, pairs, args, log)
    clean, gmm = verdict.clean, verdict.mixture

    # 4. The nearest clean pair of each image and caption. By cosine a clean pair is its own; with
    # embeddings as they are, as released, long ones win
    by_cosine = RECIPES[args.recipe].cosine_bank
    images_or_raw, texts_or_raw = (images, texts) if by_cosine else (raw_images, raw_texts)
    image_entry = nearest_clean(images_or_raw, pairs.image_of, clean, by_cosine)
    caption_entry = nearest_clean(texts_or_raw, pairs.text_of, clean, by_cosine)
    caption_entry = caption_entry[pairs.text_of]  # (n,)
    if by_cosine:
        caption_entry[clean] = np.flatnonzero(clean)

    info = {name: getattr(args, name) for name in COMPARED if name != "vision_model"}
    info |= {"vision_model": str(args.vision_model), "resume": args.resume,
             "beta": (mean_feature(images, pairs.image_of)
                      @ mean_feature(texts, pairs.text_of)).item(),
             "means": gmm.means_.ravel().tolist(), "weights": gmm.weights_.tolist(),
             "variances": gmm.covariances_.ravel().tolist()}
    return MemoryBank(image_entry, caption_entry, clean, verdict.loss.astype(np.float32),
                      verdict.posterior.astype(np.float32), verdict.cosine, info)


def mean_feature(features, item_of):
    """Mean (D,) over the pairs of the features (items, D) of their items, item_of (n,)."""
    count = torch.from_numpy(np.bincount(item_of, minlength=len(features))).to(features.device)
    return count.to(features.dtype) @ features / len(item_of)


def memory_bank(model, pairs, args, precision, log=print, resumed=False):
    """The bank of `pairs` from the data folder, or a new one, built by `model` and kept there.

    Raises InputError when none is there and the run is `resumed`: `model` is no initial one then.
    """
    found = load_bank(args.dataset_root, args.noise_ratio, pairs)
    if any_process(not found, args.device):
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
    for key in COMPARED:
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
        folder = Path(args.dataset_root) / "annotations" / BANK_FOLDERS[1]
        paths = save_released(bank, pairs, folder, args.noise_ratio)
    else:
        paths = [bank_path(args.dataset_root, args.noise_ratio)]
        save_bank(bank, pairs, paths[0])
    run.log(f"wrote {' and '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
