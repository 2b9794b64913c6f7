"""Images of a split: read from their files or from the image cache, by worker processes if wanted,
or held in memory."""

import contextlib
import functools
import hashlib
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
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset

from clip.preprocess import check_usable
from utils.distributed import ship, world
from utils.errors import InputError
from utils.files import parsing
from utils.progress import progress

END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # last bytes of a file by its format
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Images(Dataset):
    """Distinct images of a split. Item k is the uint8 crop (3, R, R) that CLIP's preprocessing ends
    in, before normalisation. An unreadable file raises InputError with its name.

    names: file names below ROOT/images. preprocess: a `clip.Preprocess`, or None where names alone
    are needed. cache: folder of the image cache, or "off".
    """

    def __init__(self, root, names, preprocess=None, cache="off"):
        self.folder, self.names, self.preprocess = Path(root) / "images", names, preprocess
        self.cache = None
        if preprocess and cache != "off":
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
        """What is wrong with the file of image k, as a line of text, or None.

        A JPEG or PNG file is whole if its header can be read and it ends in its format's end mark.
        Any other file is decoded.
        """
        if self.cache and self.cache.has(k):
            return None
        try:
            with self.opened(k) as image:
                if not ends_whole(self.folder / self.names[k], image.format):
                    image.load()
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
    are off, except that a decompression bomb is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            check_usable(image)
            yield image


def ends_whole(path, image_format):
    """Whether a file ends in the end mark of its format. False where there is no such mark."""
    mark = END_MARKS.get(image_format)
    with open(path, "rb") as f:
        return mark is not None and f.seek(-len(mark), os.SEEK_END) >= 0 and f.read() == mark


# ---- in memory ----------------------------------------------------------------------------------

HELD = weakref.WeakSet()  # `ImagesInMemory` that `hold` has made


class ImagesInMemory(Images):
    """The same `images`, or the crops (n, 3, R, R) given, on a device. The first access reads them
    all, each once; a step then copies row numbers alone to the device."""

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
        with progress(total=len(self), desc="reading", unit="img") as bar:
            for batch in image_loader(self.args, self.images):
                left[: len(batch)] = batch
                left = left[len(batch) :]
                bar.update(len(batch))
        return crops

    def take(self, ks):
        """Crops (k, 3, R, R) of the images `ks`, where they are held."""
        return self.crops[ship(torch.as_tensor(ks), self.device)]


def hold(args, images):
    """`images`, held in the device's memory if `--data_on` says so. With auto they are held if they
    and the images that are held already fill at most a third of the memory; under torchrun, where
    each process would hold them all, they are left to worker processes."""
    if args.data_on == "workers":
        return images
    size = sum(len(x) * 3 * x.preprocess.resolution**2 for x in (images, *HELD))  # bytes
    if args.data_on == "auto" and (3 * size > room(args.device) or world() > 1):
        return images
    held = ImagesInMemory(images, args.device, args)
    HELD.add(held)
    return held


def room(device):
    """Bytes of memory of a device. For the CPU: those of the machine, or of its container's limit.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits()])


def cgroup_limits(own="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """List of the memory limits, in bytes, of this process's control groups and of their parents:
    Linux sets them for containers and for a cluster's jobs."""
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
    """Check the files of all `images` and decode those of `dev`, before training starts. Raises
    InputError, with a count and the first three, when some cannot be read."""
    rows = range(0 if "crops" in vars(images) else len(images))
    checks = Loader(args, rows, len(rows) // 1000, batch_size=None, collate_fn=images.flaw)
    broken = [flaw for flaw in progress(checks, desc="checking", unit="img", leave=False)
              if flaw]
    if broken:
        count = f"{len(broken)} images cannot be read: " if len(broken) > 1 else ""
        raise InputError(count + "; ".join(broken[:3]))
    for _ in image_loader(args, dev):
        pass


def image_loader(args, images):
    """DataLoader of uint8 image batches (b, 3, R, R), each distinct image once, in order."""
    return Loader(args, images, len(images), images, batch_size=args.eval_batch_size)


class Loader(DataLoader):
    """DataLoader with `--num_workers` processes, but at most `most_workers`, and none for `images`
    in memory."""

    def __init__(self, args, dataset, most_workers, images=None, **options):
        workers = 0 if in_memory(images) else min(args.num_workers, most_workers)
        if workers:
            _kill_workers_at_exit()
            options["worker_init_fn"] = _ignore_signals
        super().__init__(dataset, num_workers=workers, persistent_workers=workers > 0,
                         pin_memory=workers > 0 and args.device.type == "cuda", **options)
        if workers:
            self.collate_fn = functools.partial(_shared, self.collate_fn)

    def __iter__(self):
        with _signals_deferred():  # while the workers are forked
            return super().__iter__()


def _shared(collate, items):
    """A batch in shared memory. If the memory is full, this raises in the worker; torch's own
    thread, which would copy the batch later, would print the error and the run would hang."""
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


@functools.cache
def _kill_workers_at_exit():
    """Kill this process's workers when it ends. A worker that hangs would be waited for."""
    multiprocessing.util.Finalize(
        None, lambda: [worker.kill() for worker in multiprocessing.active_children()],
        exitpriority=100)  # before multiprocessing's own end


def _ignore_signals(_):
    """Let a worker ignore Ctrl-C and what a cluster sends: the main process decides what it means.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_deferred():
    """Handle a signal that comes within the block after it. Python swallows an exception that a
    handler raises while a process is forked, so a Ctrl-C would be lost."""
    arrived, before = [], {}
    if threading.current_thread() is threading.main_thread():  # which handles all signals
        before = {number: signal.signal(number, lambda number, _: arrived.append(number))
                  for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in arrived:
        signal.raise_signal(number)


# ---- the image cache ----------------------------------------------------------------------------


class ImageCache:
    """Crops (n, 3, R, R) uint8 of the files `paths`, in `folder`.

    Each process opens the file for itself. The whole file is reserved when it is made, of zeros: no
    image is stored there yet. Raises InputError when the folder cannot be written or has no room.
    """

    def __init__(self, folder, paths, resolution, resize="shortest"):
        cut = resolution if resize == "shortest" else f"{resolution} {resize}"
        digest = hashlib.sha256(f"{cut}\n".encode())
        for path in paths:
            stat = os.stat(path)
            source = f"{os.path.abspath(path)}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
            digest.update(os.fsencode(source))
        self.path = Path(folder) / f"{digest.hexdigest()[:24]}.crops"
        self.shape = (len(paths), 3, resolution, resolution)
        self.size = 3 * resolution**2  # bytes of a crop
        total = len(self) * (self.size + 1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as f:
                if f.tell() < total and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, total)  # no later write finds a full disk
                elif f.tell() < total:  # macOS
                    f.truncate(total)
        except OSError as error:
            with contextlib.suppress(OSError):  # the file may fill the rest of the disk
                self.path.unlink()
            raise InputError(f"cannot make the image cache {self.path} of {total / 1e9:.1f} GB: "
                             f"{error.strerror}; choose another --image_cache or off") from error

    def __len__(self):
        return self.shape[0]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "opened"}

    @functools.cached_property
    def opened(self):
        """(descriptor, crops, stored) of the file, opened by each process at its first use."""
        crops = np.memmap(self.path, np.uint8, "r", 0, self.shape)
        stored = np.memmap(self.path, bool, "r", len(self) * self.size, (len(self),))
        return os.open(self.path, os.O_RDWR), crops, stored

    def has(self, k):
        """Whether crop k is stored."""
        return bool(self.opened[2][k])

    def get(self, k):
        """Crop k (3, R, R), which must be stored; to be read only."""
        return self.opened[1][k]

    def put(self, crops):
        """Store crops: a dict from k to (3, R, R) uint8."""
        descriptor = self.opened[0]
        for k, crop in crops.items():
            os.pwrite(descriptor, crop.tobytes(), k * self.size)
        os.fsync(descriptor)  # a crash of the machine may keep later writes and lose earlier ones
        for k in crops:
            os.pwrite(descriptor, b"\1", len(self) * self.size + k)
