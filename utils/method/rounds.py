"""The judge's rounds: it learns from what it finds clean, and judges again (`--judge_rounds`)."""

import argparse
import copy
import math

import numpy as np
import torch

import clip
from utils.distributed import main_first
from utils.method.batches import Batches
from utils.method.features import embed_pairs, mean_random_cosine, read_features
from utils.method.judge import log_verdict, verdict_on
from utils.method.memorybank import asks_for_beta
from utils.method.optimizer import adamw, clip_gradients, replays, set_rate
from utils.method.pairs import for_model
from utils.method.passes import Passes
from utils.progress import progress
from utils.reading.images import Loader, in_memory

WARMUP = 4  # steps of a round in which the rate rises


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
        model, pairs = other_judge(pairs, args, precision)

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


def other_judge(pairs, args, precision):
    """(model, `pairs` as it reads them) of `--judge`."""
    with main_first():
        model, preprocess = clip.load(args.judge, device=args.device)
    length = min(args.context_length, model.context_length)
    own = with_options(args, context_length=length)
    return precision.prepare(model), for_model(pairs, own, preprocess, log=lambda _: None)


def train_judge(model, pairs, clean, args, precision, rng):
    """A copy of `model` after `--judge_steps` plain CLIP steps on the pairs that are clean, (n,)
    bool, which `rng` shuffles. The rate rises to `--judge_lr` over `WARMUP` steps and stays."""
    batches = draw_steps(np.flatnonzero(clean), args.batch_size, args.judge_steps, rng)
    loader = Loader(args, Batches(pairs, few_shapes=replays(args)),
                    0 if in_memory(pairs.images) else len(batches), sampler=batches,
                    batch_size=None)
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
