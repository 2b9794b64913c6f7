"""The NPC step against a literal transcription: two models, every pass made for itself.

The reference follows the equations and the table of docs/fidelity.md point by point, shares nothing
and uses nothing of the repository but the towers.
"""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import naive
import numpy as np
import pytest
import torch
from conftest import parsed

import clip
import main_NPC
from main_CLIP import Baseline
from main_NPC import NPC
from utils.errors import InputError
from utils.method.batches import Batches
from utils.method.memorybank import MemoryBank
from utils.method.optimizer import Precision, adamw
from utils.method.pairs import Pairs
from utils.method.recipes import RECIPES
from utils.reading.images import ImagesInMemory

TEXT = {"context_length": 12, "vocab_size": 50, "transformer_width": 64, "transformer_heads": 1,
        "transformer_layers": 1, "embed_dim": 16, "image_resolution": 32}
TOWERS = {"vit": {"vision_layers": 1, "vision_width": 64, "vision_patch_size": 16},
          "rn": {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}}
NUM_PAIRS, NUM_IMAGES, BATCH = 30, 6, 10


def options(**changes):
    return parsed(**{"lr": 1e-3, "clip_grad": 0.5, "weighting": "npc", "memory_loss_weight": 1.0,
                     "device": "cpu", **changes})


class StubRun:
    """What the step needs of a `utils.training.run.Run`."""

    def __init__(self, args):
        self.args, self.device = args, torch.device("cpu")
        self.recipe = RECIPES[args.recipe]
        self.precision = Precision("fp32", self.device)


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
        w = torch.where(r < 1, torch.tanh(r), torch.ones_like(r))

        A.train(recipe.batch_norm_trains)
        loss = naive.losses(A, pairs, batch)
        A.eval()
        optimizer.zero_grad()
        weighted = (w * loss).mean() if recipe.per_sample else w.mean() * loss.mean()
        if recipe.trains_on_memory:
            before_i = naive.losses(A, pairs, memory_i)
            before_t = naive.losses(A, pairs, memory_t)
        total = weighted + before_i.mean() + before_t.mean()
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


def test_learned_temperature_is_limited_in_the_paper_recipe_only():
    pairs, bank = make_data()
    for recipe, limited in (("paper", True), ("released", False)):
        A = make_model("vit")
        A.logit_scale.data.fill_(math.log(100) + 0.5)
        our_steps(A, pairs, bank, [list(range(BATCH))], options(recipe=recipe))
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
    pairs, bank = make_data()
    return main_NPC.Passes(A, Batches(pairs, bank)[list(range(BATCH))],
                           Precision("fp32", torch.device("cpu")), siamese, **options)


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
    numbers = npc.step(Batches(pairs)[list(range(BATCH))])
    assert not npc.uses_memory and numbers.keys() == {"batch_loss", "grad_norm", "exp_logit_scale",
                                                      "w"}


def test_memory_gradient_is_not_dropped_for_fixed_weights():
    """Whatever the weighting, a memory loss that has a gradient counts in it."""
    pairs, bank = make_data()
    norms = [our_steps(make_model("vit"), pairs, bank, [list(range(BATCH))],
                       options(weighting="none", memory_loss_weight=weight))[0][2]
             for weight in (0.0, 1.0, 50.0)]
    assert norms[2] > 2 * norms[1] and abs(norms[1] - norms[0]) > 1e-3


# ---- the passes that a step makes ----------------------------------------------------------------


def count(monkeypatch, batch=tuple(range(BATCH)), **changes):
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
    wanted = [list(range(BATCH)), bank.image_entry[pairs.image_of[:BATCH]],
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
    pairs, bank = make_data()
    batches = [list(range(BATCH)), list(range(BATCH, 2 * BATCH))]
    ours, plain = make_model("vit"), make_model("vit")
    expected = our_steps(ours, pairs, bank, batches, options())
    monkeypatch.setattr(naive.NaivePasses, "pairs", pairs)
    monkeypatch.setattr(naive.NaivePasses, "bank", bank)
    monkeypatch.setattr(main_NPC, "Passes", naive.NaivePasses)
    for (w, loss, norm), (w0, loss0, norm0) in zip(
            our_steps(plain, pairs, bank, batches, options()), expected, strict=True):
        torch.testing.assert_close(w, w0, rtol=0, atol=1e-9)
        assert (loss, norm) == pytest.approx((loss0, norm0), abs=1e-9)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


# ---- precision, fixed weights, special cases -----------------------------------------------------


def test_the_state_of_the_siamese_lives_on(monkeypatch):
    """An AdamW of A' that starts anew at every step gives other weights."""
    step = NPC.step

    def forgetful(self, batch):
        self.siamese_optimizer.state.clear()
        return step(self, batch)

    monkeypatch.setattr(NPC, "step", forgetful)
    with pytest.raises(AssertionError, match="not close"):
        compare("vit", recipe="released")


def test_everything_is_decayed():
    """One step at gradient 0 shrinks every parameter by lr times weight decay: biases, LayerNorms,
    logit_scale and the rows of tokens that no caption has."""
    model = make_model("vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = adamw(model, options(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * 0.95)


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
    pairs, bank = make_data()
    batches = [list(range(BATCH)), list(range(BATCH, 2 * BATCH))]
    whole, pieces = make_model("vit"), make_model("vit")
    our_steps(whole, pairs, bank, batches, options())
    our_steps(pieces, pairs, bank, batches, options(accum_steps=3, grad_checkpointing=True))
    for p, q in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_no_gradient_flows_through_the_weights():
    """With w held constant, the gradient of the total loss is the one the step used."""
    pairs, bank = make_data()
    batch = list(range(BATCH))
    A, B = make_model("vit"), make_model("vit")
    args = options(clip_grad=0.0)
    _, _, norm = our_steps(A, pairs, bank, [batch], args)[0]
    npc = NPC(copy.deepcopy(B), StubRun(args), bank)
    w = npc.step(Batches(pairs, bank)[batch])["w"].detach().clone()
    total = ((w * naive.losses(B, pairs, batch)).mean()
             + naive.losses(B, pairs, bank.image_entry[pairs.image_of[batch]]).mean()
             + naive.losses(B, pairs, bank.caption_entry[batch]).mean())
    gradients = torch.autograd.grad(total, list(B.parameters()))
    expected = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norm == pytest.approx(expected, abs=1e-9)


def test_fixed_weights_are_used_as_they_are():
    pairs, bank = make_data()
    A = make_model("vit")
    given = torch.rand(NUM_PAIRS, dtype=torch.float64)
    bank.posterior = given.numpy()
    npc = NPC(A, StubRun(options(weighting="gmm")), bank)
    batch = [3, 1, 20, 7]
    reference = copy.deepcopy(A)
    numbers = npc.step(Batches(pairs, bank)[batch])
    assert torch.equal(numbers["w"], given[batch])
    expected = (given[batch] * naive.losses(reference, pairs, batch)).mean().item()
    assert numbers["weighted_loss"].item() == pytest.approx(expected, abs=1e-9)


def test_memory_loss_weight_scales_the_memory_part():
    pairs, bank = make_data()
    batch = list(range(BATCH))
    for weight in (0.0, 0.3):
        numbers = NPC(make_model("vit"), StubRun(options(memory_loss_weight=weight)), bank).step(
            Batches(pairs, bank)[batch])
        memory = numbers.get("memory_image_loss", 0) + numbers.get("memory_text_loss", 0)
        expected = numbers["weighted_loss"] + weight * memory
        torch.testing.assert_close(numbers["loss"], expected)


def test_one_pair_per_batch_keeps_the_weights_finite():
    """A batch of one has loss 0 before and after: nothing over nothing counts as unchanged."""
    pairs, bank = make_data()
    numbers = NPC(make_model("vit"), StubRun(options()), bank).step(Batches(pairs, bank)[[4]])
    assert numbers["w"].tolist() == [1.0]


def test_amp_steps_stay_close_to_fp32():
    pairs, bank = make_data()
    batch = list(range(BATCH))
    exact = NPC(make_model("vit").float(), StubRun(options()), bank).step(
        Batches(pairs, bank)[batch])
    for name in ("amp_bf16", "amp_fp16"):
        run = StubRun(options())
        run.precision = Precision(name, run.device)
        numbers = NPC(make_model("vit").float(), run, bank).step(Batches(pairs, bank)[batch])
        assert numbers["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)
        w = numbers["w"]  # jumps from tanh(1) to 1 at r = 1, so rounding alone can move it
        assert ((w > 0) & (w <= 1)).all()
