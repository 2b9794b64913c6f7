"""What a step trains on: a batch of pairs with their memory entries. It holds each distinct image
and caption once."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from utils.distributed import rank, ship, world
from utils.errors import InputError
from utils.method.memorybank import clean_pairs
from utils.method.optimizer import replays
from utils.reading.images import Loader, in_memory

BATCH, MEMORY_I, MEMORY_T = range(3)  # whose pairs: rows of `DistinctItems.rows`


class DistinctItems(NamedTuple):
    """Distinct images, or captions, of a batch of B pairs and of its memory entries.

    Items of the batch alone come first, then items of both, then items of the memory alone: the
    batch has the items 0..num_batch-1, the memory memory_start..total-1. Where these numbers are
    rounded up, so that steps have few shapes, a part ends in items that no pair has. No loss reads
    their features, so they have no gradient.

    items: (total, ...) tensor; under torchrun only this process's, see utils.distributed.
    rows: (3, B) int64, the item of each pair of the batch, of M^I and of M^T; (1, B) without a
    memory.
    """

    items: torch.Tensor
    rows: torch.Tensor
    num_batch: int
    memory_start: int
    total: int


class Batch(NamedTuple):
    """What a step trains on: the indices (B,) int64 of its pairs, their distinct images, uint8 (3,
    R, R) each, and captions, int32 tokens (L,) each."""

    indices: torch.Tensor
    images: DistinctItems
    texts: DistinctItems

    def to(self, device):
        """The same batch on `device`."""
        def move(distinct):
            return distinct._replace(items=ship(distinct.items, device),
                                     rows=ship(distinct.rows, device))
        return Batch(ship(self.indices, device), move(self.images), move(self.texts))


def distinct_items(wanted, round_to=1):
    """(items (total,), rows (k, B), num_batch, memory_start), as in `DistinctItems`. wanted: (k, B)
    int64, the items of the pairs of the batch, of M^I and of M^T. Numbers of items are multiples of
    `round_to`."""
    batch, memory = np.unique(wanted[0]), np.unique(wanted[1:])
    both = np.intersect1d(batch, memory, assume_unique=True)
    batch_only = np.setdiff1d(batch, both, assume_unique=True)
    memory_only = np.setdiff1d(memory, both, assume_unique=True)
    parts = [rounded_up(np.concatenate([batch_only, both]), round_to),
             rounded_up(memory_only, round_to)]
    items = np.concatenate(parts)
    distinct, first = np.unique(items, return_index=True)
    rows = first[np.searchsorted(distinct, wanted)]
    return items, torch.from_numpy(rows), len(parts[0]), len(batch_only) // round_to * round_to


def rounded_up(items, round_to):
    """`items` (n,), the last one repeated up to a multiple of `round_to`."""
    return np.pad(items, (0, -len(items) % round_to), mode="edge" if len(items) else "empty")


def cut_tokens(tokens, round_to=1):
    """`tokens` (v, L) without the columns behind the last end token. The number of columns is a
    multiple of `round_to`, or L."""
    length = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, : -(-length // round_to) * round_to]


class Batches(Dataset):
    """Maps the list of a batch's pair indices to the `Batch` of these pairs.

    With a `bank` it holds their memory entries M^I and M^T too: the nearest ones, or with
    `random_memory` random clean pairs, which depend on the batch and the seed alone. Each process
    reads only its own images. few_shapes: numbers of items are multiples of an eighth of a batch,
    lengths of captions multiples of 8 tokens. That costs 6 % more work and leaves two dozen
    shapes."""

    def __init__(self, pairs, bank=None, random_memory=False, seed=0, few_shapes=False):
        self.pairs, self.bank, self.seed, self.few_shapes = pairs, bank, seed, few_shapes
        device = pairs.images.device if in_memory(pairs.images) else torch.device("cpu")
        self.tokens = pairs.tokens.to(device)
        self.clean_set = clean_pairs(bank) if random_memory else None
        self.own = slice(rank(), None, world())

    def memory(self, indices):
        """(M^I, M^T) (B,) each of the pairs (B,) of a batch."""
        if self.clean_set is None:
            return (self.bank.image_entry[self.pairs.image_of[indices]],
                    self.bank.caption_entry[indices])
        rng = np.random.default_rng([self.seed, *indices])
        twice = len(self.clean_set) < len(indices)
        return [rng.choice(self.clean_set, len(indices), replace=twice) for _ in range(2)]

    def __getitem__(self, indices):
        pairs = self.pairs
        wanted = np.array([indices])
        if self.bank is not None:
            wanted = np.stack([indices, *self.memory(indices)])
        round_to, tokens = (-(-len(indices) // 8), 8) if self.few_shapes else (1, 1)
        images, *image_rows = distinct_items(pairs.image_of[wanted], round_to)
        texts, *text_rows = distinct_items(pairs.text_of[wanted], round_to)
        crops = pairs.images.take(images[self.own])
        length = cut_tokens(pairs.tokens[texts], tokens).shape[1]
        own = ship(torch.from_numpy(texts[self.own]), self.tokens.device)
        tokens = self.tokens[own, :length]
        return Batch(torch.as_tensor(indices), DistinctItems(crops, *image_rows, len(images)),
                     DistinctItems(tokens, *text_rows, len(texts)))


class EpochSampler(Sampler):
    """An epoch: one pass over the `chosen` indices (k,) int64, shuffled, in batches of which the
    last incomplete one is dropped. The order depends on seed and epoch alone. An epoch starts at
    batch `first`."""

    def __init__(self, chosen, batch_size, seed):
        self.chosen, self.batch_size, self.seed = chosen, batch_size, seed
        self.epoch = self.first = 0

    def __len__(self):
        return len(self.chosen) // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.chosen)
        for index in range(self.first, len(self)):
            yield order[index * self.batch_size : (index + 1) * self.batch_size].tolist()


def require_batch(args, num_pairs):
    """Raise InputError unless the pairs that are trained on fill a batch."""
    if args.batch_size > num_pairs:
        raise InputError(f"--batch_size {args.batch_size} is larger than the {num_pairs} pairs "
                         f"that are trained on; choose one up to {num_pairs}")


def training_loader(args, pairs, bank=None, with_memory=True):
    """DataLoader of `Batch`es of the pairs that `--train_on` says, with their memory entries in the
    `bank` if there is one; set `loader.sampler.epoch` (and `first`) before each epoch."""
    only_clean = bank is not None and args.train_on == "clean"
    chosen = clean_pairs(bank) if only_clean else np.arange(len(pairs))
    require_batch(args, len(chosen))
    sampler = EpochSampler(chosen, args.batch_size, args.seed)
    with_memory = with_memory and bank is not None
    batches = Batches(pairs, bank if with_memory else None, with_memory and args.memory == "random",
                      args.seed, few_shapes=replays(args))
    return Loader(args, batches, len(sampler), pairs.images, sampler=sampler, batch_size=None)
