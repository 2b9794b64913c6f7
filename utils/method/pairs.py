"""Pairs: what is trained on, judged and scored. Pair i is caption line i of a split with its image.
Each distinct image and caption is kept once; pairs refer to it by row."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import clip
from utils.reading.images import Images, hold


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


def first_pairs(item_of):
    """The first pair of each item (image or caption): (items,) int64. item_of: (n,), the item of
    each pair."""
    return np.unique(item_of, return_index=True)[1]


def for_model(pairs, args, preprocess, log=print):
    """The same `Pairs` as the model of `preprocess` reads them: with tokens, and with images from
    `--image_cache` or held where `--data_on` says."""
    images = Images(args.dataset_root, pairs.images.names, preprocess, args.image_cache)
    tokens = tokens_of(pairs.captions, pairs.text_of, args, pairs.source, log)
    return replace(pairs, images=hold(args, images), tokens=tokens)


def tokens_of(captions, text_of, args, source, log=print):
    """Tokens (v, `--context_length`) int32 of the distinct captions among n `captions`. Their rows
    are text_of (n,). Captions of the file `source` that are too long are counted in the log."""
    texts = [captions[i] for i in first_pairs(text_of)]
    tokens, lengths = clip.tokenize_with_lengths(texts, args.context_length)
    num_cut = int((lengths > args.context_length)[text_of].sum())
    if num_cut:
        log(f"warning: {num_cut} captions of {source} are longer than {args.context_length} "
            "tokens and were cut, keeping the end token")
    return tokens


def fingerprint(pairs):
    """SHA-256 (hex) of the captions and the ids of their images. A bank belongs to such pairs."""
    digest = hashlib.sha256()
    for row, caption in zip(pairs.image_of, pairs.captions, strict=True):
        digest.update(f"{pairs.image_ids[row]}\t{caption}\n".encode())
    return digest.hexdigest()
