"""The NPC step against a literal transcription: two models, every pass made for itself; its losses,
weights and learning rate against closed forms.

The reference follows the equations and the table of docs/fidelity.md point by point, shares nothing
and uses nothing of the repository but the towers.
"""

import argparse
import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import parsed

import clip
import main_NPC
from main_CLIP import Baseline
from main_NPC import NPC
from utils.errors import InputError
from utils.method.batches import Batches
from utils.method.memorybank import MemoryBank
from utils.method.optimizer import Precision
from utils.method.pairs import Pairs
from utils.method.passes import pair_losses
from utils.method.recipes import RECIPES
from utils.method.weightings import negative_impact, one_step_anti_noise
from utils.reading.images import ImagesInMemory
from utils.training.loop import Schedule, warmup_cosine

TEXT = {"context_length": 12, "vocab_size": 50, "transformer_width": 64, "transformer_heads": 1,
        "transformer_layers": 1, "embed_dim": 16, "image_resolution": 32}
TOWERS = {"vit": {"vision_layers": 1, "vision_width": 64, "vision_patch_size": 16},
          "rn": {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}}
NUM_PAIRS, NUM_IMAGES, BATCH = 30, 6, 10
FIRST = list(range(BATCH))  # the pairs of a batch
FP32, F64 = Precision("fp32", torch.device("cpu")), torch.float64


def options(**changes):
    return parsed(**{"lr": 1e-3, "clip_grad": 0.5, "weighting": "npc", "memory_loss_weight": 1.0,
                     "device": "cpu", **changes})


class StubRun:
    """What the step needs of a `utils.training.run.Run`."""

    def __init__(self, args):
        self.args, self.device = args, torch.device("cpu")
        self.recipe, self.precision = RECIPES[args.recipe], FP32


def make_data(seed=0):
    """Pairs over few images, so that batches and memory overlap, and a bank of any entries."""
    rng = np.random.default_rng(seed)
    crops = rng.integers(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=np.uint8)
    images = ImagesInMemory(torch.from_numpy(crops), torch.device("cpu"))
    lengths = rng.integers(3, 10, NUM_PAIRS - 2)
    tokens = np.zeros((NUM_PAIRS - 2, 12), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = rng.integers(1, 48, length - 1)
        row[length - 1] = 49
    text_of = np.concatenate([np.arange(NUM_PAIRS - 2), [3, 5]])  # two captions occur twice
    pairs = Pairs(images, list(range(NUM_IMAGES)), np.arange(NUM_PAIRS) % NUM_IMAGES,
                  [""] * NUM_PAIRS, text_of, torch.from_numpy(tokens), None)
    bank = MemoryBank(rng.integers(0, NUM_PAIRS, NUM_IMAGES), rng.integers(0, NUM_PAIRS, NUM_PAIRS))
    bank.caption_entry[::3] = np.arange(0, NUM_PAIRS, 3)  # clean pairs are their own entries
    bank.posterior = rng.random(NUM_PAIRS)
    return pairs, bank


def make_model(tower, seed=0):
    torch.manual_seed(seed)
    model = clip.CLIP(**TEXT, **TOWERS[tower]).double().eval()
    with torch.no_grad():  # lively statistics and residual branches, so that BatchNorm matters
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def reference_adamw(model, args):
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(args.beta1, args.beta2),
                             eps=args.eps, weight_decay=args.weight_decay, foreach=False)


def reference_steps(A, pairs, bank, batches, args):
    """A after the steps, and per step (w, loss, gradient norm), literally as the recipe's fields
    say. The siamese is in eval mode; it scores the memory unless A trains on it."""
    recipe, siamese = RECIPES[args.recipe], copy.deepcopy(A)
    optimizer, siamese_optimizer = reference_adamw(A, args), reference_adamw(siamese, args)
    history = []
    for batch in batches:
        memory_i = bank.image_entry[pairs.image_of[batch]]
        memory_t = bank.caption_entry[batch]
        siamese.load_state_dict(A.state_dict())
        siamese.eval()
        with torch.no_grad():
            before_i = naive.losses(siamese, pairs, memory_i)
            before_t = naive.losses(siamese, pairs, memory_t)
        siamese_optimizer.zero_grad()
        loss = naive.losses(siamese, pairs, batch).mean()
        if args.recipe == "released":  # (i2t + t2i) without the half, backward twice
            (2 * loss).backward(retain_graph=True)
            (2 * loss).backward()
        else:
            (recipe.siamese_gradient * loss).backward()
        siamese_optimizer.step()
        with torch.no_grad():
            r = (before_i / naive.losses(siamese, pairs, memory_i)
                 + before_t / naive.losses(siamese, pairs, memory_t)) / 2
        w = {"npc": torch.where(r < 1, torch.tanh(r), torch.ones_like(r)),
             "none": torch.ones_like(r),
             "gmm": torch.from_numpy(bank.posterior[batch])}[args.weighting]

        A.train(recipe.batch_norm_trains)
        loss = naive.losses(A, pairs, batch)
        A.eval()
        optimizer.zero_grad()
        weighted = (w * loss).mean() if recipe.per_sample else w.mean() * loss.mean()
        if recipe.trains_on_memory:
            before_i = naive.losses(A, pairs, memory_i)
            before_t = naive.losses(A, pairs, memory_t)
        total = weighted + args.memory_loss_weight * (before_i.mean() + before_t.mean())
        total.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in A.parameters()))
        for p in A.parameters():
            p.grad *= min(1.0, args.clip_grad / (norm + 1e-6))
        optimizer.step()
        A.logit_scale.data.clamp_(max=recipe.max_logit_scale)
        history.append((w, total.item(), norm))
    return history


def our_steps(A, pairs, bank, batches, args):
    npc = NPC(A, StubRun(args), bank)
    data = Batches(pairs, bank)
    history = []
    for batch in batches:
        A.train(RECIPES[args.recipe].batch_norm_trains)
        numbers = npc.step(data[batch])
        loss = numbers.get("loss", numbers["batch_loss"])  # the same where there is no memory
        history.append((numbers["w"], loss.item(), numbers["grad_norm"].item()))
    return history


def compare(tower, tolerance=1e-9, batches=None, **changes):
    """Steps with both codes: w, loss, gradient norm, parameters agree. Returns the weights."""
    args = options(**changes)
    pairs, bank = make_data()
    if batches is None:
        order = np.random.default_rng(1).permutation(NUM_PAIRS)
        batches = [part.tolist() for part in np.split(np.concatenate([order, order[:BATCH]]), 4)]
    ours, reference = make_model(tower), make_model(tower)
    expected = reference_steps(reference, pairs, bank, batches, args)
    got = our_steps(ours, pairs, bank, batches, args)
    for (w, loss, norm), (w0, loss0, norm0) in zip(got, expected, strict=True):
        torch.testing.assert_close(w, w0, rtol=0, atol=tolerance)
        assert loss == pytest.approx(loss0, abs=tolerance)
        assert norm == pytest.approx(norm0, abs=tolerance)
    after = reference.state_dict()
    for name, p in ours.state_dict().items():
        torch.testing.assert_close(p, after[name], rtol=0, atol=tolerance,
                                   msg=lambda m, n=name: f"{n}: {m}")
    return torch.stack([w for w, _, _ in got])


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_step_equals_the_literal_transcription(tower, recipe):
    w = compare(tower, recipe=recipe)
    assert (w < 1).any() and (w == 1).any()  # both branches were taken


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_training_set_as_one_batch(recipe):
    everything = list(range(NUM_PAIRS))
    compare("vit", recipe=recipe, batches=[everything] * 3)


@pytest.mark.parametrize("weight", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("weighting", ["npc", "none", "gmm"])
def test_any_weighting_trains_on_the_memory_as_its_factor_says(weighting, weight):
    compare("vit", weighting=weighting, memory_loss_weight=weight)


def test_learned_temperature_is_limited_in_the_paper_recipe_only():
    pairs, bank = make_data()
    for recipe, limited in (("paper", True), ("released", False)):
        A = make_model("vit")
        A.logit_scale.data.fill_(math.log(100) + 0.5)
        our_steps(A, pairs, bank, [FIRST], options(recipe=recipe))
        assert (A.logit_scale.item() <= math.log(100) + 1e-12) == limited


FIELDS = {"per_sample": False, "trains_on_memory": False, "siamese_gradient": 4.0,
          "batch_norm_trains": True}  # as in the released recipe


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("changed", [*itertools.combinations(FIELDS, 1),
                                     *itertools.combinations(FIELDS, 2)])
def test_any_two_fields_of_a_recipe_train_as_they_say_or_are_refused(monkeypatch, tower, changed):
    recipe = dataclasses.replace(RECIPES["paper"], **{name: FIELDS[name] for name in changed})
    monkeypatch.setitem(RECIPES, "own", recipe)
    if tower == "rn" and recipe.batch_norm_trains and recipe.trains_on_memory:
        with pytest.raises(InputError, match="BatchNorm"):
            compare(tower, recipe="own")
    else:
        compare(tower, recipe="own")


def passes_of(A, siamese, **options):
    return main_NPC.Passes(A, Batches(*make_data())[FIRST], FP32, siamese, **options)


def test_losses_after_the_step_of_the_siamese_hold_no_graph():
    passes = passes_of(make_model("vit"), make_model("vit"))
    assert not any(loss.requires_grad for loss in passes.memory_after())


@pytest.mark.parametrize("tower", TOWERS)
def test_losses_before_the_step_of_the_siamese_may_be_read_behind_it(tower):
    """Only memory_after speaks of A' as it is; batch statistics make A' compute all for itself."""
    A, siamese = make_model(tower).train(), make_model(tower)
    passes = passes_of(A, siamese, memory_gradient=False)
    before = passes.memory_after()
    with torch.no_grad():
        for parameter in siamese.parameters():
            parameter *= 1.01
    pairs, _ = make_data()
    expected = naive.losses(make_model(tower), pairs, np.arange(BATCH))
    torch.testing.assert_close(passes.siamese_batch, expected, rtol=0, atol=1e-9)
    for loss, same, other in zip(passes.memory, before, passes.memory_after(), strict=True):
        torch.testing.assert_close(loss, same, rtol=0, atol=1e-9)
        assert (loss - other).abs().max() > 1e-6


@pytest.mark.parametrize("tower", TOWERS)
def test_a_memory_that_nobody_reads_is_not_encoded(tower):
    """The released recipe does not train on it, and fixed weights do not look at it."""
    pairs, bank = make_data()
    npc = NPC(make_model(tower), StubRun(options(recipe="released", weighting="none")), bank)
    npc.A.train()
    numbers = npc.step(Batches(pairs)[FIRST])
    assert not npc.uses_memory and numbers.keys() == {"batch_loss", "grad_norm", "exp_logit_scale",
                                                      "w"}


# ---- the passes that a step makes ----------------------------------------------------------------


def count(monkeypatch, batch=FIRST, **changes):
    """Passes of one step: rows that each model encodes, in order, as (what, rows); how often a
    gradient crosses A's image tower; whether a graph was kept for another backward pass."""
    encoded, crossed, kept = [], [], []
    for what in ("encode_image", "encode_text"):
        encode = getattr(clip.CLIP, what)

        def spy(self, items, encode=encode, what=what):
            encoded.append((what, tuple(items.shape[:2] if what == "encode_text"
                                        else items.shape[:1])))
            return encode(self, items)

        monkeypatch.setattr(clip.CLIP, what, spy)
    gradient = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: (
        kept.append(bool(options.get("retain_graph"))), gradient(*args, **options))[1])
    pairs, bank = make_data()
    args = options(**changes)
    A = make_model("vit")
    npc = NPC(A, StubRun(args), bank)
    A.visual.ln_post.register_full_backward_hook(lambda *_: crossed.append(1))
    data = Batches(pairs, bank if npc.uses_memory else None)[list(batch)]
    npc.step(data)
    return SimpleNamespace(encoded=encoded, crossed=len(crossed), kept=any(kept), batch=data,
                           npc=npc)


def test_a_step_encodes_each_distinct_item_once_and_the_memory_twice(monkeypatch):
    """A: the batch, then what the memory needs beyond it; A': the memory, after its step."""
    found = count(monkeypatch)
    images, texts = found.batch.images, found.batch.texts
    length = texts.items.shape[1]
    assert texts.total > texts.num_batch > texts.memory_start  # some are in both
    assert length < 12  # captions are cut at the longest
    assert found.encoded == [
        (what, rows) for i, t in ((images.num_batch, texts.num_batch),
                                  (images.total - images.num_batch, texts.total - texts.num_batch),
                                  (images.total - images.memory_start,
                                   texts.total - texts.memory_start))
        for what, rows in (("encode_image", (i,)), ("encode_text", (t, length)))]
    pairs, bank = make_data()
    wanted = [FIRST, bank.image_entry[pairs.image_of[:BATCH]],
              bank.caption_entry[:BATCH]]
    assert images.total == len(np.unique(pairs.image_of[np.array(wanted)]))
    assert texts.total == len(np.unique(pairs.text_of[np.array(wanted)]))


def test_a_gradient_crosses_the_batch_twice_and_the_rest_once(monkeypatch):
    """The siamese's gradient crosses the batch's graph alone, A's all of it."""
    found = count(monkeypatch, batch=(0, 1, 2))
    assert found.batch.images.total > found.batch.images.num_batch
    assert found.crossed == 3 and found.kept


@pytest.mark.parametrize("recipe, weighting", [("paper", "none"), ("paper", "gmm"),
                                               ("robust", "none")])
def test_without_memory_loss_and_look_ahead_a_step_is_plain_clip(monkeypatch, recipe, weighting):
    if weighting == "gmm":
        monkeypatch.setattr(main_NPC, "arrays_on", lambda *_: {"posterior": torch.ones(NUM_PAIRS)})
    found = count(monkeypatch, recipe=recipe, weighting=weighting, memory_loss_weight=0.0)
    assert [what for what, _ in found.encoded] == ["encode_image", "encode_text"]
    assert found.crossed == 1 and not found.kept
    assert found.npc.siamese is None and list(found.npc.optimizers) == ["optimizer"]


def test_accumulation_encodes_each_piece_again_in_the_backward_pass(monkeypatch):
    found = count(monkeypatch, accum_steps=2, weighting="none", memory_loss_weight=0.0)
    images = [rows[0] for what, rows in found.encoded if what == "encode_image"]
    whole = found.batch.images.total
    assert max(images) == -(-whole // 2) and sum(images) == 2 * whole


def test_passes_can_be_replaced_by_the_naive_ones(monkeypatch):
    """main_NPC.py does not know how its losses are computed."""
    monkeypatch.setattr(main_NPC, "Passes", naive.NaivePasses)
    naive.NaivePasses.pairs, naive.NaivePasses.bank = make_data()
    compare("vit")


# ---- precision, fixed weights, special cases -----------------------------------------------------


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_baseline_equals_plain_contrastive_training(tower, recipe):
    """main_CLIP.py's step: clipped, with frozen BatchNorm in `paper`; neither in `released`."""
    args = options(recipe=recipe)
    pairs, _ = make_data()
    ours, reference = make_model(tower), make_model(tower)
    baseline, optimizer = Baseline(ours, StubRun(args)), reference_adamw(reference, args)
    data, released = Batches(pairs), recipe == "released"
    for batch in np.random.default_rng(2).permutation(NUM_PAIRS).reshape(3, BATCH).tolist():
        ours.train(released)
        loss = baseline.step(data[batch])["batch_loss"].item()
        reference.train(released)
        expected = naive.losses(reference, pairs, batch).mean()
        optimizer.zero_grad()
        expected.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
        assert norm > args.clip_grad  # so that clipping matters
        if not released:
            for p in reference.parameters():
                p.grad *= args.clip_grad / (norm + 1e-6)
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-9)
    after = reference.state_dict()
    for name, p in ours.state_dict().items():
        torch.testing.assert_close(p, after[name], rtol=0, atol=1e-9)


def test_accumulated_steps_are_exact():
    compare("vit", accum_steps=3, grad_checkpointing=True)


def test_one_pair_per_batch_keeps_the_weights_finite():
    """A batch of one has loss 0 before and after: nothing over nothing counts as unchanged."""
    (w, _, _), = our_steps(make_model("vit"), *make_data(), [[4]], options())
    assert w.tolist() == [1.0]


def test_amp_steps_stay_close_to_fp32():
    losses = {}
    for name in ("fp32", "amp_bf16", "amp_fp16"):
        pairs, bank = make_data()
        run = StubRun(options())
        run.precision = Precision(name, run.device)
        numbers = NPC(make_model("vit").float(), run, bank).step(Batches(pairs, bank)[FIRST])
        losses[name] = numbers["loss"].item()
        w = numbers["w"]  # jumps from tanh(1) to 1 at r = 1, so rounding alone can move it
        assert ((w > 0) & (w <= 1)).all()
    assert list(losses.values()) == pytest.approx([losses["fp32"]] * 3, rel=0.05)


# ---- losses and weights against closed forms -----------------------------------------------------


def unit_features(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, width, generator=generator, dtype=F64), dim=1)
            for _ in range(2)]


def tensor(*values):
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("scale", [0.0, 2.65, math.log(100)])
def test_pair_losses_are_the_two_cross_entropies(n, scale):
    images, texts = unit_features(n, 5)
    losses = pair_losses(images, texts, torch.tensor(scale, dtype=F64))
    assert losses.dtype == F64 and losses.shape == (n,)
    for i in range(n):
        own = math.exp(scale) * float(images[i] @ texts[i])
        row = [math.exp(scale) * float(images[i] @ texts[j]) for j in range(n)]
        column = [math.exp(scale) * float(images[j] @ texts[i]) for j in range(n)]
        i2t = math.log(sum(math.exp(x - own) for x in row))
        t2i = math.log(sum(math.exp(x - own) for x in column))
        assert float(losses[i]) == pytest.approx((i2t + t2i) / 2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss_is_fp32_of_half_features_and_under_autocast(dtype):
    images, texts = (x.to(dtype) for x in unit_features(9, 16))
    scale = torch.tensor(math.log(100))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        losses = pair_losses(images, texts, scale)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, pair_losses(images.float(), texts.float(), scale))


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
