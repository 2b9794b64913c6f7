"""Data sets: noisy training pairs with their memory entries, and retrieval splits.

    python data.py --cache DIR --dataset coco --dataset_root PATH

decodes all images of a data set ahead into an image cache (`--image_cache` of the other commands);

    python data.py --list_items DIR --dataset coco --dataset_root PATH

lists the distinct training images and captions for a judge of another kind (`--judge_features`).

A *pair* i is caption line i of the training split with the image it stands beside. Pairs share
images (five captions an image) and sometimes captions, so everything here keeps each distinct image
and each distinct caption once and refers to it by row.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, Subset
from tqdm import tqdm

import clip
from params import parse_args
from utils.distributed import rank, ship, world
from utils.errors import InputError, command
from utils.method.features import write_items
from utils.method.memorybank import clean_pairs
from utils.method.passes import Batch, DistinctItems, cut_tokens, distinct_items
from utils.reading.images import Images, hold, image_loader, in_memory, loader
from utils.reading.layout import (
    SPLITS,
    image_names,
    read_captions,
    read_ids,
    require_images,
    split_folder,
)
from utils.reading.noise import training_captions


def first_seen(items):
    """(distinct items in order of first appearance, (n,) int64 row of each item among them)."""
    rows = {}
    index = np.fromiter((rows.setdefault(item, len(rows)) for item in items), np.int64, len(items))
    return list(rows), index


@dataclass
class Pairs:
    """n image-caption pairs over distinct images and captions.

    image_of, text_of: (n,) int64 rows into `images` (and `image_ids`) and `tokens`.
    tokens: (distinct captions, context_length) int32, or None. captions: n str, stripped.
    wrong: (n,) bool, True where the caption is none of its image's clean ones; None if unknown.
    """

    images: Images
    image_ids: list
    image_of: np.ndarray
    captions: list
    text_of: np.ndarray
    tokens: torch.Tensor | None
    source: Path
    wrong: np.ndarray | None = None

    def __len__(self):
        return len(self.captions)


def _pairs(args, split, ids, captions, source, preprocess, log):
    image_ids, image_of = first_seen(ids)
    names = image_names(args.dataset_root, args.dataset, image_ids)
    require_images(args.dataset_root, names)
    texts, text_of = first_seen(captions)
    tokens, cache = None, "off"
    if preprocess:
        cache = args.image_cache
        tokens, lengths = clip.tokenize_with_lengths(texts, args.context_length)
        num_cut = int((lengths > args.context_length)[text_of].sum())
        if num_cut:
            log(f"warning: {num_cut} captions of {source} are longer than {args.context_length} "
                "tokens and were cut, keeping the end token")
    images = Images(args.dataset_root, names, preprocess, cache)
    if preprocess and "data_on" in args and split != "test":  # which is read once
        images = hold(args, images)
    place = f"; images are kept in memory ({images.device})" if in_memory(images) else ""
    log(f"{split}: {len(captions)} captions of {len(image_ids)} images from {source}{place}")
    return Pairs(images, image_ids, image_of, captions, text_of, tokens, source)


def wrong_pairs(clean_captions, captions, image_of):
    """(n,) bool: True where captions[i] is none of the clean captions of pair i's image."""
    own = {}
    for image, caption in zip(image_of, clean_captions, strict=True):
        own.setdefault(image, set()).add(caption)
    return np.array([caption not in own[image]
                     for image, caption in zip(image_of, captions, strict=True)], bool)


def training_pairs(args, preprocess, log=print):
    """The (noisy) training split as `Pairs`; makes the noisy caption file when it is missing.
    Without `preprocess` no model will see them: they have no tokens, and their images no cache."""
    clean = split_folder(args.dataset_root) / "train_caps.txt"
    clean_captions = read_captions(clean) if clean.exists() else []
    if clean_captions:  # checked before a noisy file is made of them
        read_ids(args.dataset_root, "train", len(clean_captions), args.num_anns, clean)
    captions, path = training_captions(args, log)
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


def take(pairs, chosen):
    """The `Pairs` among `pairs` that `chosen` (n,) bool names."""
    kept_images, image_of = np.unique(pairs.image_of[chosen], return_inverse=True)
    kept_texts, text_of = np.unique(pairs.text_of[chosen], return_inverse=True)
    return replace(pairs, images=Subset(pairs.images, kept_images.tolist()), image_of=image_of,
                   image_ids=[pairs.image_ids[k] for k in kept_images], text_of=text_of,
                   captions=[pairs.captions[i] for i in np.flatnonzero(chosen)],
                   tokens=pairs.tokens[kept_texts],
                   wrong=None if pairs.wrong is None else pairs.wrong[chosen])


# ---- loading ------------------------------------------------------------------------------------


class Batches(Dataset):
    """Item = the list of a batch's pair indices, result = the `Batch` of these pairs and, with a
    `bank`, of their memory entries M^I and M^T: the nearest ones, or with `random_memory` clean
    pairs by chance, which depend on the batch and the seed alone. Of several processes each reads
    only its own images."""

    def __init__(self, pairs, bank=None, random_memory=False, seed=0):
        self.pairs, self.bank, self.seed = pairs, bank, seed
        device = pairs.images.device if in_memory(pairs.images) else torch.device("cpu")
        self.tokens = pairs.tokens.to(device)
        self.clean = clean_pairs(bank) if random_memory and bank is not None else None
        self.own = slice(rank(), None, world())

    def memory(self, indices):
        """(M^I, M^T) (B,) each of the pairs (B,) of a batch."""
        if self.clean is None:
            return (self.bank.image_entry[self.pairs.image_of[indices]],
                    self.bank.caption_entry[indices])
        rng = np.random.default_rng([self.seed, *indices])
        twice = len(self.clean) < len(indices)
        return [rng.choice(self.clean, len(indices), replace=twice) for _ in range(2)]

    def __getitem__(self, indices):
        pairs = self.pairs
        wanted = np.array([indices])
        if self.bank is not None:
            wanted = np.stack([indices, *self.memory(indices)])
        images, *image_rows = distinct_items(pairs.image_of[wanted])
        texts, *text_rows = distinct_items(pairs.text_of[wanted])
        crops = pairs.images.take(images[self.own])
        length = cut_tokens(pairs.tokens[texts]).shape[1]
        own = ship(torch.from_numpy(texts[self.own]), self.tokens.device)
        tokens = self.tokens[own, :length]
        return Batch(torch.as_tensor(indices), DistinctItems(crops, *image_rows, len(images)),
                     DistinctItems(tokens, *text_rows, len(texts)))


class EpochSampler(Sampler):
    """Batches of shuffled indices; the order depends on seed and epoch alone, the last incomplete
    batch is dropped. An epoch starts at batch `first`.

    With `chosen` (k,) int64 it draws from these indices only, in as many batches as all n give:
    they are shuffled anew whenever they are used up, no batch has one twice.
    """

    def __init__(self, n, batch_size, seed, chosen=None):
        self.n, self.batch_size, self.seed, self.epoch, self.first = n, batch_size, seed, 0, 0
        self.chosen = np.arange(n) if chosen is None else chosen

    def __len__(self):
        return self.n // self.batch_size

    def __iter__(self):
        rng, left = np.random.default_rng([self.seed, self.epoch]), self.chosen[:0]
        for index in range(len(self)):
            if len(left) < self.batch_size:
                again = self.chosen[rng.permutation(len(self.chosen))]
                doubled = np.isin(again, left)
                left = np.concatenate([left, again[~doubled], again[doubled]])
            if index >= self.first:
                yield left[: self.batch_size].tolist()
            left = left[self.batch_size :]


def require_batch(args, num_pairs):
    """Raise InputError unless the pairs that are trained on fill a batch."""
    if args.batch_size > num_pairs:
        raise InputError(f"--batch_size {args.batch_size} is larger than the {num_pairs} pairs "
                         f"that are trained on; choose one up to {num_pairs}")


def training_loader(args, pairs, bank=None, chosen=None, random_memory=False):
    """DataLoader of `Batch`es, of all pairs or of the `chosen` ones (k,) int64, with their memory
    entries in a `bank`; set `loader.sampler.epoch` (and `first`) before each epoch."""
    require_batch(args, len(pairs) if chosen is None else len(chosen))
    sampler = EpochSampler(len(pairs), args.batch_size, args.seed, chosen)
    batches = Batches(pairs, bank, random_memory, args.seed)
    workers = 0 if in_memory(pairs.images) else len(sampler)
    return loader(args, batches, workers, sampler=sampler, batch_size=None)


@command
def main(argv=None):
    args = parse_args("cache", argv)
    if args.list_items:
        write_items(training_pairs(args, None), Path(args.list_items))
        return
    preprocess = clip.Preprocess.of(clip.architecture(args.vision_model))
    for split in SPLITS:
        pairs = (training_pairs(args, preprocess) if split == "train"
                 else retrieval_split(args, split, preprocess))
        with tqdm(total=len(pairs.images), desc=split, unit="img", disable=None) as bar:
            for batch in image_loader(args, pairs.images):
                bar.update(len(batch))
        print(f"{split}: {len(pairs.images)} images in {pairs.images.cache.path}")


if __name__ == "__main__":
    main()
