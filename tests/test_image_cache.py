"""The cache of decoded images, and the processes that read images: dying workers, signals, damaged
files, two runs that share a data folder."""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import banks, describe, make_dataset, options
from processes import BANK, CLIP, NPC, ROOT, Started, differences, run, save_small

import clip
from data import training_pairs
from dataset import make_scenes
from utils.errors import InputError
from utils.files import lock
from utils.reading.images import ImageCache, Images

PREPROCESS = clip.Preprocess(32)
NUM = 12
TorchIterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter


@pytest.fixture
def counted(monkeypatch):
    """List that gets the number of each image as it is decoded."""
    decoded, decode = [], Images.decode
    monkeypatch.setattr(Images, "decode", lambda self, k: (decoded.append(k), decode(self, k))[1])
    return decoded


@pytest.fixture
def cached(dataset, tmp_path):
    """Function: the training images of one data set behind the cache in tmp_path / "cache"."""
    data = dataset("f30k")

    def images(folder="cache"):
        args = options(data, "--batch_size", 8, "--image_cache", tmp_path / folder, "--data_on",
                       "workers")
        return training_pairs(args, PREPROCESS).images

    return images


def everything(images):
    return torch.stack([images[k] for k in range(len(images))])


# ---- contents -----------------------------------------------------------------------------------


def test_images_are_decoded_once_and_bit_for_bit_the_same(cached, counted, datasets):
    plain = training_pairs(options(datasets["f30k"], "--batch_size", 8), PREPROCESS).images
    expected = everything(plain)
    counted.clear()
    images = cached()
    assert torch.equal(everything(images), expected) and counted == list(range(NUM))
    images[3].zero_()  # what is served can be changed without harm
    assert torch.equal(everything(images), expected)
    assert torch.equal(everything(cached()), expected)  # a later run
    assert len(counted) == NUM


def test_changed_images_and_other_resolutions_get_another_cache(dataset, tmp_path):
    data = dataset("f30k")
    paths = [data.root / "images" / data.name(i) for i in data.ids["train"]]
    first = ImageCache(tmp_path / "cache", paths, 32).path
    assert ImageCache(tmp_path / "cache", paths, 32).path == first
    assert ImageCache(tmp_path / "cache", paths, 16).path != first
    assert ImageCache(tmp_path / "cache", paths[::-1], 32).path != first
    os.utime(paths[2], ns=(1, 1))
    assert ImageCache(tmp_path / "cache", paths, 32).path != first


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_damaged_cache_is_decoded_again(cached, counted, damage):
    images = cached()
    expected = everything(images)
    counted.clear()
    os.truncate(images.cache.path, NUM * images.cache.size // 2 if damage == "cut" else 0)
    for _ in range(2):  # the second time it is mended
        assert torch.equal(everything(cached()), expected) and len(counted) == NUM


def test_an_image_counts_as_stored_once_it_is_on_disk(cached, counted, monkeypatch):
    images = cached()
    images.__getitems__([1, 2])

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            images.__getitems__([3, 4])
    assert [cached().cache.has(k) for k in range(NUM)] == [k in (1, 2) for k in range(NUM)]
    everything(cached())
    assert counted == [1, 2, 3, 4, 0, *range(3, NUM)]


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="cannot make the image cache .*choose another"):
        ImageCache(tmp_path / "a", [tmp_path / "a"], 4)
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(InputError, match="No space left"):
        ImageCache(tmp_path / "cache", [tmp_path / "a"], 4)
    assert list((tmp_path / "cache").iterdir()) == []


# ---- processes that read images -----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("workers") / "data", "f30k")
    data.model = save_small(data.root / "model.pt")
    return data


def arguments(data, logs, *more):
    return [*data.options, "--vision_model", str(data.model), "--context_length", "12",
            "--batch_size", "7", "--epochs", "1", "--device", "cpu", "--noise_ratio", "0.4",
            "--checkpoint_path", str(logs), "--experiments", "x", "--data_on", "workers",
            *map(str, more)]


def result(folder):
    content = clip.read_checkpoint(folder / "x" / "epoch1.pt")
    return content["state_dict"], content["optimizer"], (folder / "x" / "log.jsonl").read_text()


def note_decoded(path):
    """Hook: note the name of each image that is decoded."""
    decode = Images.decode

    def noted(self, k):
        with open(path, "a") as f:
            print(self.names[k], file=f)
        return decode(self, k)

    Images.decode = noted


def test_any_number_of_workers_and_a_cache_give_the_same_run(small, tmp_path):
    """With the cache, each image is decoded once in its life, before a bank's or a run's first
    use of it."""
    for name, more in (("0", []), ("1", []), ("4", ["--image_cache", tmp_path / "c"]),
                       ("0", ["--image_cache", tmp_path / "c"])):
        logs = tmp_path / f"{name}{len(more)}"
        for bank in banks(small.root).values():
            bank.unlink()
        run(NPC, arguments(small, logs, "--num_workers", name, *more), tmp_path / "out",
            hook=functools.partial(note_decoded, tmp_path / f"decoded{len(more)}"))
        assert differences(result(logs), result(tmp_path / "00")) == []
    names = [small.name(i) for split in ("train", "dev") for i in small.ids[split]]
    assert sorted((tmp_path / "decoded2").read_text().split()) == sorted(names)


def die_at(name, how):
    """Hook: decoding the image `name` ends the process."""
    decode = Images.decode

    def fatal(self, k):
        if self.names[k] == name:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(3)
        return decode(self, k)

    Images.decode = fatal


def signal_workers(*numbers):
    """Hook: signals reach idle workers after the third step, as a cluster may send them."""
    from test_resume import after_step

    def send():
        time.sleep(0.3)  # they have read ahead and wait
        for process in multiprocessing.active_children():
            for number in numbers:
                os.kill(process.pid, number)

    after_step(3, send)


def test_workers_leave_signals_to_the_main_process(small, tmp_path):
    run(CLIP, arguments(small, tmp_path, "--num_workers", 2), tmp_path / "out", 0,
        functools.partial(signal_workers, signal.SIGTERM, signal.SIGINT))


@pytest.mark.parametrize("workers, how", [(3, "killed"), (1, "exit"), (1, "idle")])
def test_the_death_of_a_worker_ends_the_run(small, tmp_path, workers, how):
    """At an image, or between two batches. The run does not hang, and torch's error is shown."""
    argv = arguments(small, tmp_path, "--num_workers", workers, "--epochs", 50)
    hook = functools.partial(die_at, small.name(small.ids["train"][5]), how)
    if how == "idle":
        hook = functools.partial(signal_workers, signal.SIGKILL)
    said = run(CLIP, argv, tmp_path / "out", 1, hook)
    assert "Traceback" in said and "torch/utils/data/dataloader.py" in said


def interrupt_forks(number):
    """Hook: a signal comes whenever this process is about to be forked."""
    os.register_at_fork(before=lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_while_workers_start_is_not_lost(small, tmp_path, number, status):
    """Python swallows the exception that a signal's handler raises within a fork."""
    argv = arguments(small, tmp_path, "--num_workers", 2)
    said = run(BANK, [*argv[: argv.index("--epochs")], "--device", "cpu", "--data_on", "workers",
                      "--num_workers", "2"], tmp_path / "out", status,
               functools.partial(interrupt_forks, number))
    assert "Exception ignored" not in said and "Traceback" not in said


MOUNT = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=256k tmpfs /dev/shm && exec \"$@\"",
         "sh"]


@pytest.mark.skipif(subprocess.run([*MOUNT, "true"], capture_output=True, check=False).returncode,
                    reason="needs a mount of its own")
def test_shared_memory_that_is_too_small_is_one_line(tmp_path):
    data = tmp_path / "data"
    make_scenes.main(["--out", str(data), "--train", "60", "--dev", "2", "--test", "2"])
    done = subprocess.run(
        [*MOUNT, sys.executable, "main_CLIP.py", "--dataset", "f30k", "--dataset_root", data,
         "--vision_model", "tiny", "--device", "cpu", "--num_workers", "2", "--batch_size", "256",
         "--epochs", "1", "--warmup", "1", "--data_on", "workers", "--checkpoint_path", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    for word in ("shared memory", "--shm-size", "--num_workers 0"):
        assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def look_often():
    """Hook: torch's workers and their parent look whether the other lives every tenth of a second,
    not every 5 seconds."""
    utils = torch.utils.data._utils
    utils.MP_STATUS_CHECK_INTERVAL = utils.worker.MP_STATUS_CHECK_INTERVAL = 0.1
    TorchIterator._try_get_data.__defaults__ = (0.1,)


def session(leader):
    """The processes of a session."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(ProcessLookupError):  # others come and go
            found += [pid] if os.getsid(pid) == leader else []
    return found


def test_workers_end_with_their_run(small, tmp_path):
    """Although they ignore the signals that reach the whole group, none is left behind."""
    argv = arguments(small, tmp_path, "--num_workers", 2, "--epochs", 500, "--overwrite")
    for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        started = Started(CLIP, argv, tmp_path / f"out{number}", hook=look_often)
        started.wait_for("epoch 1: dev")
        group = session(started.pid)
        assert len(group) == 3 or number == signal.SIGKILL
        os.kill(started.pid, number)
        assert started.wait() == status, started.text()
        lock(tmp_path / "x" / ".lock", "x").close()  # which workers do not hold
        end = time.monotonic() + 60
        while any(os.path.exists(f"/proc/{pid}") for pid in group) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in group)


# ---- two runs at once ---------------------------------------------------------------------------


def test_two_runs_at_once_share_a_data_folder(small, tmp_path):
    """Both make the noise file, the bank and the image cache; both end as one that is alone."""
    roots = [tmp_path / name for name in ("alone", "shared")]
    for root in roots:
        shutil.copytree(small.root, root, ignore=shutil.ignore_patterns("*noise_t*", "*mbank*"))
    alone, shared = (describe(root, "f30k") for root in roots)
    alone.model = shared.model = small.model
    run(NPC, arguments(alone, tmp_path / "a", "--num_workers", 0), tmp_path / "out")
    started = []
    for k in range(3):
        argv = arguments(shared, tmp_path / f"s{k}", "--num_workers", k % 2, "--image_cache",
                         tmp_path / "cache")
        started.append(Started(NPC, argv, tmp_path / f"out{k}"))
    for k, one in enumerate(started):
        assert one.wait() == 0, one.text()
        assert differences(result(tmp_path / f"s{k}"), result(tmp_path / "a")) == []
    for folder in (shared.root / "annotations").iterdir():
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # train and dev
    one, two = (np.load(banks(root)["0.4_mbank"]) for root in roots)
    assert all(np.array_equal(one[k], two[k]) for k in ("image_entry", "caption_entry", "loss"))


# ---- long runs ----------------------------------------------------------------------------------


def watch_memory(path, warm):
    """Hook: note the memory (kB) and the open files of the process every 100 steps."""
    from test_resume import after_step

    def note():
        status = Path("/proc/self/status").read_text()
        kilobytes = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
        with open(path, "a") as f:
            print(kilobytes, len(os.listdir("/proc/self/fd")), file=f)

    for step in warm:
        after_step(step, note)


@pytest.mark.parametrize("workers, steps", [
    (1, 120), pytest.param(0, 2000, marks=pytest.mark.slow),
    pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_memory_stays_flat(small, tmp_path, workers, steps):
    """Over one epoch, too: what a step leaves behind must not hold its batch."""
    captions = (small.split_folder / "train_caps.txt").read_text()
    root = tmp_path / "long"
    shutil.copytree(small.root, root, ignore=shutil.ignore_patterns("*noise_t*", "*mbank*"))
    many = describe(root, "f30k")
    many.model = small.model
    repeat = max(1, steps // 30)
    (many.split_folder / "train_caps.txt").write_text(captions * repeat)
    ids = (many.split_folder / "train_ids.txt").read_text()
    (many.split_folder / "train_ids.txt").write_text(ids * repeat)
    argv = arguments(many, tmp_path, "--num_workers", workers, "--batch_size", "2", "--lr", "1e-6")
    notes = tmp_path / "notes"
    marks = range(steps // 5, steps, max(1, steps // 20))
    run(NPC, argv, tmp_path / "out", hook=functools.partial(watch_memory, notes, marks))
    table = np.loadtxt(notes)
    print(json.dumps({"workers": workers, "steps": steps, "first_MB": table[0, 0] / 1e3,
                      "last_MB": table[-1, 0] / 1e3}))
    assert len(table) == len(marks)
    assert table[-1, 1] <= table[0, 1] + 4  # open files
    assert table[-1, 0] - table[0, 0] < 8000  # kB
