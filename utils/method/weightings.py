"""`--weighting`: how much each pair of a batch counts, one function per weighting. A weighting that
is added here, or in your own script before it calls main_NPC.main, is a choice of the option."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Weighting(NamedTuple):
    """function(**known) returns w (B,); `help` describes it. looks_ahead: A' takes its step first,
    so after_i and after_t are known. of_bank: arrays of the `MemoryBank` that the function needs.
    keeps: names of numbers per pair that the function keeps from step to step."""

    function: Callable
    help: str
    looks_ahead: bool
    of_bank: tuple
    keeps: tuple = ()


WEIGHTINGS = {}


def weighting(name, help, looks_ahead=False, of_bank=(), keeps=()):
    """Decorator that adds a function to `WEIGHTINGS`.

    The function gets keywords, (B,) each: `batch`, l(batch; A); `memory_i` and `memory_t`,
    l(M^I; A) and l(M^T; A), zeros where the memory is not used; with looks_ahead `after_i` and
    `after_t`, the same under A'; `indices`, which of the `num_pairs` training pairs these are; and
    the batch's entries in the arrays `of_bank`: posterior, cosine, loss or clean. `step`, a scalar
    tensor, is the number of steps made so far. For each name in `keeps` the function also gets a
    tensor (num_pairs,), zeros at first, and may change it in place: a history of each pair's loss,
    for instance. Checkpoints hold these tensors, and a resumed run goes on with them.
    """
    def register(function):
        WEIGHTINGS[name] = Weighting(function, help, looks_ahead, of_bank, keeps)
        return function
    return register


@weighting("npc", "the paper's negative impact", looks_ahead=True)
def negative_impact(memory_i, memory_t, after_i, after_t, **_):
    """The paper's w, (B,), in [0, 1] and always finite: r_i is the mean of the ratios l(M_i; A) /
    l(M_i; A') by image and by caption. Below 1, the step on the batch made the clean memory entries
    of pair i worse, and w_i = tanh(r_i); else w_i = 1."""
    r = (ratio(memory_i, after_i) + ratio(memory_t, after_t)) / 2
    return r.tanh().where(r < 1, 1.0)


def ratio(before, after):
    """before / after of losses >= 0; 0 / 0 counts as 1, unchanged."""
    return (before / after).where((before != 0) | (after != 0), 1.0)


@weighting("none", "1 for every pair")
def ones(batch, **_):
    """w = 1."""
    return batch.new_ones(batch.shape)


@weighting("gmm", "the mixture's posterior of being clean", of_bank=("posterior",))
def mixture_posterior(posterior, **_):
    """w = p, the posterior of the mixture's low component, see utils.method.judge."""
    return posterior


@weighting("osa", "One-Step Anti-noise as its authors' script does it",
           of_bank=("cosine", "beta"))
def one_step_anti_noise(cosine, beta, **_):
    """Weights (B,) of One-Step Anti-noise (Li et al. 2024) as its script computes them from a
    frozen model: how far the logit lies above that of random pixels with random tokens, over the
    batch's largest, is s; w = s^2 (1 - s^2). The best pair of a batch weighs 0. The temperature
    cancels: cosines (B,) do, and their mean beta over random inputs."""
    s = (cosine - beta).clamp(min=0)
    s = s / s.max().clamp(min=torch.finfo(s.dtype).tiny)
    return s.square() * (1 - s.square())
