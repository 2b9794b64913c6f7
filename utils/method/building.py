"""The making of the memory bank: a judge finds the strict clean set, in which every image and
caption finds its nearest entry."""

import numpy as np
import torch

from utils.distributed import any_process, from_main, is_main
from utils.errors import InputError
from utils.files import require_writable
from utils.method.features import Features, nearest, normalised, random_rows
from utils.method.judge import judge_pairs
from utils.method.memorybank import (
    UNWRITABLE,
    MemoryBank,
    bank_name,
    bank_path,
    load_bank,
    save_bank,
)
from utils.method.recipes import RECIPES
from utils.reading.layout import ratio_name


def memory_bank(model, pairs, run):
    """The bank of `pairs`: the one at hand in the data folder, or else a new one, built by `model`
    and kept there. `run.found["bank"]` becomes its file name.

    A run that continues another takes that one's bank. Raises InputError when it is not there, as
    `model` is no initial one then, or when the data folder cannot be written.
    """
    args, log, resumed = run.args, run.log, run.state.get("args")
    name = resumed.get("bank") if resumed else bank_name(model, pairs, args)
    if not name:
        raise InputError(f"{run.resume} was trained by another script, or its memory bank is "
                         "gone: start from its weights with --vision_model instead")
    bank, path = load_bank(name, pairs, args, log) or (None, bank_path(args.dataset_root, name))
    run.found["bank"] = path.name
    if not any_process(bank is None, run.device):
        log(f"memory bank: {path}")
        return bank
    if resumed:
        raise InputError(f"the memory bank {name} is not in {args.dataset_root}, and only the "
                         f"initial model can build it, not {run.resume}: run get_memorybank.py "
                         "with that model and the same options first, or start from these weights "
                         "with --vision_model")
    if is_main():
        require_writable(path.parent, UNWRITABLE)
    log(f"No memory bank for noise ratio {ratio_name(args.noise_ratio)} yet: building {path}")
    bank = from_main(build_bank(model, pairs, args, run.precision, log))
    if is_main():
        save_bank(bank, pairs, path, replace=False)  # of two runs the first one's stays
    return bank


def build_bank(model, pairs, args, precision, log=print):
    """The `MemoryBank` of `pairs`, judged by `model` or as the options say; None in all processes
    but the main one."""
    verdict, features = judge_pairs(model, pairs, args, precision, log)
    return bank_of(verdict, *features, pairs, args) if is_main() else None


def bank_of(verdict, raw_images, raw_texts, pairs, args):
    """The `MemoryBank` of a verdict on `pairs`, and of the judge's features, not normalised, of the
    distinct images (u, D) and captions (v, D). Entries are looked for among all clean pairs.

    By cosine a clean pair is its own nearest entry; with embeddings as they are, as released, long
    ones win.
    """
    by_cosine, clean = RECIPES[args.recipe].cosine_bank, verdict.clean
    images, texts = raw_images, raw_texts
    if by_cosine:
        images, texts = normalised(images), normalised(texts)
    image_entry = nearest_clean(images, pairs.image_of, clean, by_cosine)
    caption_entry = nearest_clean(texts, pairs.text_of, clean, by_cosine)
    caption_entry = caption_entry[pairs.text_of]  # (n,)
    if by_cosine:
        caption_entry[clean] = np.flatnonzero(clean)
    info = {"wrong_share": verdict.wrong_share}
    if verdict.beta is not None:
        info["beta"] = verdict.beta
    return MemoryBank(image_entry, caption_entry, clean, verdict.loss.astype(np.float32),
                      verdict.posterior.astype(np.float32), verdict.cosine, info)


def nearest_clean(features, item_of, clean, own_first=True, most=None, seed=0):
    """Nearest strict-clean pair of each distinct item (image or caption): (items,) int64.

    features (items, D), tensor or `Features`, compared by dot product; item_of (n,) the item of
    each pair; clean (n,) bool. The lowest clean pair stands for its item. With `own_first` an item
    that has a clean pair finds itself, as it does by cosine; the others look among `most` random
    clean items, drawn by `seed`, or among all.
    """
    clean_pairs = np.flatnonzero(clean)
    clean_items, first = np.unique(item_of[clean_pairs], return_index=True)
    entry = clean_pairs[first]  # of each clean item, its lowest clean pair
    result = np.empty(len(features), np.int64)
    searched = np.arange(len(features))
    if own_first:
        result[clean_items] = entry
        searched = np.setdiff1d(searched, clean_items)
    some = random_rows(len(clean_items), most, seed)
    queries, keys = (Features(features, chosen=torch.from_numpy(items).to(features.device))
                     for items in (searched, clean_items[some]))
    found = nearest(queries, keys, title="nearest clean pairs")[1][:, 0]
    result[searched] = entry[some[found.cpu().numpy()]]
    return result
