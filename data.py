"""A data set on disk becomes `Pairs`: the noisy training pairs, and the retrieval splits.

    python data.py --image_cache DIR --dataset coco --dataset_root PATH

decodes all images of a data set into an image cache (`--image_cache` of the other commands);

    python data.py --list_items DIR --dataset coco --dataset_root PATH

lists the distinct training images and captions for a judge of another kind (`--judge_features`).
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import command  # isort: skip

from pathlib import Path

import numpy as np

import clip
from params import parse_args
from utils.method.batches import require_batch
from utils.method.features import write_items
from utils.method.pairs import Pairs, tokens_of
from utils.progress import progress
from utils.reading.images import Images, hold, image_loader, in_memory
from utils.reading.layout import (
    SPLITS,
    find_images,
    first_seen,
    image_names,
    read_captions,
    read_ids,
    read_lines,
    split_folder,
)
from utils.reading.noise import training_captions


def make_pairs(args, split, ids, captions, source, preprocess, log):
    """The `Pairs` of a split: n captions from the file `source` with the image ids of each, in
    order. Without `preprocess` they have no tokens and their images cannot be read. Raises
    InputError when an image is missing."""
    image_ids, image_of = first_seen(ids)
    text_of = first_seen(captions)[1]
    names = image_names(args.dataset_root, args.dataset, image_ids)
    names = find_images(args.dataset_root, names)
    images = Images(args.dataset_root, names, preprocess, args.image_cache)
    if preprocess and split != "test":  # which is read once
        images = hold(args, images)
    tokens = preprocess and tokens_of(captions, text_of, args, source, log)
    kept = f"; images are kept in memory ({images.device})" if in_memory(images) else ""
    log(f"{split}: {len(captions)} captions of {len(image_ids)} images from {source}{kept}")
    return Pairs(images, image_ids, image_of, captions, text_of, tokens, source)


def wrong_pairs(clean_captions, captions, image_of):
    """(n,) bool: whether captions[i] is none of the clean captions of pair i's image."""
    own = {}
    for image, caption in zip(image_of, clean_captions, strict=True):
        own.setdefault(image, set()).add(caption)
    return np.array([caption not in own[image]
                     for image, caption in zip(image_of, captions, strict=True)], bool)


def training_pairs(args, preprocess, log=print):
    """The (noisy) training split as `Pairs`, see `make_pairs`. Makes the noisy caption file when it
    is missing."""
    clean_file = split_folder(args.dataset_root) / "train_caps.txt"
    clean_captions = read_captions(clean_file) if clean_file.exists() else []
    if clean_captions:  # checked before a noisy file is made of them
        read_ids(args.dataset_root, "train", len(clean_captions), args.num_anns, clean_file)
    captions, path = training_captions(args, log)
    ids = read_ids(args.dataset_root, "train", len(captions), args.num_anns, path)
    pairs = make_pairs(args, "train", ids, captions, path, preprocess, log)
    if args.noise_ratio and len(clean_captions) == len(captions):
        pairs.wrong = wrong_pairs(clean_captions, captions, pairs.image_of)
    return pairs


def retrieval_split(args, split, preprocess, log=print):
    """The dev or test split as `Pairs`; `--dev_length` keeps the first so many dev captions."""
    path = split_folder(args.dataset_root) / f"{split}_caps.txt"
    captions = read_captions(path)
    ids = read_ids(args.dataset_root, split, len(captions), args.num_anns, path)
    kept = args.dev_length if split == "dev" else None
    return make_pairs(args, split, ids[:kept], captions[:kept], path, preprocess, log)


def training_data(args, preprocess, log=print):
    """(training pairs, dev split) of a training run. Raises InputError when the pairs fill no
    batch."""
    pairs = training_pairs(args, preprocess, log)
    require_batch(args, len(pairs))
    return pairs, retrieval_split(args, "dev", preprocess, log)


def all_pairs(args, preprocess, log=print):
    """The pairs of all three splits, those of training first, as one `Pairs`. A split may be
    empty."""
    folder, ids, captions = split_folder(args.dataset_root), [], []
    for split in SPLITS:
        path = folder / f"{split}_caps.txt"
        if own := read_lines(path) and read_captions(path):
            ids += read_ids(args.dataset_root, split, len(own), args.num_anns, path)
            captions += own
    return make_pairs(args, "all splits", ids, captions, folder, preprocess, log)


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
        with progress(total=len(pairs.images), desc=split, unit="img") as bar:
            for batch in image_loader(args, pairs.images):
                bar.update(len(batch))
        print(f"{split}: {len(pairs.images)} images in {pairs.images.cache.path}")


if __name__ == "__main__":
    main()
