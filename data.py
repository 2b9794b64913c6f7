"""Data sets: noisy training pairs with their memory entries, and retrieval splits.

    python data.py --cache DIR --dataset coco --dataset_root PATH

decodes all images of a data set ahead into an image cache (`--image_cache` of the other commands).

A *pair* i is caption line i of the training split with the image it stands beside. Pairs share
images (five captions an image) and sometimes captions, so everything here keeps each distinct image
and each distinct caption once and refers to it by row.
"""

import atexit
import functools
import os
import signal
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from tqdm import tqdm

import clip
from construct_noise import training_captions
from params import parse_args
from utils.distributed import own_below, rank, world
from utils.errors import InputError, command
from utils.image_cache import ImageCache
from utils.layout import (
    SPLITS,
    image_names,
    read_captions,
    read_ids,
    require_images,
    split_folder,
)

MAX_WORKERS = 256  # whose current image is known


class Images(Dataset):
    """Distinct images of a split; item k is the uint8 crop (3, R, R) that CLIP's preprocessing
    ends in, before normalisation. An unreadable file raises InputError with its name."""

    def __init__(self, root, names, preprocess, cache="off"):
        self.folder, self.names, self.preprocess = Path(root) / "images", names, preprocess
        self.cache = None
        if cache != "off":
            paths = [self.folder / name for name in names]
            self.cache = ImageCache(cache, paths, preprocess.resolution)
        # of each worker process, its pid and 1 + the image that it decodes, 0 between two
        self.reading = RawArray("q", 2 * MAX_WORKERS)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, k):
        crop = self.cache.get(k) if self.cache else None
        if crop is None:
            self._note(k + 1)
            crop = self.decode(k)
            self._note(0)
            if self.cache:
                self.cache.put(k, crop)
        return torch.from_numpy(crop)

    def decode(self, k):
        """Read and crop image k from its file: (3, R, R) uint8."""
        path = self.folder / self.names[k]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    return self.preprocess.crop(image)
        except Exception as error:  # Pillow's decoders raise almost anything on broken files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"image {path} cannot be read ({reason}); replace it, or leave its "
                             "line out of the id and caption files") from error

    def _note(self, value):
        worker = get_worker_info()
        if worker is not None:
            slot = 2 * (worker.id % MAX_WORKERS)
            self.reading[slot : slot + 2] = os.getpid(), value

    def read_by_the_dead(self):
        """Names of the images that worker processes were decoding when they ended."""
        alive = {process.pid for process in active_children()}
        slots = zip(self.reading[::2], self.reading[1::2], strict=True)
        return sorted({self.names[k - 1] for pid, k in slots if k and pid not in alive})


@contextmanager
def explain_deaths(images):
    """Turn what the death of a worker process provokes, here or where its data are fetched, into an
    InputError that names the image of `Images` which it was decoding."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if not isinstance(error, RuntimeError):  # the worker may be just about to end
            wait([process.sentinel for process in active_children()], timeout=5)
        names = ", ".join(images.read_by_the_dead())
        reason = (f"while it decoded {names} in {images.folder}: replace that image" if names else
                  "between two images: the memory may have run out, use fewer --num_workers")
        raise InputError(f"a worker process was killed {reason}") from error


def first_seen(items):
    """(distinct items in order of first appearance, (n,) int64 row of each item among them)."""
    rows = {}
    index = np.fromiter((rows.setdefault(item, len(rows)) for item in items), np.int64, len(items))
    return list(rows), index


@dataclass
class Pairs:
    """n image-caption pairs over distinct images and captions.

    image_of, text_of: (n,) int64 rows into `images` (and `image_ids`) and `tokens`.
    tokens: (distinct captions, context_length) int32. captions: n str, stripped.
    wrong: (n,) bool, True where the caption is none of its image's clean ones; None if unknown.
    """

    images: Images
    image_ids: list
    image_of: np.ndarray
    captions: list
    text_of: np.ndarray
    tokens: torch.Tensor
    source: Path
    wrong: np.ndarray | None = None

    def __len__(self):
        return len(self.captions)


def _pairs(args, split, ids, captions, source, preprocess, log):
    image_ids, image_of = first_seen(ids)
    names = image_names(args.dataset_root, args.dataset, image_ids)
    require_images(args.dataset_root, names)
    texts, text_of = first_seen(captions)
    tokens, lengths = clip.tokenize_with_lengths(texts, args.context_length)
    num_cut = int((lengths > args.context_length)[text_of].sum())
    if num_cut:
        log(f"warning: {num_cut} captions of {source} are longer than {args.context_length} tokens "
            "and were cut, keeping the end token")
    log(f"{split}: {len(captions)} captions of {len(image_ids)} images from {source}")
    images = Images(args.dataset_root, names, preprocess, args.image_cache)
    return Pairs(images, image_ids, image_of, captions, text_of, tokens, source)


def wrong_pairs(clean_captions, captions, image_of):
    """(n,) bool: True where captions[i] is none of the clean captions of pair i's image."""
    own = {}
    for image, caption in zip(image_of, clean_captions, strict=True):
        own.setdefault(image, set()).add(caption)
    return np.array([caption not in own[image]
                     for image, caption in zip(image_of, captions, strict=True)], bool)


def training_pairs(args, preprocess, log=print):
    """The (noisy) training split as `Pairs`; makes the noisy caption file when it is missing."""
    clean = split_folder(args.dataset_root) / "train_caps.txt"
    clean_captions = read_captions(clean) if clean.exists() else []
    if clean_captions:  # checked before a noisy file is made of them
        read_ids(args.dataset_root, "train", len(clean_captions), args.num_anns, clean)
    captions, path = training_captions(args.dataset_root, args.noise_ratio, args.seed, log)
    ids = read_ids(args.dataset_root, "train", len(captions), args.num_anns, path)
    if "epochs" in args:  # a training run, which should not build a bank in vain
        require_batch(args, len(captions))
    pairs = _pairs(args, "train", ids, captions, path, preprocess, log)
    if args.noise_ratio and len(clean_captions) == len(captions):
        pairs.wrong = wrong_pairs(clean_captions, captions, pairs.image_of)
    return pairs


def retrieval_split(args, split, preprocess, log=print):
    """The dev or test split as `Pairs`; `--dev_length` keeps the first so many dev captions."""
    path = split_folder(args.dataset_root) / f"{split}_caps.txt"
    captions = read_captions(path)
    ids = read_ids(args.dataset_root, split, len(captions), 1, path)
    if split == "dev" and args.dev_length:
        ids, captions = ids[: args.dev_length], captions[: args.dev_length]
    return _pairs(args, split, ids, captions, path, preprocess, log)


# ---- loading ------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """Distinct items (images, or captions) of a step; what the batch alone needs comes first, then
    what both need, then what the memory entries alone need: the batch has items 0..end-1, the
    memory start..total-1.

    items: (total, ...) tensor; with several processes only this one's, see utils.distributed.
    rows: (3, B) int64 item numbers of the batch, of M^I and of M^T, or (1, B) without a memory
    bank.
    """

    items: torch.Tensor
    rows: torch.Tensor
    start: int
    end: int
    total: int

    def span(self, part):
        """(first, last + 1) item number of "batch", "memory" or "rest", the memory without the
        batch."""
        return {"batch": (0, self.end), "memory": (self.start, self.total),
                "rest": (self.end, self.total)}[part]

    def own(self, start, end):
        """The items start..end-1 that this process has."""
        return self.items[own_below(start) : own_below(end)]


class Step(NamedTuple):
    """One training step: pairs (B,) int64; its distinct images, uint8 (3, R, R) each, and captions,
    (L,) int32 tokens each, cut at the longest one."""

    pairs: torch.Tensor
    images: Shared
    texts: Shared

    def to(self, device):
        """The same step with its images and captions on `device`."""
        def move(shared):
            return shared._replace(items=shared.items.to(device, non_blocking=True),
                                   rows=shared.rows.to(device, non_blocking=True))
        return self._replace(images=move(self.images), texts=move(self.texts))


def share(items):
    """(distinct items (total,), rows (k, B), start, end), as in `Shared`, of item indices (k, B)
    int64."""
    batch, memory = np.unique(items[0]), np.unique(items[1:])
    both = np.intersect1d(batch, memory, assume_unique=True)
    alone = np.setdiff1d(batch, both, assume_unique=True)
    distinct = np.concatenate([alone, both, np.setdiff1d(memory, both, assume_unique=True)])
    order = np.argsort(distinct)
    rows = order[np.searchsorted(distinct, items, sorter=order)]
    return distinct, torch.from_numpy(rows), len(alone), len(batch)


class StepDataset(Dataset):
    """Assembles whole steps: item = the list of a batch's pair indices, result = `Step`. Of several
    processes each reads only its own images."""

    def __init__(self, pairs, bank=None):
        self.pairs, self.bank = pairs, bank
        self.share_of_process = slice(rank(), None, world())

    def __getitem__(self, batch):
        pairs = self.pairs
        entries = np.array([batch])
        if self.bank is not None:  # the batch, M^I and M^T
            entries = np.stack([batch, self.bank.image_entry[pairs.image_of[batch]],
                                self.bank.caption_entry[batch]])
        images, *image_rows = share(pairs.image_of[entries])
        texts, *text_rows = share(pairs.text_of[entries])
        crops = [pairs.images[k] for k in images[self.share_of_process]]
        crops = torch.stack(crops or [pairs.images[0]])[: len(crops)]  # a share may be empty
        tokens = cut_tokens(pairs.tokens[texts])[self.share_of_process]
        return Step(torch.as_tensor(batch), Shared(crops, *image_rows, len(images)),
                    Shared(tokens, *text_rows, len(texts)))


def cut_tokens(tokens):
    """Drop the columns behind the last end token of `tokens` (v, L): a causal tower that is pooled
    at the end token cannot see them."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


class EpochSampler(Sampler):
    """Batches of shuffled indices; the order depends on seed and epoch alone, the last incomplete
    batch is dropped. An epoch starts at batch `first`."""

    def __init__(self, n, batch_size, seed):
        self.n, self.batch_size, self.seed, self.epoch, self.first = n, batch_size, seed, 0, 0

    def __len__(self):
        return self.n // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        yield from batches[self.first :].tolist()


def require_batch(args, num_pairs):
    """Raise InputError unless the training set fills a batch."""
    if args.batch_size > num_pairs:
        raise InputError(f"--batch_size {args.batch_size} is larger than the training set of "
                         f"{num_pairs} pairs; choose one up to {num_pairs}")


def training_loader(args, pairs, bank=None):
    """DataLoader of `Step`s; set `loader.sampler.epoch` (and `first`) before each epoch."""
    require_batch(args, len(pairs))
    sampler = EpochSampler(len(pairs), args.batch_size, args.seed)
    return _loader(args, StepDataset(pairs, bank), sampler=sampler, batch_size=None)


def image_loader(args, images):
    """DataLoader of uint8 image batches (b, 3, R, R), each distinct image once, in order."""
    return _loader(args, images, batch_size=args.eval_batch_size)


def _loader(args, dataset, **kwargs):
    workers = min(args.num_workers, len(kwargs.get("sampler", dataset)))
    if workers:
        kwargs["worker_init_fn"] = functools.partial(_ignore_signals, _exiting())
    return _Loader(dataset, num_workers=workers, persistent_workers=workers > 0,
                   pin_memory=args.device.type == "cuda", **kwargs)


class _Loader(DataLoader):
    """DataLoader that notices a dead worker when its data are waited for; torch's handler of
    SIGCHLD raises wherever the process happens to be, in the middle of an optimiser step too."""

    def __iter__(self):
        iterator = super().__iter__()
        if self.num_workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator


@functools.cache
def _exiting():
    """A flag, shared with the workers, that is set when this process exits."""
    flag = RawValue("b", False)
    atexit.register(setattr, flag, "value", True)
    return flag


def _ignore_signals(exiting, _):
    """What Ctrl-C or a cluster sends reaches workers too: the main process decides what it means,
    and ends its workers by SIGTERM when it exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: exiting.value and os._exit(0))


@command
def main(argv=None):
    args = parse_args("cache", argv)
    preprocess = clip.Preprocess(clip.architecture(args.vision_model)["image_resolution"])
    for split in SPLITS:
        pairs = (training_pairs(args, preprocess) if split == "train"
                 else retrieval_split(args, split, preprocess))
        with tqdm(total=len(pairs.images), desc=split, unit="img", disable=None) as bar:
            for batch in image_loader(args, pairs.images):
                bar.update(len(batch))
        print(f"{split}: {len(pairs.images)} images in {pairs.images.cache.path}")


if __name__ == "__main__":
    main()
