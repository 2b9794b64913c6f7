"""The three layouts of the data, and what the loaders serve from them."""

import argparse
import re
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import NUM_ANNS, NUM_IMAGES, options, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

import clip
from data import retrieval_split, training_pairs
from utils.errors import InputError
from utils.method.batches import Batches, EpochSampler, distinct_items, training_loader
from utils.method.memorybank import MemoryBank
from utils.reading import images as images_module
from utils.reading.images import Images, cgroup_limits, image_loader, in_memory
from utils.reading.layout import image_names, read_captions, read_ids, read_lines
from utils.training.checkpoints import hash_of_data

PREPROCESS = clip.Preprocess(32)
LAYOUTS = list(NUM_ANNS)


def pairs_of(dataset, *more, log=print):
    return training_pairs(options(dataset, *more), PREPROCESS, log)


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often each image, by its file name, is decoded."""
    counts, decode = Counter(), Images.decode
    monkeypatch.setattr(Images, "decode", lambda self, k: (
        counts.update([self.names[k]]), decode(self, k))[1])
    return counts


def crop(dataset, image_id):
    """What CLIP's preprocessing makes of an image, before normalisation."""
    with Image.open(dataset.root / "images" / dataset.name(image_id)) as image:
        return torch.from_numpy(PREPROCESS.crop(image))


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_pairs_follow_the_two_files(datasets, layout):
    dataset = datasets[layout]
    pairs = pairs_of(dataset)
    captions = dataset.lines("train_caps.txt")
    assert len(pairs) == len(captions) == NUM_IMAGES["train"] * dataset.num_anns
    assert pairs.captions == captions
    for i, caption in enumerate(captions):
        image_id = dataset.ids["train"][i // dataset.num_anns]
        assert pairs.image_ids[pairs.image_of[i]] == image_id
        assert torch.equal(pairs.images[pairs.image_of[i]], crop(dataset, image_id))
        tokens = clip.tokenize(caption)[0]
        assert torch.equal(pairs.tokens[pairs.text_of[i]], tokens)
    assert len(pairs.images) == NUM_IMAGES["train"]
    assert len(pairs.tokens) == len(set(captions))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_retrieval_splits_have_an_id_per_caption(datasets, layout, split):
    dataset = datasets[layout]
    pairs = retrieval_split(options(dataset), split, PREPROCESS)
    ids = dataset.lines(f"{split}_ids.txt")
    assert [pairs.image_ids[row] for row in pairs.image_of] == ids
    assert pairs.captions == dataset.lines(f"{split}_caps.txt")
    assert len(pairs.images) == NUM_IMAGES[split] == len(set(ids))
    assert torch.equal(pairs.images[2], crop(dataset, pairs.image_ids[2]))


@pytest.mark.parametrize("layout, ids, names", [
    ("coco", ["9", "000581929"], ["COCO_2014_000000000009.jpg", "COCO_2014_000000581929.jpg"]),
    ("f30k", ["2", "0", "1"], ["c.jpg", "a.jpg", "sub/b.png"]),  # lines, counted from 0
    ("cc", ["00012", "x-y_z", "1.5"], ["00012.jpg", "x-y_z.jpg", "1.5.jpg"])])
def test_image_names_of_the_layouts(tmp_path, layout, ids, names):
    (tmp_path / "annotations/scan_split").mkdir(parents=True)
    write_lines(tmp_path / "annotations/scan_split/image_name.txt", ["a.jpg", "sub/b.png", "c.jpg"])
    assert image_names(tmp_path, layout, ids) == names


def test_an_image_name_that_fits_two_files_is_missing(dataset):
    """One file that differs in blanks at its ends, or in its Unicode form, would be taken."""
    data = dataset("cc")
    path = data.root / "images" / data.name(data.ids["train"][0])
    for name in (f" {path.name}", f"{path.name} "):
        assert len(pairs_of(data)) == 12
        (path.parent / name).write_bytes(path.read_bytes())
    path.unlink()
    with pytest.raises(InputError, match=f"1 images are missing from .*{path.name}"):
        pairs_of(data)


@pytest.mark.parametrize("num_anns", [1, 5, None])
def test_num_anns_repeats_training_ids_only(tmp_path, num_anns):
    (tmp_path / "annotations/scan_split").mkdir(parents=True)
    for split in ("train", "dev"):
        write_lines(tmp_path / f"annotations/scan_split/{split}_ids.txt", ["7", "3"])
    n = 2 * (num_anns or 3)
    assert read_ids(tmp_path, "train", n, num_anns, "f") == ["7"] * (n // 2) + ["3"] * (n // 2)
    assert read_ids(tmp_path, "dev", 2, num_anns, "f") == ["7", "3"]


def test_an_image_that_occurs_in_two_places_of_the_ids_is_one_image(dataset):
    data = dataset("cc")
    ids = data.lines("train_ids.txt")
    write_lines(data.split_folder / "train_ids.txt", [*ids[:-1], ids[0]])
    pairs = pairs_of(data)
    assert len(pairs.images) == len(ids) - 1
    assert pairs.image_of.tolist() == [*range(len(ids) - 1), 0]


def test_wrong_pairs_are_known_beside_the_clean_captions_only(dataset):
    data = dataset("cc")
    pairs = pairs_of(data, "--noise_ratio", "0.5")
    clean, noisy = data.lines("train_caps.txt"), data.lines("0.5_noise_train_caps.txt")
    assert pairs.captions == noisy
    assert pairs.wrong.tolist() == [a != b for a, b in zip(clean, noisy, strict=True)]
    assert pairs.wrong.any()
    (data.split_folder / "train_caps.txt").unlink()
    assert pairs_of(data, "--noise_ratio", "0.5").wrong is None


# ---- lines --------------------------------------------------------------------------------------


ODD = "a\u2028b\x0bc\x0cd\x85e\x1cf"  # no line ends


@pytest.mark.parametrize("content, lines", [
    *((content, ["a b", "c"]) for content in (
        b"a b\nc\n", b"a b\r\nc\r\n", b"a b\rc", b" a b \n\tc", b"a b\nc",
        b"\xef\xbb\xbfa b\nc\n")),
    (f"{ODD}\nzweite é 犬\n".encode(), [ODD, "zweite é 犬"])])
def test_line_ends_alone_separate_lines_and_margins_do_not_matter(tmp_path, content, lines):
    (tmp_path / "f.txt").write_bytes(content)
    assert read_lines(tmp_path / "f.txt") == read_captions(tmp_path / "f.txt") == lines


@pytest.mark.parametrize("content, said", [
    (b"a\nb\nc \xff\n", "line 3: .*UTF-8"), (b"caf\xe9\n", "line 1: .*UTF-8"),
    (b"\xff\xfe\n", "line 1: .*UTF-8"), (b"a\n\xed\xa0\x80\n", "line 2: .*UTF-8"),
    (b"a\n\nb\n", "line 2: empty"), (b"a\n \t\nb\n\n", r"line 2 \(and 1 more\): empty")])
def test_a_bad_line_is_named(tmp_path, content, said):
    (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"f\.txt, {said}"):
        read_captions(tmp_path / "f.txt")


def test_a_file_without_captions_is_refused(tmp_path):
    (tmp_path / "f.txt").write_bytes(b"")
    with pytest.raises(InputError, match="f.txt holds no captions"):
        read_captions(tmp_path / "f.txt")


# ---- captions -----------------------------------------------------------------------------------


def test_too_long_captions_are_cut_with_one_warning_that_counts_them(dataset):
    data, said = dataset("f30k"), []
    captions = data.lines("train_caps.txt")
    captions[4] = captions[17] = "dog " * 100
    captions[30] = "cat " * 76
    captions[31] = "cat " * 75  # fits, with the two end marks
    write_lines(data.split_folder / "train_caps.txt", captions)
    pairs = pairs_of(data, log=said.append)
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1 and "train_caps.txt" in warnings[0]
    assert re.search(r"\b3 captions\b.*\b77 tokens\b", warnings[0])  # lines 5, 18 and 31
    end = int(pairs.tokens.max())
    for line in (4, 30, 31):
        tokens = pairs.tokens[pairs.text_of[line]]
        assert tokens[-1] == end and (tokens[:-1] != end).all()


def test_context_length_cuts_captions(datasets):
    pairs = pairs_of(datasets["f30k"], "--context_length", "4")
    full = pairs_of(datasets["f30k"])
    assert pairs.tokens.shape[1] == 4
    assert torch.equal(pairs.tokens[:, :3], full.tokens[:, :3])
    assert (pairs.tokens[:, 3] == full.tokens.max()).all()


@pytest.mark.parametrize("length", [1, 7, 20, 1000])
def test_dev_length_keeps_the_first_captions_and_their_images(datasets, length):
    data = datasets["f30k"]
    args = options(data, "--dev_length", length)
    dev = retrieval_split(args, "dev", PREPROCESS)
    ids, captions = data.lines("dev_ids.txt")[:length], data.lines("dev_caps.txt")[:length]
    assert dev.captions == captions and [dev.image_ids[k] for k in dev.image_of] == ids
    assert len(dev.images) == len(set(ids))
    assert len(retrieval_split(args, "test", PREPROCESS)) == 30


# ---- steps --------------------------------------------------------------------------------------


@st.composite
def items(draw):
    b, kinds = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    rows = draw(st.sampled_from([1, 3]))
    flat = draw(st.lists(st.integers(0, kinds), min_size=rows * b, max_size=rows * b))
    return np.array(flat).reshape(rows, b)


@given(items())
@settings(max_examples=200)
def test_distinct_items_are_each_kept_once_batch_only_then_both_then_memory_only(items):
    distinct, rows, end, start = distinct_items(items)
    assert torch.equal(torch.from_numpy(distinct)[rows], torch.from_numpy(items))
    batch, memory = set(items[0].tolist()), set(items[1:].ravel().tolist())
    assert len(distinct) == len(batch | memory)
    assert set(distinct[:start]) == batch - memory
    assert set(distinct[start:end]) == batch & memory
    assert set(distinct[end:]) == memory - batch


@settings(max_examples=200)
@given(batch_size=st.integers(2, 9), more=st.integers(0, 30), others=st.integers(0, 30),
       seed=st.integers(0, 9), first=st.integers(0, 3))
def test_sampler_of_chosen_indices(batch_size, more, others, seed, first):
    """An epoch is one pass over them, whatever else there is; the next one has another order."""
    k = batch_size + more
    chosen = np.sort(np.random.default_rng(seed).permutation(k + others)[:k])
    sampler = EpochSampler(chosen, batch_size, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == k // batch_size
    assert sum(batches, []) == chosen[np.random.default_rng([seed, 0]).permutation(k)][
        : len(batches) * batch_size].tolist()
    sampler.first = first
    assert list(sampler) == batches[first:]
    sampler.epoch = 1
    assert sum(list(sampler), []) == chosen[np.random.default_rng([seed, 1]).permutation(k)][
        first * batch_size : len(batches) * batch_size].tolist()


def test_what_is_trained_on_is_hashed(datasets):
    """The pairs, those that are chosen, the memory entries or where they are drawn from."""
    data = datasets["f30k"]
    pairs = pairs_of(data)
    args, by_chance, clean = (options(data, *more) for more in (
        (), ("--memory", "random"), ("--train_on", "clean")))
    banks = [random_bank(pairs, seed) for seed in (0, 1)]
    for k, bank in enumerate(banks):
        bank.clean = np.arange(len(pairs)) % (k + 2) == 0
    hashes = {hash_of_data(loader) for loader in (
        training_loader(args, pairs),
        training_loader(args, pairs_of(data, "--noise_ratio", 0)),  # the same
        training_loader(args, pairs, banks[0], with_memory=False),  # the same again
        *(training_loader(options, pairs, bank, memory) for bank in banks
          for options, memory in ((args, True), (by_chance, True), (clean, False), (clean, True))))}
    assert len(hashes) == 9
    banks[0].clean[:] = True
    assert hash_of_data(training_loader(clean, pairs, banks[0], False)) in hashes


def test_fewer_chosen_pairs_than_a_batch_are_refused(datasets):
    pairs = pairs_of(datasets["f30k"])
    args = options(datasets["f30k"], "--batch_size", 5, "--train_on", "clean")
    bank = random_bank(pairs)
    bank.clean = np.arange(len(pairs)) < 5
    assert len(training_loader(args, pairs, bank)) == 1
    bank.clean[0] = False
    with pytest.raises(InputError, match="--batch_size 5 is larger than the 4 pairs that"):
        training_loader(args, pairs, bank)


def random_bank(pairs, seed=0):
    rng = np.random.default_rng(seed)
    n = len(pairs)
    return MemoryBank(rng.integers(0, n, len(pairs.images)), rng.integers(0, n, n))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_holds_the_batch_and_its_memory_entries(datasets, layout):
    data = datasets[layout]
    pairs = pairs_of(data)
    bank = random_bank(pairs)
    batch = np.random.default_rng(2).permutation(len(pairs))[:9].tolist()
    step = Batches(pairs, bank)[batch]
    assert step.indices.tolist() == batch
    captions = data.lines("train_caps.txt")
    for k, entries in enumerate([batch, [bank.image_entry[pairs.image_of[i]] for i in batch],
                                 [bank.caption_entry[i] for i in batch]]):
        images = torch.stack([crop(data, data.ids["train"][i // data.num_anns]) for i in entries])
        tokens = clip.tokenize([captions[i] for i in entries])
        assert torch.equal(step.images.items[step.images.rows[k]], images)
        length = step.texts.items.shape[1]
        assert torch.equal(step.texts.items[step.texts.rows[k]], tokens[:, :length])
        assert not tokens[:, length:].any()
    assert step.texts.items[:, -1].any()  # not a column too many
    alone = Batches(pairs)[batch]  # without a bank
    assert alone.images.rows.shape == alone.texts.rows.shape == (1, 9)
    assert alone.images.num_batch == len(alone.images.items) == len({*pairs.image_of[batch]})
    for one, whole in zip(alone[1:], step[1:], strict=True):
        own = one.items[one.rows[0]]
        assert torch.equal(own, whole.items[whole.rows[0]][..., : own.shape[-1]])


def test_each_distinct_image_of_a_step_is_decoded_once(datasets, decoded):
    pairs = pairs_of(datasets["f30k"], "--data_on", "workers")
    bank, batch = random_bank(pairs), list(range(0, 60, 4))
    Batches(pairs, bank)[batch]
    entries = [*batch, *bank.image_entry[pairs.image_of[batch]], *bank.caption_entry[batch]]
    assert decoded == Counter({pairs.images.names[pairs.image_of[i]] for i in entries})


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_serves_the_sampler_s_batches_in_any_number_of_processes(datasets, workers):
    data = datasets["f30k"]
    args = options(data, "--batch_size", 13, "--seed", 6)
    args.num_workers = workers
    pairs = pairs_of(data, "--data_on", "workers")
    loader = training_loader(args, pairs, random_bank(pairs))
    sampler, reference = EpochSampler(np.arange(60), 13, 6), Batches(pairs, random_bank(pairs))
    for epoch in (0, 1):
        loader.sampler.epoch = sampler.epoch = epoch
        steps = list(loader)
        assert [step.indices.tolist() for step in steps] == list(sampler)
        for step in steps:
            own = reference[step.indices.tolist()]
            assert torch.equal(step.images.items, own.images.items)
            assert torch.equal(step.images.rows, own.images.rows)
            assert torch.equal(step.texts.items, own.texts.items)


# ---- images in memory ---------------------------------------------------------------------------


def served(data, place, device="cpu"):
    """The batches of two epochs and the dev images on a device, with `--data_on place`."""
    args = options(data, "--batch_size", 5, "--data_on", place, "--device", device)
    pairs = training_pairs(args, PREPROCESS)
    dev = retrieval_split(args, "dev", PREPROCESS)
    loader, steps = training_loader(args, pairs, random_bank(pairs)), []
    for loader.sampler.epoch in (0, 1):
        steps += [batch.to(args.device) for batch in loader]
    return steps, torch.cat([crops.cpu() for crops in image_loader(args, dev.images)])


@pytest.mark.parametrize("place, device", [
    ("device", "cpu"), *(pytest.param(place, "cuda", marks=pytest.mark.gpu)
                         for place in ("device", "workers"))])
def test_data_come_bit_for_bit_alike_from_everywhere(datasets, place, device):
    for data in datasets.values():
        (steps, dev), (expected, expected_dev) = served(data, place, device), served(data,
                                                                                     "workers")
        assert torch.equal(dev, expected_dev) and len(steps) == len(expected) > 1
        for ours, theirs in zip(steps, expected, strict=True):
            assert torch.equal(ours.indices.cpu(), theirs.indices)
            for one, other in zip(ours[1:], theirs[1:], strict=True):
                assert one.items.device.type == one.rows.device.type == device
                assert torch.equal(one.items.cpu(), other.items)
                assert torch.equal(one.rows.cpu(), other.rows) and one[2:] == other[2:]


@pytest.mark.parametrize("place, times", [("auto", 1), ("device", 1), ("workers", 2)])
def test_images_in_memory_are_decoded_once(datasets, decoded, place, times):
    args = options(datasets["f30k"], "--batch_size", 12, "--data_on", place)
    pairs = training_pairs(args, PREPROCESS)
    assert not decoded  # until somebody asks for one
    for _ in range(2):
        list(image_loader(args, Subset(pairs.images, range(6))))
        list(training_loader(args, pairs))
    few = set(pairs.images.names[:6])
    assert all(decoded[name] == 1 if times == 1 else decoded[name] > 2 for name in few)


def test_where_images_are_held_by_default(datasets, monkeypatch):
    """In memory if they fill a third of it at most, and are read more than once."""
    def place(*more, command="npc"):
        args = options(datasets["f30k"], *more, command=command)
        return in_memory(training_pairs(args, PREPROCESS).images)

    size = 12 * 3 * 32 * 32
    for room, fits in ((3 * size, True), (3 * size - 1, False)):
        monkeypatch.setattr("utils.reading.images.room", lambda *_, room=room: room)
        assert place() == fits and place("--data_on", "device")
        assert not place("--data_on", "workers")
        assert place("--judge_rounds", 1, command="memorybank") == fits
        assert not place(command="memorybank")  # which reads them once
    monkeypatch.setattr("utils.reading.images.room", lambda *_: 3 * size)
    monkeypatch.setattr("utils.reading.images.world", lambda: 2)
    assert not place() and place("--data_on", "device")


def test_the_room_of_a_gpu_is_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: argparse.Namespace(total_memory=12345))
    assert images_module.room(torch.device("cuda")) == 12345


def test_memory_by_chance_is_another_by_image_than_by_caption(datasets):
    pairs = pairs_of(datasets["f30k"])
    bank = random_bank(pairs)
    bank.clean = np.ones(len(pairs), bool)
    by_image, by_caption = Batches(pairs, bank, True).memory([3, 1, 4, 15, 9])
    assert (by_image != by_caption).any()


def test_training_and_dev_images_share_the_room(datasets, monkeypatch):
    data, size = datasets["f30k"], 3 * 32 * 32
    args = options(data)
    for room, dev_fits in ((3 * 16 * size, True), (3 * 16 * size - 1, False)):
        monkeypatch.setattr("utils.reading.images.HELD", weakref.WeakSet())
        monkeypatch.setattr("utils.reading.images.room", lambda *_, room=room: room)
        pairs = training_pairs(args, PREPROCESS)  # 12 images, and 4 of dev
        assert in_memory(pairs.images)
        assert in_memory(retrieval_split(args, "dev", PREPROCESS).images) == dev_fits


@pytest.mark.parametrize("line, file, limits", [
    ("0::/a/b", "a/memory.max", [5000]), ("0::/", "memory.max", [5000]),
    ("3:cpu:/c\n7:memory:/a", "memory/a/memory.limit_in_bytes", [5000]),
    ("7:memory:/docker/x", "memory/memory.limit_in_bytes", [5000]), ("0::/a", "b/memory.max", [])])
def test_limits_of_containers_and_jobs_are_seen(tmp_path, line, file, limits):
    (tmp_path / "cgroup").write_text(line + "\n")
    (tmp_path / "sys" / file).parent.mkdir(parents=True)
    (tmp_path / "sys" / "memory.max").write_text("max\n")
    (tmp_path / "sys" / file).write_text("5000\n")
    assert set(cgroup_limits(tmp_path / "cgroup", tmp_path / "sys")) == set(limits)


def test_image_loader_serves_each_image_once_in_order(datasets):
    data = datasets["coco"]
    pairs = pairs_of(data)
    batches = list(image_loader(options(data, "--eval_batch_size", 5), pairs.images))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    expected = torch.stack([crop(data, image_id) for image_id in data.ids["train"]])
    assert torch.equal(torch.cat(batches), expected)
