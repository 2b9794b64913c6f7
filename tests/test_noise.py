"""The noisy caption file against a literal transcription of the released procedure."""

import errno
import os

import numpy as np
import pytest
from conftest import tree, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import construct_noise
from construct_noise import noise_order, training_captions
from data import wrong_pairs
from utils.errors import InputError
from utils.files import atomic_write
from utils.reading.layout import ratio_name, read_lines

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
    return folder


@pytest.mark.parametrize("seed", [0, 1, 99, 2**32 - 1])
@pytest.mark.parametrize("ratio", [0.2, 0.29, 0.4, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("copies", [1, 10])
def test_file_is_what_the_released_procedure_writes(tmp_path, ratio, seed, copies):
    captions = CAPTIONS * copies
    scan_split(tmp_path, captions)
    path, noisy = construct_noise.construct_noise(tmp_path, ratio, seed)
    assert noisy == released(captions, ratio, seed)
    assert path.read_bytes() == "".join(f"{c}\n" for c in noisy).encode()
    assert path.name == f"{ratio}_noise_train_caps.txt"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_captions(n):
    assert [CAPTIONS[2:][i] for i in noise_order(n, 0.7, 5)] == released(CAPTIONS[2:][:n], 0.7, 5)


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_noise_permutes_at_most_its_share_of_the_captions(n, ratio, seed):
    order = noise_order(n, ratio, seed)
    assert sorted(order) == list(range(n))
    assert (order != np.arange(n)).sum() <= int(ratio * n)


def test_noise_is_drawn_without_touching_the_global_generator():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    noise_order(50, 0.5, 7)
    assert np.random.rand() == expected


@pytest.mark.parametrize("spelling", ["0.20", ".2", "2e-1", "0.2"])
def test_existing_file_is_read_in_any_spelling_of_its_ratio(tmp_path, spelling):
    folder = scan_split(tmp_path, CAPTIONS)
    write_lines(folder / f"{spelling}_noise_train_caps.txt", CAPTIONS[::-1])
    before = tree(tmp_path)
    captions, path = training_captions(tmp_path, 0.2, seed=1)
    assert captions == CAPTIONS[::-1] and path.name.startswith(spelling)
    assert tree(tmp_path) == before


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
    assert training_captions(tmp_path, ratio, 8, said.append) == (captions, path)
    assert len(said) == 1


def test_of_two_runs_that_make_a_file_the_first_one_s_stays(tmp_path, monkeypatch):
    folder = scan_split(tmp_path, CAPTIONS)
    construct_noise.construct_noise(tmp_path, 0.5, 1)
    expected, said = read_lines(folder / "0.5_noise_train_caps.txt"), []
    with monkeypatch.context() as patch:
        patch.setattr(construct_noise, "find_by_ratio", lambda *_: None)  # looked too early
        assert training_captions(tmp_path, 0.5, 2, said.append)[0] == expected
    assert "with another seed" in said[-1]
    assert [path.name for path in folder.glob("*0.5*")] == ["0.5_noise_train_caps.txt"]


@given(st.floats(0, 1, exclude_max=True))
def test_ratio_name_reads_back_as_the_ratio(ratio):
    assert float(ratio_name(ratio)) == ratio


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
        construct_noise.construct_noise(tmp_path, 0.4, 1)
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
