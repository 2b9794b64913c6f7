"""The judge's rounds: it learns from what it finds clean, and judges again (`--judge_rounds`)."""

import argparse
import copy
import itertools
import math

import numpy as np
import torch
from tqdm import tqdm

import clip
from utils.distributed import main_first
from utils.method.batches import training_loader
from utils.method.features import embed_pairs, mean_random_cosine, read_features
from utils.method.judge import log_verdict, separation, verdict_on
from utils.method.optimizer import adamw, clip_gradients
from utils.method.pairs import for_model, take
from utils.method.passes import Passes

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # learning rates that a judge chooses from
WARMUP = 4  # steps of a round
HELD_OUT, MOST_HELD_OUT = 0.2, 2000  # share of the images that it chooses by, and their number
FEW, RATE_OF_FEW = 10, 1e-5  # so few images, or clean pairs of others, say nothing of a rate


def changed(args, **values):
    """A copy of the options with other values of some."""
    return argparse.Namespace(**{**vars(args), **values})


def judge_pairs(model, pairs, args, precision, log=print):
    """What the judge that the options name, which is `model` unless they name another, finds.

    Returns (`Verdict`, features (u, D) and (v, D) of the judge, tensors or `Features`, dict of
    numbers about it). With `--judge_features` no model is asked.
    """
    args = changed(args, seed=args.noise_seed)
    if args.judge_features:
        features, scale = read_features(args.judge_features, pairs, args.device)
        verdict = verdict_on(features, scale, pairs, args)
        log_verdict(pairs, verdict, args, log)
        return verdict, features, {}
    if args.judge:
        model, pairs = other_judge(pairs, args, precision)
    verdict, features = judged_by(model, pairs, args, precision)
    info = {"beta": mean_random_cosine(model, args, precision)}
    cosine = verdict.cosine  # of the initial model
    for number in range(1, args.judge_rounds + 1):
        rate = args.judge_lr or info.get("judge_rate") or best_rate(model, pairs, verdict.clean,
                                                                    args, precision, log)
        info["judge_rate"] = rate
        log(f"judge, round {number} of {args.judge_rounds}: {args.judge_steps} steps at "
            f"{rate:g} on {verdict.clean.sum()} pairs")
        taught = teach(model, pairs, verdict.clean, rate, args, precision, number)
        verdict, features = judged_by(taught, pairs, args, precision, number)
    log_verdict(pairs, verdict, args, log)
    return verdict._replace(cosine=cosine), features, info


def judged_by(model, pairs, args, precision, number=0):
    """(`Verdict` on `pairs` after round `number`, the features) of a model."""
    features = embed_pairs(model, pairs, args, precision)
    return verdict_on(features, model.logit_scale, pairs, args, number), features


def other_judge(pairs, args, precision):
    """(model, `pairs` as it reads them) of `--judge`."""
    with main_first():
        model, preprocess = clip.load(args.judge, device=args.device)
    length = min(args.context_length, model.context_length)
    own = changed(args, context_length=length)
    return precision.prepare(model), for_model(pairs, own, preprocess, log=lambda _: None)


def teach(model, pairs, clean, rate, args, precision, number):
    """A copy of `model` after `--judge_steps` steps of AdamW, as in training, on the pairs that are
    clean, (n,) bool. `number`, of the round, goes into the order of the pairs."""
    size = min(args.batch_size, int(clean.sum()))
    own = changed(args, batch_size=size, lr=rate)
    loader = training_loader(own, pairs, chosen=np.flatnonzero(clean))
    taught, precision = copy.deepcopy(model), precision.anew()
    taught.grad_checkpointing = args.grad_checkpointing
    optimizer = adamw(taught, own)
    steps = tqdm(range(args.judge_steps), desc="judge", unit="step", disable=None, leave=False)
    for step, batch in zip(steps, endless(loader, number), strict=False):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARMUP)
        passes = Passes(taught, batch.to(args.device), precision, accum_steps=args.accum_steps)
        passes.backward(passes.batch.mean())
        precision.scaler.unscale_(optimizer)
        clip_gradients(taught, args.clip_grad)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            taught.logit_scale.clamp_(max=math.log(100))
    return taught


def endless(loader, number):
    """The batches of one epoch after the other, in an order that depends on `number`."""
    for epoch in itertools.count():
        loader.sampler.epoch = 1000 * number + epoch
        yield from loader


def best_rate(model, pairs, clean, args, precision, log):
    """The learning rate among `RATES` under which a copy of `model`, taught on clean pairs (n,)
    bool for half of a round's steps, best tells pairs from mismatches on images that it has not
    seen: of the decades, then of the best one and the half decades beside it."""
    images = np.random.default_rng([args.seed, 1]).permutation(len(pairs.image_ids))
    held_out = np.isin(pairs.image_of, images[: min(MOST_HELD_OUT, int(HELD_OUT * len(images)))])
    lessons = clean & ~held_out
    if min(len(images), lessons.sum()) < FEW:
        log(f"judge, learning rate: {RATE_OF_FEW:g}, as there is too little to choose it by")
        return RATE_OF_FEW
    few, half = take(pairs, held_out), changed(args, judge_steps=-(-args.judge_steps // 2))
    found = {}

    def best_of(rates):
        for rate in rates:
            taught = teach(model, pairs, lessons, rate, half, precision, 0)
            found[rate] = separation(judged_by(taught, few, args, precision, 1)[0])
        return RATES.index(max(found, key=found.get))

    decade = best_of(RATES[::2])
    beside = [rate for rate in RATES[max(0, decade - 1) : decade + 2] if rate not in found]
    best = RATES[best_of(beside)]
    log("judge, learning rate: " + ", ".join(f"{rate:g} separates {found[rate]:.4f}"
                                             for rate in sorted(found)))
    return best
