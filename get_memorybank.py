"""Judge the training pairs and build the memory bank: for each image and caption, a clean pair that
resembles it.

    python get_memorybank.py --dataset coco --dataset_root PATH --noise_ratio 0.4
    python get_memorybank.py --dataset coco --dataset_root PATH --noise_ratio 0.4 --judge_rounds 2

The judge (utils.method.judge) finds the strict clean set, in which every image and caption finds
its nearest entry. Banks of different judges lie beside each other.
"""

import argparse
import copy
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import clip
from data import take, training_loader, training_pairs
from params import parse_args
from utils.distributed import any_process, is_main, main_first
from utils.errors import InputError, command
from utils.method.features import embed_pairs, mean_random_cosine, read_features
from utils.method.judge import judge, report, separation
from utils.method.memorybank import (
    MADE_WITH,
    MemoryBank,
    bank_name,
    bank_path,
    load_bank,
    nearest_clean,
    save_bank,
)
from utils.method.neighbours import unit
from utils.method.optimizer import adamw
from utils.method.passes import Passes
from utils.method.recipes import RECIPES
from utils.method.released_bank import save_released
from utils.reading.layout import BANK_FOLDERS, ratio_name
from utils.training.precision import Precision
from utils.training.run import Run

RATES = (1e-6, 1e-5, 1e-4, 1e-3)  # learning rates that a judge chooses from
WARMUP = 4  # steps of a round
HELD_OUT, MOST_HELD_OUT = 0.2, 2000  # share of the images that it chooses by, and their number


# ---- the judge's rounds --------------------------------------------------------------------------


def judge_pairs(model, pairs, args, precision, log=print):
    """What the judge that the options name, which is `model` unless they name another, finds.

    Returns (`Verdict`, raw features (u, D) and (v, D) of the judge, tensors or `Rows`, dict of
    numbers about it). With `--judge_features` no model is asked.
    """
    args = argparse.Namespace(**{**vars(args), "seed": args.noise_seed})
    if args.judge_features:
        features, scale = read_features(args.judge_features, pairs, args.device)
        verdict = judge(*map(unit, features), scale, pairs, args)
        report(pairs, verdict, args, log)
        return verdict, features, {}
    if args.judge:
        model, pairs = other_judge(args, precision)
    features = embed_pairs(model, pairs, args, precision, normalise=False)
    verdict = judge(*map(unit, features), model.logit_scale, pairs, args)
    info = {"beta": mean_random_cosine(model, args, precision)}
    cosine = verdict.cosine  # of the initial model
    for number in range(1, args.judge_rounds + 1):
        rate = args.judge_lr or info.get("judge_rate") or best_rate(model, pairs, verdict.clean,
                                                                    args, log)
        info["judge_rate"] = rate
        log(f"judge, round {number} of {args.judge_rounds}: {args.judge_steps} steps at "
            f"{rate:g} on {verdict.clean.sum()} pairs")
        taught = teach(model, pairs, verdict.clean, rate, args, number)
        features = embed_pairs(taught, pairs, args, precision, normalise=False)
        verdict = judge(*map(unit, features), taught.logit_scale, pairs, args, number)
    report(pairs, verdict, args, log)
    return verdict._replace(cosine=cosine), features, info


def model_and_pairs(run):
    """(model, training pairs) of a command that judges them. With `--judge_features` there is no
    model, and neither tokens nor images are prepared for one."""
    args = run.args
    model, preprocess = (None, None) if args.judge_features else run.load_model()
    return model, training_pairs(args, preprocess, run.log)


def other_judge(args, precision):
    """(model, training pairs as it reads them) of `--judge`."""
    with main_first():
        model, preprocess = clip.load(args.judge, device=args.device)
    length = min(args.context_length, model.context_length)
    own = argparse.Namespace(**{**vars(args), "context_length": length})
    return precision.prepare(model), training_pairs(own, preprocess, lambda _: None)


def teach(model, pairs, clean, rate, args, number):
    """A copy of `model` after `--judge_steps` steps of AdamW, as in training, on the pairs that are
    clean, (n,) bool. `number`, of the round, goes into the order of the pairs."""
    size = min(args.batch_size, int(clean.sum()))
    own = argparse.Namespace(**{**vars(args), "batch_size": size, "lr": rate})
    loader = training_loader(own, pairs, chosen=np.flatnonzero(clean))
    taught, precision = copy.deepcopy(model), Precision(args.precision, args.device)
    taught.grad_checkpointing = args.grad_checkpointing
    optimizer = adamw(taught, own)
    steps = tqdm(range(args.judge_steps), desc="judge", unit="step", disable=None, leave=False)
    for step, batch in zip(steps, endless(loader, number), strict=False):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARMUP)
        passes = Passes(taught, batch.to(args.device), precision, accum_steps=args.accum_steps)
        passes.backward(passes.batch().mean())
        precision.step(taught, optimizer, args.clip_grad or math.inf)
        precision.scaler.update()
        with torch.no_grad():
            taught.logit_scale.clamp_(max=math.log(100))
    return taught


def endless(loader, number):
    """The batches of one epoch after the other, in an order that depends on `number`."""
    for epoch in itertools.count():
        loader.sampler.epoch = 1000 * number + epoch
        yield from loader


def best_rate(model, pairs, clean, args, log):
    """The learning rate among `RATES` under which a copy of `model`, taught on clean pairs (n,)
    bool, best tells pairs from mismatches on images that it has not seen."""
    if len(pairs.image_ids) < 10:
        return RATES[1]
    images = np.random.default_rng([args.seed, 1]).permutation(len(pairs.image_ids))
    held_out = np.isin(pairs.image_of, images[: min(MOST_HELD_OUT, int(HELD_OUT * len(images)))])
    few, precision = take(pairs, held_out), Precision(args.precision, args.device)
    found = {}
    for rate in RATES:
        taught = teach(model, pairs, clean & ~held_out, rate, args, 0)
        features = map(unit, embed_pairs(taught, few, args, precision, normalise=False))
        found[rate] = separation(judge(*features, taught.logit_scale, few, args, 1))
    log("judge, learning rate: " + ", ".join(f"{rate:g} separates {value:.4f}"
                                             for rate, value in found.items()))
    return max(found, key=found.get)


# ---- the bank ------------------------------------------------------------------------------------


def build_bank(model, pairs, args, precision, log=print):
    """The `MemoryBank` of `pairs`, judged by `model` or as the options say."""
    verdict, features, info = judge_pairs(model, pairs, args, precision, log)
    return bank_of(verdict, *features, pairs, args, info)


def bank_of(verdict, raw_images, raw_texts, pairs, args, info):
    """The `MemoryBank` of a verdict on `pairs`, and of the judge's features, not normalised, of the
    distinct images (u, D) and captions (v, D). It looks among all clean pairs.

    By cosine a clean pair is its own nearest entry; with embeddings as they are, as released, long
    ones win.
    """
    by_cosine, clean = RECIPES[args.recipe].cosine_bank, verdict.clean
    images, texts = (unit(raw_images), unit(raw_texts)) if by_cosine else (raw_images, raw_texts)
    image_entry = nearest_clean(images, pairs.image_of, clean, by_cosine)
    caption_entry = nearest_clean(texts, pairs.text_of, clean, by_cosine)
    caption_entry = caption_entry[pairs.text_of]  # (n,)
    if by_cosine:
        caption_entry[clean] = np.flatnonzero(clean)
    options = {name: getattr(args, name) for name in MADE_WITH} | {"seed": args.noise_seed}
    if not args.judge_features:
        options |= {name: getattr(args, name) for name in ("vision_model", "activation", "resume")}
    return MemoryBank(image_entry, caption_entry, clean, verdict.loss.astype(np.float32),
                      verdict.posterior.astype(np.float32), verdict.cosine,
                      {**options, **info, "wrong_share": verdict.wrong_share})


def memory_bank(model, pairs, args, precision, log=print, resumed=None):
    """The bank of `pairs` from the data folder, or a new one, built by `model` and kept there. Its
    file's name becomes args.bank.

    resumed: the options (dict) that the checkpoint holds which this run continues, whose bank it
    takes. Raises InputError when that is not there, as `model` is no initial one then.
    """
    name = resumed.get("bank") if resumed else bank_name(model, pairs, args)
    found = load_bank(name, pairs, args, log)
    if any_process(not found, args.device):
        if not name:
            raise InputError(f"{args.resume} was trained by another script, or its memory bank is "
                             "gone: start from its weights with --vision_model instead")
        if resumed:
            raise InputError(f"the memory bank {name} is not in "
                             f"{args.dataset_root}, and only the initial model can build it, not "
                             f"{args.resume}: run get_memorybank.py with that model and the same "
                             "options first, or start from these weights with --vision_model")
        path = bank_path(args.dataset_root, name)
        log(f"No memory bank for noise ratio {ratio_name(args.noise_ratio)} yet: building {path}")
        verdict, features, info = judge_pairs(model, pairs, args, precision, log)
        with main_first():
            if is_main():
                bank = bank_of(verdict, *features, pairs, args, info)
                save_bank(bank, pairs, path, replace=False)  # of two runs the first one's stays
        found = load_bank(name, pairs, args, log)
    else:
        log(f"memory bank: {found[1]}")
    args.bank = found[1].name
    return found[0]


@command
def main(argv=None):
    args = parse_args("memorybank", argv)
    run = Run(args)
    model, pairs = model_and_pairs(run)
    bank = build_bank(model, pairs, args, run.precision, run.log)
    if not is_main():
        return
    if args.format == "released":
        folder = Path(args.dataset_root) / "annotations" / BANK_FOLDERS[1]
        paths = save_released(bank, pairs, folder, args.noise_ratio)
    else:
        paths = [bank_path(args.dataset_root, bank_name(model, pairs, args))]
        save_bank(bank, pairs, paths[0])
    run.log(f"wrote {' and '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
