"""Learning rate: linear warm-up, then a cosine to zero."""

import math

WARMUP = 500  # steps, of runs that are long enough


def warmup_cosine(t, base, warmup, total):
    """Learning rate at time `t` (0-based): base (t+1)/warmup while t < warmup, afterwards half a
    cosine from `base` at t = warmup to 0 at t = total."""
    if t < warmup:
        return base * (t + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup)))


class Schedule:
    """The learning rate of each optimiser step under a recipe.

    `paper`: t counts optimiser steps, the total is epochs x steps an epoch. `released`: t is
    epoch x captions + batch index and the total is epochs x captions, so that the rate hardly moves
    within an epoch and falls like a staircase between them. The warm-up is `--warmup`, or else
    `WARMUP` steps, of which only `released` takes more than a tenth of all. `peak`: the highest
    rate of the run.
    """

    def __init__(self, args, recipe, steps_per_epoch, num_pairs):
        self.base, self.warmup, steps = args.lr, args.warmup, args.epochs * steps_per_epoch
        if self.warmup is None:
            self.warmup = min(WARMUP, round(steps / 10)) if recipe.schedule_per_step else WARMUP
        self.stride = steps_per_epoch if recipe.schedule_per_step else num_pairs
        self.total = args.epochs * self.stride
        self.peak = self.base * min(1, steps / max(1, self.warmup))

    def __call__(self, epoch, step):
        """Learning rate of batch `step` of `epoch`, both 0-based."""
        return warmup_cosine(epoch * self.stride + step, self.base, self.warmup, self.total)
