"""Losses, weights and the learning rate against closed forms and literal loops."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from utils.method.passes import pair_losses
from utils.method.recipes import RECIPES
from utils.method.weightings import negative_impact, one_step_anti_noise
from utils.training.loop import Schedule, warmup_cosine

F64 = torch.float64


def features(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, width, generator=generator, dtype=F64), dim=1)
            for _ in range(2)]


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# ---- the contrastive loss -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("scale", [0.0, 2.65, math.log(100)])
def test_pair_losses_are_the_two_cross_entropies(n, scale):
    images, texts = features(n, 5)
    losses = pair_losses(images, texts, torch.tensor(scale, dtype=F64))
    assert losses.dtype == F64 and losses.shape == (n,)
    for i in range(n):
        own = math.exp(scale) * float(images[i] @ texts[i])
        row = [math.exp(scale) * float(images[i] @ texts[j]) for j in range(n)]
        column = [math.exp(scale) * float(images[j] @ texts[i]) for j in range(n)]
        i2t = math.log(sum(math.exp(x - own) for x in row))
        t2i = math.log(sum(math.exp(x - own) for x in column))
        assert float(losses[i]) == pytest.approx((i2t + t2i) / 2, abs=1e-12)


def test_loss_has_the_gradient_of_finite_differences():
    images, texts = features(4, 3)
    scale = torch.tensor(1.5, dtype=F64)
    inputs = [x.requires_grad_() for x in (images, texts, scale)]
    assert torch.autograd.gradcheck(pair_losses, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss_is_fp32_of_half_features_and_under_autocast(dtype):
    images, texts = (x.to(dtype) for x in features(9, 16))
    scale = torch.tensor(math.log(100))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        losses = pair_losses(images, texts, scale)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, pair_losses(images.float(), texts.float(), scale))


# ---- the paper's weights ------------------------------------------------------------------------


def test_weights_are_tanh_of_the_mean_ratio_below_one_and_one_above():
    before_i, after_i = tensor(1.0, 2.0, 0.5, 1.0, 3.0), tensor(2.0, 1.0, 2.0, 1.0, 2.0)
    before_t, after_t = tensor(1.0, 3.0, 0.5, 1.0, 1.0), tensor(4.0, 1.0, 0.5, 1.0, 2.0)
    w = negative_impact(before_i, before_t, after_i, after_t)
    r = [(0.5 + 0.25) / 2, 2.5, (0.25 + 1) / 2, 1.0, (1.5 + 0.5) / 2]
    expected = [1.0 if x >= 1 else math.tanh(x) for x in r]
    assert w.tolist() == pytest.approx(expected, abs=1e-15)
    assert w[3] == 1  # r = 1 is no harm: 1, not tanh(1)


@pytest.mark.parametrize("before, after, ratio", [
    (0.0, 0.0, 1.0), (1.0, 0.0, math.inf), (0.0, 1.0, 0.0), (1e-45, 0.0, math.inf)])
def test_weights_at_zero_losses(before, after, ratio):
    other = 0.4
    x = [torch.tensor([v], dtype=torch.float32) for v in (before, after, other, 1.0)]
    r = (ratio + other) / 2
    expected = 1.0 if r >= 1 else math.tanh(r)
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        before_i, after_i, before_t, after_t = (x[k] for k in order)
        w = negative_impact(before_i, before_t, after_i, after_t)
        assert float(w) == pytest.approx(expected, rel=1e-6)


def test_weights_are_always_finite_and_at_most_one():
    values = torch.tensor([0.0, 1e-45, 1e-38, 1e-7, 1.0, 50.0, 1e38])
    grid = torch.cartesian_prod(values, values, values, values)
    w = negative_impact(*grid.T)
    assert w.isfinite().all() and (w >= 0).all() and (w <= 1).all()
    unchanged = negative_impact(grid[:, 0], grid[:, 1], grid[:, 0], grid[:, 1])
    assert (unchanged == 1).all()


# ---- One-Step Anti-noise ------------------------------------------------------------------------


def test_one_step_anti_noise_is_the_script_s():
    """Literally: scores of the frozen estimator, the threshold taken off, negative ones zero, over
    the largest of the batch, s^2 (1 - s^2). The script's logits are cosines times 100."""
    cosine, beta = tensor(0.31, 0.28, 0.05, 0.19, 0.12), 0.11
    scores = [max(0.0, 100 * float(c) - 100 * beta) for c in cosine]
    scores = [s / max(scores) for s in scores]
    expected = [s * s * (1 - s * s) for s in scores]
    w = one_step_anti_noise(cosine, tensor(*[beta] * 5))
    assert w.tolist() == pytest.approx(expected, abs=1e-12)
    assert w[0] == 0 and w[2] == 0 and (w[[1, 3, 4]] > 0).all()  # the best pair weighs nothing
    assert (one_step_anti_noise(cosine, tensor(*[0.5] * 5)) == 0).all()


# ---- the learning rate --------------------------------------------------------------------------


def schedule(recipe, epochs=5, warmup=500, steps=1000, pairs=256_000, lr=2e-7):
    args = argparse.Namespace(lr=lr, warmup=warmup, epochs=epochs)
    return Schedule(args, RECIPES[recipe], steps, pairs)


def test_rate_rises_linearly_to_the_base_and_falls_as_a_cosine_to_zero():
    rates = [warmup_cosine(t, 3.0, 10, 100) for t in range(101)]
    assert rates[:10] == pytest.approx([3 * (t + 1) / 10 for t in range(10)])
    assert rates[10:] == pytest.approx([1.5 * (1 + math.cos(math.pi * t / 90)) for t in range(91)])


@pytest.mark.parametrize("warmup, total", [(0, 10), (10, 10), (500, 12), (0, 1)])
def test_any_warmup_gives_rates_between_zero_and_the_base(warmup, total):
    rates = [warmup_cosine(t, 2.0, warmup, total) for t in range(total)]
    assert all(0 <= rate <= 2 for rate in rates)
    assert rates[0] == (2.0 if warmup == 0 else 2.0 / warmup)


def test_paper_recipe_runs_the_cosine_over_optimiser_steps():
    rate = schedule("paper")
    assert rate(0, 0) == pytest.approx(2e-7 / 500)
    assert rate(0, 499) == rate(0, 500) == pytest.approx(2e-7)
    assert rate(2, 750) == pytest.approx(1e-7)  # half of the 4,500 steps behind the warm-up
    assert rate(4, 999) == pytest.approx(1e-7 * (1 + math.cos(math.pi * 4499 / 4500)))
    assert rate(1, 0) == pytest.approx(1e-7 * (1 + math.cos(math.pi * 500 / 4500)))


@pytest.mark.parametrize("steps, expected", [(1000, 500), (900, 450), (2, 1), (1, 0)])
def test_warmup_is_by_default_a_tenth_of_few_steps(steps, expected):
    rate = schedule("paper", warmup=None, steps=steps)
    assert rate.warmup == expected and rate.peak == 2e-7
    assert max(rate(e, s) for e in range(5) for s in range(steps)) == pytest.approx(2e-7)
    assert schedule("released", warmup=None, steps=steps).warmup == 500


def test_peak_is_what_a_long_warmup_comes_to():
    rate = schedule("paper", epochs=10, steps=2)
    assert rate.peak == pytest.approx(rate(9, 1)) == pytest.approx(2e-7 * 20 / 500)


def test_released_recipe_is_a_staircase_over_the_epochs():
    rate = schedule("released")
    levels = [rate(epoch, 600) / 2e-7 for epoch in range(5)]
    assert levels == pytest.approx([1, 0.905, 0.655, 0.345, 0.095], abs=2e-3)
    for epoch in range(5):  # nearly constant within an epoch, behind the warm-up
        assert rate(epoch, 999) / rate(epoch, 500) == pytest.approx(1, abs=0.02)
    t = 2 * 256_000 + 321
    exact = 1e-7 * (1 + math.cos(math.pi * (t - 500) / (5 * 256_000 - 500)))
    assert rate(2, 321) == pytest.approx(exact, rel=1e-12)
    assert rate(0, 99) == pytest.approx(2e-7 / 5)
