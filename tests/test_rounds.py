"""Two rounds of the judge, and the bank after them, against a literal transcription.

It follows docs/finding_noise.md point by point: every loss by passes of its own, neighbours by
double loops. Of the repository it uses the towers alone, and the order of its random numbers.
"""

import copy

import naive
import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from test_npc_step import make_data, make_model, options, reference_adamw

from utils.method.building import build_bank
from utils.method.judge import judge_pairs, with_options
from utils.method.optimizer import Precision

STEPS, RATE, SEED, K, BATCH = 32, 3e-4, 3, 3, 10  # the steps are those by default
FP32 = Precision("fp32", torch.device("cpu"))


def quiet(*_):
    """Takes log lines."""


def reference_features(model, pairs):
    """(images (u, D), captions (v, D), temperature), as long as they are."""
    with torch.no_grad():
        images = torch.stack([pairs.images[k] for k in range(len(pairs.images))]).double()
        return (model.encode_image((images / 255 - naive.MEAN) / naive.STD),
                model.encode_text(pairs.tokens), model.logit_scale.exp())


def cosines(features):
    return features / features.norm(dim=1, keepdim=True)


def losses_of(image, text, scale):
    """Losses (b,) of a batch of features."""
    logits = scale * cosines(image) @ cosines(text).T
    return (logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diag()


def agreement(items, partners, item_of, partner_of, own_item, own_partner, among=None):
    """(n,) mean cosine of each pair's partner with those of its item's K nearest other items, or
    of the nearest of those `among` them."""
    among = range(len(items)) if among is None else among
    items, partners = (cosines(x - x[of].mean(0)) for x, of in ((cosines(items), item_of),
                                                              (cosines(partners), partner_of)))
    result = []
    for item, partner in zip(own_item, own_partner, strict=True):
        similar = items @ items[item]
        others = [j for j in np.argsort(-similar.numpy(), kind="stable") if j in among]
        others = [j for j in others if j != item][:K]
        total = weight = 0.0
        for j in others:
            theirs = [p for p in partner_of[item_of == j] if p != partner]
            if theirs and similar[j] > 0:
                total += similar[j] * (partners[theirs] @ partners[partner]).mean()
                weight += similar[j]
        result.append(float(total / weight) if weight else np.nan)
    return np.array(result)


def standard(values, of):
    known = of[~np.isnan(of)]
    return np.nan_to_num((values - known.mean()) / known.std(ddof=1))


def reference_mismatch(pairs, rng):
    """(n,) captions: for each pair that of a random pair whose caption stands nowhere beside its
    image. The pairs to draw from are ordered by when their caption first occurs."""
    n, text_of = len(pairs), list(pairs.text_of)
    beside = [{text_of[j] for j in range(n) if pairs.image_of[j] == image}
              for image in pairs.image_of]
    fitting = [[j for j in sorted(range(n), key=lambda j: text_of.index(text_of[j]))
                if text_of[j] not in beside[i]] for i in range(n)]
    drawn = rng.integers([len(fit) for fit in fitting])
    return np.array([text_of[fit[k]] for fit, k in zip(fitting, drawn, strict=True)])


def reference_verdict(features, pairs, rng, neighbours):
    """(score, loss, posterior, clean) (n,) each and the share of wrong pairs."""
    images, texts, scale = features
    n, image_of, text_of = len(pairs), pairs.image_of, pairs.text_of
    others = [reference_mismatch(pairs, rng) for _ in range(4)]
    loss, if_other = np.zeros(n), np.zeros((4, n))
    for _ in range(4):  # draws of batches
        for batch in np.array_split(rng.permutation(n), n // BATCH):
            image, text = images[image_of[batch]], texts[text_of[batch]]
            loss[batch] += losses_of(image, text, scale).numpy() / 4
            for k, other in enumerate(others):
                for place, i in enumerate(batch):
                    exchanged = text.clone()
                    exchanged[place] = texts[other[i]]
                    if_other[k, i] += losses_of(image, exchanged, scale)[place].item() / 4
    score, mismatches = loss, if_other
    if neighbours:  # before the first round neighbours count too, 3/8 each of the loss
        def both(text):
            return (agreement(images, texts, image_of, text_of, image_of, text),
                    agreement(texts, images, text_of, image_of, text, image_of))

        def scored(loss_of_them, text):
            agreements = zip(both(text), both(text_of), strict=True)
            return standard(loss_of_them, loss) - 0.375 * sum(
                standard(values, own) for values, own in agreements)

        score = scored(loss, text_of)
        mismatches = [scored(bad, other) for bad, other in zip(if_other, others, strict=True)]
    mismatches = np.concatenate(mismatches)
    share = min(1.0, 5 * np.mean(score > np.quantile(mismatches, 0.8)))
    is_pair = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(
        np.concatenate([score, mismatches]), np.repeat([1.0, 0.0], [n, 4 * n]),
        np.repeat([1.0, 0.25], [n, 4 * n])).predict(score).clip(1e-12)
    posterior = 1 - (share * (1 - is_pair) / is_pair).clip(0, 1)
    clean = posterior > 0.8
    if clean.sum() < n / 10:
        clean = np.isin(np.arange(n), np.argsort(score, kind="stable")[: n // 10])
    return score, loss, posterior, clean, share


def reference_lesson(model, pairs, clean, args, rng):
    """A copy of the model after a round's steps: warm-up over four, the gradient's norm clipped,
    the clean pairs in a new order whenever no whole batch is left."""
    taught, batches = copy.deepcopy(model), []
    size = min(BATCH, clean.sum())
    while len(batches) < STEPS:
        order = rng.permutation(np.flatnonzero(clean))
        batches += [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
    optimizer = reference_adamw(taught, args)
    for step, batch in enumerate(batches[:STEPS]):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 4)
        optimizer.zero_grad()
        naive.losses(taught, pairs, batch).mean().backward()
        norm = torch.stack([p.grad.norm() for p in taught.parameters()]).norm()
        for p in taught.parameters():
            p.grad *= min(1.0, args.clip_grad / (norm + 1e-6))
        optimizer.step()
    return taught


def nearest(queries, pair_features, clean):
    """Of each query the clean pair with the largest cosine, the lowest of equals."""
    similar = cosines(queries) @ cosines(pair_features).T
    similar[:, ~torch.from_numpy(clean)] = -2
    return (similar > similar.amax(dim=1, keepdim=True) - 1e-12).int().argmax(dim=1).numpy()


def test_two_rounds_equal_the_literal_transcription():
    pairs, _ = make_data()
    pairs.captions = [f"caption {k}" for k in pairs.text_of]
    model = make_model("vit")
    args = options(recipe="robust", batch_size=BATCH, lr=RATE, judge_neighbours=K, min_clean=0.1,
                   seed=SEED, clip_grad=0.3, context_length=12)
    initial = copy.deepcopy(model)
    bank = build_bank(model, pairs, args, FP32, quiet)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 initial.state_dict().values(), strict=True))

    features = reference_features(initial, pairs)
    cosine = (cosines(features[0])[pairs.image_of] * cosines(features[1])[pairs.text_of]).sum(1)
    verdict, sets = reference_verdict(features, pairs, np.random.default_rng(SEED), K), []
    before = judge_pairs(model, pairs, with_options(args, judge_rounds=0), FP32, quiet)[0]
    np.testing.assert_allclose(before.score, verdict[0], atol=1e-6)
    for number in (1, 2):
        sets.append(verdict[3])
        rng = np.random.default_rng([SEED, number])
        taught = reference_lesson(initial, pairs, verdict[3], args, rng)
        features = reference_features(taught, pairs)
        verdict = reference_verdict(features, pairs, rng, 0)
    _, loss, posterior, clean, share = verdict
    assert not np.array_equal(*sets) and not np.array_equal(clean, sets[1])  # the rounds matter
    assert sorted(np.flatnonzero(posterior > 0.8)) == sorted(np.flatnonzero(clean))
    np.testing.assert_allclose(bank.loss, loss, atol=1e-6)
    np.testing.assert_allclose(bank.posterior, posterior, atol=1e-6)
    assert np.array_equal(bank.clean, clean)
    assert bank.info["wrong_share"] == pytest.approx(share, abs=1e-6)
    np.testing.assert_allclose(bank.cosine, cosine, atol=1e-6)
    images, texts, _ = features
    entries = nearest(images, images[pairs.image_of], clean)
    own = {k: i for i in reversed(np.flatnonzero(clean)) for k in [pairs.image_of[i]]}
    assert bank.image_entry.tolist() == [own.get(k, entry) for k, entry in enumerate(entries)]
    entries = nearest(texts[pairs.text_of], texts[pairs.text_of], clean)
    assert bank.caption_entry.tolist() == np.where(clean, np.arange(len(pairs)), entries).tolist()
