"""Images of a split: from their files or from the image cache, by worker processes if wanted, or
all of them in memory."""

import functools
import multiprocessing.util
import os
import signal
import threading
import warnings
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from clip.preprocess import check_usable
from utils.devices import ship
from utils.distributed import world
from utils.errors import InputError
from utils.files import parsing
from utils.reading.image_cache import ImageCache


class PictureAlone(PngImagePlugin.PngStream):
    """The chunks of a PNG file of which the picture is made. What stands beside it (texts, colour
    profiles, further frames) is passed over: where that is long, damaged or cut short, every
    browser shows the picture all the same."""

    def call(self, cid, pos, length):
        if cid[:1].isupper() or cid == b"tRNS":
            return super().call(cid, pos, length)
        self.fp.seek(length, os.SEEK_CUR)
        return b""

    def crc(self, cid, data):
        (super().crc if cid[:1].isupper() else self.crc_skip)(cid, data)


PngImagePlugin.PngStream = PictureAlone


class Images(Dataset):
    """Distinct images of a split; item k is the uint8 crop (3, R, R) that CLIP's preprocessing
    ends in, before normalisation. An unreadable file raises InputError with its name."""

    def __init__(self, root, names, preprocess, cache="off"):
        self.folder, self.names, self.preprocess = Path(root) / "images", names, preprocess
        self.cache = None
        if cache != "off":
            paths = [self.folder / name for name in names]
            self.cache = ImageCache(cache, paths, preprocess.resolution, preprocess.resize)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, k):
        return self.take([k])[0]

    def __getitems__(self, ks):
        return list(self.take(ks))

    def take(self, ks):
        """Crops (k, 3, R, R) of the images `ks`. Those that the cache lacks are decoded and stored
        together."""
        size, decoded = self.preprocess.resolution, {}
        crops = np.empty((len(ks), 3, size, size), np.uint8)
        for row, k in enumerate(ks):
            if self.cache and self.cache.has(k):
                crops[row] = self.cache.get(k)
            else:
                crops[row] = decoded[k] = self.decode(k)
        if self.cache and decoded:
            self.cache.put(decoded)
        return torch.from_numpy(crops)

    def decode(self, k):
        """Read and crop image k from its file: (3, R, R) uint8."""
        with self.opened(k) as image:
            return self.preprocess.crop(image)

    def flaw(self, k):
        """What is wrong with the header of image k, or None."""
        try:
            if not (self.cache and self.cache.has(k)):
                with self.opened(k):
                    pass
        except InputError as error:
            return str(error)

    @contextmanager
    def opened(self, k):
        """Image k as a PIL image, of which only the header is read yet."""
        path = self.folder / self.names[k]
        with parsing(path, "an image", "replace it, or leave its line out of the id and caption "
                     "files"), open_image(path) as image:
            yield image


@contextmanager
def open_image(file):
    """PIL image of a path or binary file, of which only the header is read yet. Pillow's warnings
    are off, but for that of a decompression bomb, which is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            check_usable(image)
            yield image


# ---- in memory ----------------------------------------------------------------------------------

HELD = weakref.WeakSet()  # `ImagesInMemory` that `hold` has made


class ImagesInMemory(Images):
    """The same `images`, or the crops (n, 3, R, R) given, on a device. They are read, each once,
    when the first one is asked for; a step then ships row numbers alone."""

    def __init__(self, images, device, args=None):
        if isinstance(images, torch.Tensor):
            self.names, self.crops = range(len(images)), images.to(device)
        else:
            vars(self).update(vars(images))
        self.images, self.device, self.args = images, device, args

    @functools.cached_property
    def crops(self):
        """(n, 3, R, R) uint8."""
        size = self.preprocess.resolution
        try:
            crops = torch.empty(len(self), 3, size, size, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise InputError(f"{len(self)} images do not fit into the memory ({self.device}); use "
                             "--data_on workers") from error
        left = crops
        with tqdm(total=len(self), desc="reading", unit="img", disable=None) as bar:
            for batch in image_loader(self.args, self.images):
                left[: len(batch)] = batch
                left = left[len(batch) :]
                bar.update(len(batch))
        return crops

    def take(self, ks):
        """Crops (k, 3, R, R) of the images `ks`, where they are held."""
        return self.crops[ship(torch.as_tensor(ks), self.device)]


def hold(args, images):
    """`images`, in the device's memory if `--data_on` wants them there or, by auto, if they and
    what is held already fill a third of it at most. Under torchrun, auto leaves them to worker
    processes, as each process would hold all."""
    if args.data_on == "workers":
        return images
    size = sum(len(x) * 3 * x.preprocess.resolution**2 for x in (images, *HELD))  # bytes
    if args.data_on == "auto" and (3 * size > room(args.device) or world() > 1):
        return images
    held = ImagesInMemory(images, args.device, args)
    HELD.add(held)
    return held


def room(device):
    """Bytes of memory of a device; of the CPU, what the machine has and its container allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits()])


def cgroup_limits(own="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Limits of memory, in bytes, that Linux sets to the groups of processes, and to those around
    them, which this one is in: containers and jobs of a cluster."""
    limits, root = [], Path(root)
    for line in Path(own).read_text().splitlines() if Path(own).exists() else []:
        _, version_1, group = line.split(":", 2)  # "0::/a/b" of version 2, "7:memory:/a/b" of 1
        folder = root / "memory" if version_1 else root
        for part in ("", *Path(group).parts[1:]):
            folder /= part
            file = folder / ("memory.limit_in_bytes" if version_1 else "memory.max")
            text = file.read_text().strip() if file.exists() else ""
            limits += [int(text)] if text.isdigit() else []  # "max": without a limit
    return limits


def in_memory(images):
    """Whether images, or those of which they are a `Subset`, lie in memory."""
    while isinstance(images, Subset):
        images = images.dataset
    return isinstance(images, ImagesInMemory)


# ---- checks and loaders -------------------------------------------------------------------------


def check_images(args, images, dev):
    """Open all `images`, decode those of `dev`. Raises InputError, with a count and the first
    three, when some cannot be read."""
    rows = range(0 if "crops" in vars(images) else len(images))
    checks = Loader(args, rows, len(rows) // 1000, batch_size=None, collate_fn=images.flaw)
    broken = [flaw for flaw in tqdm(checks, desc="checking", unit="img", disable=None, leave=False)
              if flaw]
    if broken:
        count = f"{len(broken)} images cannot be read: " if len(broken) > 1 else ""
        raise InputError(count + "; ".join(broken[:3]))
    for _ in image_loader(args, dev):
        pass


def image_loader(args, images):
    """DataLoader of uint8 image batches (b, 3, R, R), each distinct image once, in order."""
    workers = 0 if in_memory(images) else len(images)
    return Loader(args, images, workers, batch_size=args.eval_batch_size)


class Loader(DataLoader):
    """DataLoader with `--num_workers` processes, but no more than `most_workers`. It says in one
    line that one has died or cannot hand over its batches, and only where they are fetched: torch's
    handler of SIGCHLD would raise at any line."""

    def __init__(self, args, dataset, most_workers, **options):
        workers = min(args.num_workers, most_workers)
        if workers:
            _end_workers()
            options["worker_init_fn"] = _ignore_signals
        super().__init__(dataset, num_workers=workers, persistent_workers=workers > 0,
                         pin_memory=workers > 0 and args.device.type == "cuda", **options)
        if workers:
            self.collate_fn = functools.partial(_shared, self.collate_fn)

    def __iter__(self):
        with _explain_workers():
            batches = super().__iter__()
            if self.num_workers and hasattr(signal, "SIGCHLD") and (
                    threading.current_thread() is threading.main_thread()):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches


def _shared(collate, items):
    """A batch in shared memory. Where that is full, torch's own thread, which would put it there
    later, would only print it, and the main process would wait for ever."""
    batch = collate(items)
    try:
        for value in tree_leaves(batch):
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    except RuntimeError as error:
        raise InputError(
            f"a worker's batch does not fit the shared memory, /dev/shm ({error}): give a "
            "container more (docker run --shm-size 8g), or read in the main process "
            "(--num_workers 0)") from None
    return batch


@contextmanager
def _explain_workers():
    """Turn what the death of a worker provokes where its data are fetched into an InputError."""
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        of_torch = isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error)
        if of_torch or "Caught " in str(error):  # which a worker raised and handed over
            raise
        raise InputError("a worker process was killed: the memory may have run out (use fewer "
                         "--num_workers), or an image crashes its decoder (--num_workers 0 shows "
                         "where)") from error


@functools.cache
def _end_workers():
    """Workers end with this process, also one that hangs, which would be waited for."""
    multiprocessing.util.Finalize(
        None, lambda: [worker.kill() for worker in multiprocessing.active_children()],
        exitpriority=100)  # before multiprocessing's own end


def _ignore_signals(_):
    """What Ctrl-C or a cluster sends reaches workers too: the main process decides what it
    means."""
    for name in {"SIGINT", "SIGHUP", "SIGTERM"}.intersection(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
