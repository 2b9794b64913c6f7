"""The memory bank against double loops over features, and its files. Files that are damaged or
crafted: test_bad_input.py."""

import math
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Lookup, pairs_for, parsed, tree
from sklearn.mixture import GaussianMixture

import get_memorybank
import main_NPC
from utils.errors import InputError
from utils.method import building, judge
from utils.method.building import build_bank, memory_bank, nearest_clean
from utils.method.judge import draw_batches, mixture_posterior, strict_clean_set
from utils.method.memorybank import bank_name, bank_path, load_bank, save_bank
from utils.method.optimizer import Precision
from utils.method.passes import pair_losses
from utils.method.released_bank import save_released

FP32 = Precision("fp32", torch.device("cpu"))
N_IMAGES, PER_IMAGE = 12, 5
N = N_IMAGES * PER_IMAGE


def options(**changes):
    return parsed("memorybank", **{
        "eval_batch_size": 7, "num_workers": 0, "device": "cpu", "seed": 3, "batch_size": N,
        "vision_model": "lookup", "noise_ratio": 0.4, "judge_steps": 4,
        "context_length": 4, **changes})


NAME = "0.4_mbank_lookup_random_seed3_0123abcd.npz"


def load(root, pairs, log=print, **changes):
    return load_bank(NAME, pairs, options(dataset_root=root, **changes), log)


def kept_bank(model, pairs, args, log=print):
    run = SimpleNamespace(args=args, device=args.device, precision=FP32, log=log, state={},
                          found={})
    return memory_bank(model, pairs, run), bank_path(args.dataset_root, run.found["bank"])


def example(noise=0.4, repeats=True, seed=0):
    """(model, pairs): features in which a caption lies near its image, and some captions at a wrong
    image. With `repeats` some captions occur several times."""
    rng = np.random.default_rng(seed)
    image_of, text_of = np.arange(N) // PER_IMAGE, np.arange(N)
    if repeats:
        text_of[[1, 8, 33]] = text_of[[0, 7, 2]]
        text_of = np.unique(text_of, return_inverse=True)[1]
        order = dict.fromkeys(text_of.tolist())
        text_of = np.array([list(order).index(row) for row in text_of])
    images = rng.normal(size=(N_IMAGES, 16))
    source = np.empty(text_of.max() + 1, int)
    source[text_of[::-1]] = image_of[::-1]
    texts = images[source] + 0.6 * rng.normal(size=(len(source), 16))
    texts *= rng.uniform(0.2, 5, (len(source), 1))  # lengths must not matter
    wrong = rng.random(N) < noise
    text_of = text_of.copy()
    text_of[wrong] = rng.permutation(text_of[wrong])
    pairs = pairs_for(image_of.tolist(), text_of.tolist())
    pairs.wrong = source[text_of] != image_of
    return Lookup(torch.from_numpy(images), torch.from_numpy(texts), scale=2.0), pairs


def unit(features):
    return F.normalize(features, dim=1)


def brute_nearest(queries, keys, clean):
    """For each row of queries the pair of the clean set whose row of keys is most similar, the
    lowest one of equals."""
    result = []
    for query in queries:
        best, entry = -math.inf, None
        for pair in range(len(clean)):
            score = float((query * keys[pair]).sum())
            if clean[pair] and score > best:
                best, entry = score, pair
        result.append(entry)
    return result


# ---- the whole bank -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("repeats", [False, True])
def test_bank_is_that_of_a_double_loop(seed, repeats):
    model, pairs = example(seed=seed, repeats=repeats)
    bank = build_bank(model, pairs, options(), FP32)
    images, texts = unit(model.images)[pairs.image_of], unit(model.texts)[pairs.text_of]

    losses = pair_losses(images, texts, model.logit_scale)  # of one batch that holds all pairs
    assert np.allclose(bank.loss, losses, atol=1e-6)
    low, high = (weight / math.sqrt(variance)
                 * np.exp(-((losses.numpy() - center) ** 2) / (2 * variance))
                 for weight, center, variance in mixture_posterior(losses.double().numpy(), 3)[1])
    posterior = low / (low + high)
    assert np.allclose(bank.posterior, posterior, atol=1e-6)
    assert (bank.clean == (posterior > 0.9)).all() and 5 < bank.clean.sum() < N

    assert bank.image_entry.tolist() == brute_nearest(unit(model.images), images, bank.clean)
    expected = brute_nearest(texts, texts, bank.clean)
    for pair in np.flatnonzero(bank.clean):  # a pair of the set is its own, beside its duplicates
        assert np.allclose(texts[expected[pair]], texts[pair])
        expected[pair] = pair
    assert bank.caption_entry.tolist() == expected

    assert np.allclose(bank.cosine, (images * texts).sum(1), atol=1e-6)
    assert "beta" not in bank.info
    clean = np.flatnonzero(bank.clean)
    for image in np.unique(pairs.image_of[clean]):  # the five pairs of an image tie: the lowest
        assert bank.image_entry[image] == clean[pairs.image_of[clean] == image][0]


def test_report_gives_precision_and_recall(capsys):
    model, pairs = example()
    bank, right = build_bank(model, pairs, options(), FP32), ~pairs.wrong
    hits, said = (bank.clean & right).sum(), capsys.readouterr().out
    assert f"precision {hits / bank.clean.sum():.3f}, recall {hits / right.sum():.3f}" in said
    assert f"strict clean set: {bank.clean.sum()} of {N} pairs" in said
    assert said.count("mixture: mean") == 2
    pairs.wrong = None
    build_bank(model, pairs, options(), FP32)
    assert "precision" not in capsys.readouterr().out


def test_batches_of_the_loss_are_random_of_like_size_and_depend_on_the_seed(monkeypatch):
    model, pairs = example()
    seen = []

    def spy(*args):
        batches = draw_batches(*args)
        seen.append([batch.tolist() for batch in batches])
        return batches

    monkeypatch.setattr(judge, "draw_batches", spy)
    for seed in (1, 1, 2):
        build_bank(model, pairs, options(batch_size=25, noise_seed=seed), FP32)
    assert seen[0] == seen[1] != seen[2]
    assert sorted(map(len, seen[0])) == [20, 20, 20]
    assert sorted(sum(seen[0], [])) == list(range(N)) != sum(seen[0], [])
    bank = build_bank(model, pairs, options(batch_size=25, noise_seed=1), FP32)
    images, texts = unit(model.images)[pairs.image_of], unit(model.texts)[pairs.text_of]
    for batch in seen[0]:
        expected = pair_losses(images[batch], texts[batch], model.logit_scale)
        assert np.allclose(bank.loss[batch], expected, atol=1e-6)


def test_released_recipe_takes_batches_in_order_and_embeddings_as_long_as_they_are():
    model, pairs = example()
    args = options(recipe="released", batch_size=16)
    bank = build_bank(model, pairs, args, FP32)
    images, texts = model.images[pairs.image_of], model.texts[pairs.text_of]
    for start in range(0, N, 16):
        rows = slice(start, start + 16)
        expected = pair_losses(unit(images[rows]), unit(texts[rows]), model.logit_scale)
        assert np.allclose(bank.loss[rows], expected, atol=1e-6)
    assert bank.image_entry.tolist() == brute_nearest(unit(model.images), images, bank.clean)
    assert bank.caption_entry.tolist() == brute_nearest(unit(texts), texts, bank.clean)


# ---- the strict clean set -----------------------------------------------------------------------


@pytest.mark.parametrize("case, threshold, min_clean, size", [
    ("threshold too high", 0.9999999, 0.1, 6),
    ("threshold too high", 0.9999999, 0.0, 2),
    ("all losses alike", 0.9, 0.1, 6),
    ("weak model", 0.9, 0.5, 30)])
def test_small_strict_clean_set_is_the_pairs_of_smallest_loss(case, threshold, min_clean, size):
    model, pairs = example()
    if case == "all losses alike":
        model.images[:] = model.images[0]
        model.texts[:] = model.texts[0]
    if case == "weak model":
        model.texts[:] = torch.from_numpy(np.random.default_rng(1).normal(size=model.texts.shape))
    said = []
    args = options(clean_threshold=threshold, min_clean=min_clean)
    bank = build_bank(model, pairs, args, FP32, said.append)
    assert bank.clean.sum() == size
    assert set(np.flatnonzero(bank.clean)) == set(np.argsort(bank.loss, kind="stable")[:size])
    assert [line for line in said if line.startswith("warning")] and "--min_clean" in "".join(said)
    assert bank.clean[bank.image_entry].all() and bank.clean[bank.caption_entry].all()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mixture_has_the_authors_constants(seed):
    """On losses where each of them matters: docs/fidelity.md names them."""
    rng = np.random.default_rng(seed)
    losses = np.r_[rng.exponential(0.03, 400), rng.gamma(2, 0.5, 200)]
    mixture = GaussianMixture(n_components=2, max_iter=100, tol=1e-2, reg_covar=5e-4,
                              random_state=0).fit(losses[:, None])
    expected = mixture.predict_proba(losses[:, None])[:, mixture.means_.argmin()]
    np.testing.assert_allclose(mixture_posterior(losses, 0)[0], expected, atol=1e-9)


@pytest.mark.parametrize("losses", [[0.5] * 9, [0.0] * 9, [1e-9] * 4 + [2e-9] * 5, [1.0, 2.0]])
def test_mixture_of_hardly_differing_losses_is_finite(losses):
    losses = np.array(losses)
    posterior, _ = mixture_posterior(losses, seed=0)
    assert np.isfinite(posterior).all() and posterior.shape == losses.shape
    clean = strict_clean_set(posterior, losses, 0.9, 0.02)
    assert clean.sum() >= 2


def test_strict_clean_set_is_what_exceeds_the_threshold():
    posterior = np.array([0.95, 0.9, 0.91, 0.2, 0.0])
    losses = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert strict_clean_set(posterior, losses, 0.9, 0.4).tolist() == [True, False, True, False,
                                                                     False]
    assert strict_clean_set(posterior, losses, 0.9, 0.41).tolist() == [False, False, True, True,
                                                                      True]
    losses = np.random.default_rng(0).integers(0, 3, 5000)
    clean = strict_clean_set(np.zeros(5000), losses, 0.9, 0.1)
    assert np.array_equal(np.flatnonzero(clean), np.flatnonzero(losses == 0)[:500])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_temperature_is_refused(broken):
    model, pairs = example()
    model.logit_scale = torch.tensor(broken)
    with pytest.raises(InputError, match="not finite"):
        build_bank(model, pairs, options(), FP32)


# ---- the nearest neighbour ----------------------------------------------------------------------


def test_item_with_clean_pairs_finds_its_own_even_beside_a_twin_of_lower_number():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])  # two images look alike
    item_of, clean = np.array([0, 0, 1, 1, 2]), np.array([False, True, False, True, False])
    assert nearest_clean(features, item_of, clean).tolist() == [1, 3, 1]


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def built():
    model, pairs = example()
    return build_bank(model, pairs, options(), FP32), pairs


ARRAYS = ("image_entry", "caption_entry", "clean", "loss", "posterior", "cosine")


def same(bank, other):
    return all(np.array_equal(getattr(bank, name), getattr(other, name)) for name in ARRAYS)


def test_bank_survives_its_file_which_holds_no_pickle(tmp_path, built, monkeypatch):
    bank, pairs = built
    path = bank_path(tmp_path, NAME)
    assert load(tmp_path, pairs) is None
    save_bank(bank, pairs, path)
    assert tree(tmp_path) == {f"annotations/frozen_memory_bank/{NAME}"}
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "Unpickler", lambda *_, **__: pytest.fail("unpickled"))
    loaded, where = load(tmp_path, pairs)
    assert where == path and same(loaded, bank)
    assert all(getattr(loaded, name).dtype == getattr(bank, name).dtype for name in ARRAYS)
    assert loaded.info.items() >= bank.info.items() and len(loaded.info["fingerprint"]) == 64


def test_memory_bank_is_built_once_and_kept(tmp_path, monkeypatch):
    """The bank that was just built is not read again from its file."""
    model, pairs = example()
    args, said = options(dataset_root=tmp_path), []
    with monkeypatch.context() as patch:
        patch.setattr("utils.method.memorybank.read_bank", lambda *_: pytest.fail("read"))
        bank, path = kept_bank(model, pairs, args, said.append)
    assert "building" in said[0] and path.is_file()
    encoded = dict(model.encoded)
    again, where = kept_bank(model, pairs, args, said.append)
    assert same(again, bank) and where == path and model.encoded == encoded
    assert said[-1] == f"memory bank: {path}"
    assert same(bank, build_bank(model, pairs, args, FP32, said.append))
    said.clear()
    other = kept_bank(model, pairs, options(dataset_root=tmp_path, noise_seed=4), said.append)[1]
    assert "building" in said[0] and {path, other} == set(path.parent.iterdir())


@pytest.mark.parametrize("change, other", [
    ({"noise_seed": 4}, True), ({"activation": "gelu"}, True), ({"clean_threshold": 0.7}, True),
    ({"recipe": "released"}, True), ({"batch_size": 20}, True), ({"judge_neighbours": 3}, True),
    ({"weighting": "osa"}, True), ({"weights": 1.5}, True), ({"caption": 7}, True),
    ({"judge_rounds": 2, "judge_lr": 1e-4}, True), ({"judge_rounds": 2, "judge_steps": 7}, True),
    ({"weighting": "gmm"}, False), ({"judge_lr": 1e-4}, False), ({"judge_steps": 7}, False)])
def test_what_another_model_seed_judge_or_option_builds_is_another_bank(change, other):
    """What only the rounds read makes no other bank where there are none."""
    model, pairs = example()
    same = {"judge_rounds": 2} if "judge_rounds" in change else {}
    before, own = bank_name(model, pairs, options(**same)), dict(change)
    model.config = {"activation": own.pop("activation", "quick_gelu")}
    model.images *= own.pop("weights", 1)
    if "caption" in own:
        pairs.captions[own.pop("caption")] += "!"
    assert (bank_name(model, pairs, options(**own)) != before) == other


def test_the_rate_of_the_rounds_is_that_of_training_and_names_say_what_a_bank_was_made_with():
    model, pairs = example()

    def name(command="memorybank", **more):
        return bank_name(model, pairs, parsed(command, **{
            "vision_model": "lookup", "noise_ratio": 0.4, "seed": 3, "batch_size": N, **more}))

    rounds = {"judge_rounds": 2}
    assert name("npc", lr=3e-4, **rounds) == name(judge_lr=3e-4, **rounds) != name(**rounds)
    assert name("npc", **rounds) == name("clip", **rounds) == name(judge_lr=1e-5, **rounds)
    for wanted, change in ((r"0\.4_mbank_lookup_random_seed3", {}),
                           (r"0\.4_mbank_ViT-B-32_random_seed3", {"vision_model": "ViT-B/32"}),
                           (r"0\.4_mbank_best.pt_neighbours4_similar_seed7",
                            {"vision_model": "logs/a b/best.pt", "judge_neighbours": 4,
                             "noise_kind": "similar", "noise_seed": 7}),
                           (r"0_mbank_lookup_seed3", {"noise_ratio": 0.0})):
        assert re.fullmatch(wanted + r"_[0-9a-f]{8}\.npz", name(**change))


def test_the_mean_random_cosine_is_computed_for_osa_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.method.judge.mean_random_cosine", lambda *_: 0.125)
    for weighting, beta in (("osa", 0.125), ("gmm", None)):
        args = options(dataset_root=tmp_path, weighting=weighting)
        for _ in range(2):  # built, and read
            assert kept_bank(*example(), args)[0].info.get("beta") == beta


@pytest.mark.parametrize("change", [
    lambda pairs: pairs.captions.__setitem__(7, "!"), lambda pairs: pairs.captions.reverse(),
    lambda pairs: pairs.image_ids.__setitem__(4, "99")], ids=["caption", "order", "image"])
def test_a_bank_of_other_captions_is_refused(tmp_path, built, change):
    bank, pairs = built
    save_bank(bank, pairs, bank_path(tmp_path, NAME))
    change(pairs)
    with pytest.raises(InputError, match=r"0123abcd.npz was built for other captions than .*caps"):
        load(tmp_path, pairs)


# ---- the authors' format ------------------------------------------------------------------------


def write_released(root, pairs, bank, value=int, spelling="0.4", folder="memory_bank"):
    """The two files as the authors' script writes them: pickled dictionaries, string keys."""
    folder = root / "annotations" / folder
    folder.mkdir(parents=True, exist_ok=True)
    images = {str(i): value(e) for i, e in zip(pairs.image_ids, bank.image_entry, strict=True)}
    captions = {str(i): value(e) for i, e in enumerate(bank.caption_entry)}
    np.save(folder / f"{spelling}_mbank_img_idx.npy", images)
    np.save(folder / f"{spelling}_mbank_txt_idx.npy", captions)
    return folder / f"{spelling}_mbank_img_idx.npy", folder / f"{spelling}_mbank_txt_idx.npy"


@pytest.mark.parametrize("folder, spelling", [("memory_bank", "0.4"), ("frozen_memory_bank", ".4")])
@pytest.mark.parametrize("value", [int, np.int64, np.int32, np.array, lambda e: np.array([[e]])],
                         ids=["int", "int64", "int32", "array", "array of (1, 1)"])
def test_authors_bank_is_read(tmp_path, built, value, folder, spelling):
    bank, pairs = built
    path, _ = write_released(tmp_path, pairs, bank, value, spelling, folder)
    said = []
    loaded, where = load(tmp_path, pairs, said.append)
    assert where == path and loaded.posterior is None
    assert len(said) == 1 and f"at hand: {path}" in said[0]
    assert np.array_equal(loaded.image_entry, bank.image_entry)
    assert np.array_equal(loaded.caption_entry, bank.caption_entry)
    assert loaded.image_entry.dtype == np.int64
    assert load_bank(path.name, pairs, options(dataset_root=tmp_path))[1] == path  # resumed
    assert load(tmp_path, pairs, noise_ratio=0.45) is None
    save_bank(bank, pairs, bank_path(tmp_path, NAME))  # ours comes first
    assert load(tmp_path, pairs)[1].name == NAME


def test_authors_bank_that_we_write_is_what_they_read(tmp_path, built):
    bank, pairs = built
    paths = save_released(bank, pairs, tmp_path / "annotations" / "memory_bank", 0.4)
    assert {path.name for path in paths} == {f"0.4_mbank_{kind}_idx.npy" for kind in ("img", "txt")}
    images, captions = (np.load(path, allow_pickle=True).item() for path in paths)
    for i in range(N):
        assert captions[str(i)] == bank.caption_entry[i]
        assert images[pairs.image_ids[pairs.image_of[i]]] == bank.image_entry[pairs.image_of[i]]
    assert np.array_equal(load(tmp_path, pairs)[0].image_entry, bank.image_entry)


@pytest.mark.parametrize("source, change", [
    ("0.4_noise_random_seed3_train_caps.txt", {}), ("0.4_noise_similar_seed3_train_caps.txt", {}),
    ("0.4_noise_train_caps.txt", {"judge_neighbours": 3})])
def test_authors_bank_is_not_used_for_other_noise_or_another_judge(tmp_path, built, source, change):
    bank, pairs = built
    write_released(tmp_path, pairs, bank)
    assert load(tmp_path, pairs) is not None
    pairs.source = tmp_path / source
    assert load(tmp_path, pairs, **change) is None


# ---- where it is kept ---------------------------------------------------------------------------


@pytest.mark.parametrize("command, folder, more", [
    (get_memorybank, "frozen_memory_bank", []),
    (get_memorybank, "memory_bank", ["--format", "released"]),
    (main_NPC, "frozen_memory_bank", ["--checkpoint_path", "logs"])])
def test_a_data_folder_that_cannot_be_written_is_known_before_anything_is_judged(
        dataset, tmp_path, monkeypatch, capsys, command, folder, more):
    data = dataset()
    monkeypatch.chdir(tmp_path)
    (data.root / "annotations" / folder).write_text("in the way")
    monkeypatch.setattr(building, "judge_pairs", lambda *_: pytest.fail("it has judged"))
    with pytest.raises(SystemExit):
        command.main([*data.options, "--vision_model", "tiny", "--num_workers", "0", "--device",
                      "cpu", *more])
    said = capsys.readouterr().err
    assert f"cannot write {data.root}/annotations/{folder}" in said
    assert "where the memory bank belongs" in said
    assert "copy annotations/ and link images/" in said and said.count("\n") == 1
