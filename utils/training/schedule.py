"""Learning rate: linear warm-up, then a cosine to zero."""

import math


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
    within an epoch and falls like a staircase between them.
    """

    def __init__(self, args, recipe, steps_per_epoch, num_pairs):
        self.base, self.warmup = args.lr, args.warmup
        self.stride = steps_per_epoch if recipe.schedule_per_step else num_pairs
        self.total = args.epochs * self.stride

    def __call__(self, epoch, step):
        """Learning rate of batch `step` of `epoch`, both 0-based."""
        return warmup_cosine(epoch * self.stride + step, self.base, self.warmup, self.total)
