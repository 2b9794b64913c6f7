"""The noisy caption file against a literal transcription of the released procedure."""

import errno
import os

import numpy as np
import pytest
from conftest import tree, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import construct_noise as script
from data import wrong_pairs
from params import parse_args
from utils.errors import InputError
from utils.files import atomic_write
from utils.reading import noise
from utils.reading.layout import ratio_name, read_lines
from utils.reading.noise import construct_noise, random_order, similar_order

LONG = "a much longer caption than all the others of this list"
CAPTIONS = ["a dog", "a dog", "ein Hündchen läuft", "二匹の犬", "🐕 runs", "a", LONG, "naïve café",
            "a dog", "x" * 90, "a cat", "no, a dog"]


def released(captions, noise_ratio, seed):
    """What the authors' script does, statement by statement, with numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(seed)
    captions = np.array(captions)
    index = np.arange(len(captions))
    np.random.shuffle(index)
    noisy = index[: int(noise_ratio * len(captions))]
    shuffled = captions[noisy]
    np.random.shuffle(shuffled)
    captions[noisy] = shuffled
    np.random.set_state(state)
    return captions.tolist()


def scan_split(root, captions):
    folder = root / "annotations" / "scan_split"
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train_caps.txt", captions)
    write_lines(folder / "train_ids.txt", range(len(captions)))
    return folder


def options(root, ratio, seed, kind="random", *more):
    return parse_args("noise", ["--dataset", "cc", "--dataset_root", str(root), "--seed", str(seed),
                                "--noise_ratio", str(ratio), "--noise_kind", kind, *more])


def training_captions(root, ratio, seed, log=print, kind="random"):
    return noise.training_captions(options(root, ratio, seed, kind), log)


@pytest.mark.parametrize("seed", [0, 1, 99, 2**32 - 1])
@pytest.mark.parametrize("ratio", [0.2, 0.29, 0.4, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("copies", [1, 10])
def test_file_is_what_the_released_procedure_writes(tmp_path, ratio, seed, copies):
    captions = CAPTIONS * copies
    scan_split(tmp_path, captions)
    path, noisy = construct_noise(options(tmp_path, ratio, seed))
    assert noisy == released(captions, ratio, seed)
    assert path.read_bytes() == "".join(f"{c}\n" for c in noisy).encode()
    assert path.name == (f"{ratio}_noise_train_caps.txt" if seed == 99 else
                         f"{ratio}_noise_random_seed{seed}_train_caps.txt")


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_order_is_the_released_one_and_leaves_the_global_generator(n, ratio, seed):
    before = np.random.get_state()[1].tolist()
    order = random_order(n, ratio, seed)
    assert np.random.get_state()[1].tolist() == before
    assert order.tolist() == released(range(n), ratio, seed)


@pytest.mark.parametrize("spelling", ["0.20", ".2", "2e-1", "0.2"])
def test_existing_file_is_read_in_any_spelling_of_its_ratio(tmp_path, spelling):
    folder = scan_split(tmp_path, CAPTIONS)
    write_lines(folder / f"{spelling}_noise_train_caps.txt", CAPTIONS[::-1])
    before = tree(tmp_path)
    for seed in (99, 3):
        said = []
        captions, path = training_captions(tmp_path, 0.2, seed, said.append)
        assert captions == CAPTIONS[::-1] and path.name.startswith(spelling)
        assert said == [f"noise file at hand: {path}, not made for --seed {seed}"]
    assert tree(tmp_path) == before
    (folder / "train_caps.txt").unlink()  # of a folder that holds no more
    assert training_captions(tmp_path, 0.2, 99)[0] == CAPTIONS[::-1]


def test_our_own_spelling_comes_first_and_other_ratios_do_not_count(tmp_path):
    folder = scan_split(tmp_path, CAPTIONS)
    for name in ("0.20", "0.2", "0.02", "0.25", "x0.2", "old0.2"):
        write_lines(folder / f"{name}_noise_train_caps.txt", [name])
    assert training_captions(tmp_path, 0.2, seed=1)[0] == ["0.2"]
    assert training_captions(tmp_path, 0.25, seed=1)[0] == ["0.25"]


@pytest.mark.parametrize("ratio", [0, 0.0])
def test_ratio_zero_reads_the_clean_captions_and_writes_nothing(tmp_path, ratio):
    folder = scan_split(tmp_path, CAPTIONS)
    write_lines(folder / "0.0_noise_train_caps.txt", CAPTIONS[::-1])
    before = tree(tmp_path)
    assert training_captions(tmp_path, ratio, seed=1) == (CAPTIONS, folder / "train_caps.txt")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("ratio", [0.2, 0.6, 1 / 3, 0.123456789012])
def test_missing_file_is_made_once_and_kept(tmp_path, ratio):
    scan_split(tmp_path, CAPTIONS * 4)
    said = []
    captions, path = training_captions(tmp_path, ratio, 7, said.append)
    assert captions == released(CAPTIONS * 4, ratio, 7) == read_lines(path)
    assert len(said) == 1 and str(path) in said[0] and "seed 7" in said[0]
    assert training_captions(tmp_path, ratio, 7, said.append) == (captions, path)
    assert len(said) == 1


@pytest.mark.parametrize("order", [(99, 3, 4), (3, 99, 4)])
@pytest.mark.parametrize("kind", ["random", "similar"])
def test_each_seed_and_kind_has_its_file_and_none_is_taken_for_another(tmp_path, order, kind):
    folder = scan_split(tmp_path, CAPTIONS * 4)
    training_captions(tmp_path, 0.5, 99, kind="random")
    found = [training_captions(tmp_path, 0.5, seed, kind=kind) for seed in order * 2]
    assert found[:3] == found[3:] and len({str(captions) for captions, _ in found}) == 3
    for seed, (captions, path) in zip(order, found, strict=False):
        own = options(tmp_path / "alone", 0.5, seed, kind)
        scan_split(tmp_path / "alone", CAPTIONS * 4)
        assert construct_noise(own)[1] == captions
        assert path == folder / (tmp_path / "alone" / construct_noise(own)[0]).name


def test_a_file_of_the_released_name_counts_where_it_is_what_the_seed_makes(tmp_path):
    folder, said = scan_split(tmp_path, CAPTIONS * 4), []
    path, noisy = construct_noise(options(tmp_path, 0.5, 3))
    path.rename(folder / "0.5_noise_train_caps.txt")  # as older versions called it
    assert training_captions(tmp_path, 0.5, 3, said.append)[0] == noisy and not said
    assert training_captions(tmp_path, 0.5, 4, said.append)[0] == noisy  # perhaps the authors'
    assert "not made for --seed 4" in said[0]
    script.main(["--dataset", "cc", "--dataset_root", str(tmp_path), "--noise_ratio", "0.5",
                 "--seed", "4"])
    assert training_captions(tmp_path, 0.5, 4, said.append)[0] != noisy and len(said) == 1


def test_of_two_runs_that_make_a_file_the_first_one_s_stays(tmp_path):
    folder = scan_split(tmp_path, CAPTIONS)
    write_lines(folder / "0.5_noise_train_caps.txt", CAPTIONS[::-1])
    path, _ = construct_noise(options(tmp_path, 0.5, 99), replace=False)
    assert read_lines(path) == CAPTIONS[::-1]
    assert [path.name for path in folder.glob("*0.5*")] == ["0.5_noise_train_caps.txt"]


# ---- near misses ---------------------------------------------------------------------------------


def literal_swaps(captions, image_of, positions):
    """The swaps of `similar_order`, caption by caption."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [captions[i] for i in positions]
    vectors = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit_transform(texts).toarray()
    present = (vectors > 0).sum(axis=0)
    vectors[:, present > len(texts) / 2] = 0
    own = {}
    for caption, image in zip(captions, image_of, strict=True):
        own.setdefault(image, set()).add(caption)
    left, swaps = list(range(len(texts))), []
    while left:
        p = left.pop(0)
        fit = [q for q in left if texts[q] not in own[image_of[positions[p]]]
               and texts[p] not in own[image_of[positions[q]]]]
        if fit:
            q = max(fit, key=lambda q: (round(vectors[p] @ vectors[q], 5), -q))
            left.remove(q)
            swaps.append((positions[p], positions[q]))
    return swaps


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_similar_noise_exchanges_the_most_similar_captions(monkeypatch, ratio, block):
    monkeypatch.setattr(noise, "BLOCK", block)
    rng = np.random.default_rng(0)
    words = "dog cat man ball tree red blue big old of".split()
    captions = [" ".join([*rng.choice(words, rng.integers(1, 4)), *["the"] * (rng.random() < 0.6)])
                for _ in range(120)]
    captions[7], captions[30] = "二匹の犬", "?!"
    image_of = [f"x{k // 3}" for k in range(120)]
    order = similar_order(captions, image_of, ratio, 5)
    state = np.random.RandomState(5)
    positions = np.arange(120)
    state.shuffle(positions)
    expected = np.arange(120)
    for p, q in literal_swaps(captions, image_of, positions[: int(ratio * 120)]):
        expected[p], expected[q] = q, p
    assert order.tolist() == expected.tolist()
    changed = np.flatnonzero(order != np.arange(120))
    assert len(changed) > 0.9 * int(ratio * 120)
    assert wrong_pairs(captions, [captions[i] for i in order], image_of)[changed].all()


@pytest.mark.parametrize("captions", [["a"] * 6, ["a"], ["a", "b"], ["a", "a", "b", "b"]])
def test_similar_noise_where_little_can_change_places(captions):
    order = similar_order(captions, range(len(captions)), 0.99, 1)
    assert sorted(order) == list(range(len(captions)))
    for i, source in enumerate(order):
        assert i == source or captions[i] != captions[source]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, name", [("0", "0"), ("0.0", "0"), ("0.20", "0.2"), (".2", "0.2"),
                                        ("2e-1", "0.2"), ("0.05", "0.05"), ("1e-2", "0.01")])
def test_ratio_is_written_in_one_spelling(text, name):
    assert ratio_name(text) == ratio_name(float(text)) == name


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken):
    folder = scan_split(tmp_path, CAPTIONS)
    old = folder / "0.4_noise_train_caps.txt"
    write_lines(old, ["as it was"])
    before = tree(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(InputError, match="0.4_noise_train_caps.txt: No space left on device"):
        construct_noise(options(tmp_path, 0.4, 99))
    assert tree(tmp_path) == before and old.read_text() == "as it was\n"


def test_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / "new" / "file.txt") as f:
            f.write("half")
            raise KeyboardInterrupt
    assert tree(tmp_path) == set()


def test_written_files_have_ordinary_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file.txt") as f:
            f.write("x")
    finally:
        os.umask(umask)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o640


def test_wrong_pairs_have_none_of_their_image_s_captions():
    clean = ["a", "b", "c", "d", "a", "f"]
    image_of = [0, 0, 1, 1, 2, 2]
    noisy = ["b", "a", "a", "c", "f", "d"]  # moved within the image; foreign; own; ...; foreign
    assert wrong_pairs(clean, noisy, image_of).tolist() == [False, False, True, False, False, True]
    assert not wrong_pairs(clean, clean, image_of).any()
