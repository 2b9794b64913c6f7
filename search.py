"""Search a data set by hand: images for a text, or captions for an image.

    python search.py --resume CKPT --dataset f30k --dataset_root PATH "a dog on a beach"
    python search.py --resume CKPT --dataset f30k --dataset_root PATH photo.jpg

Prints the best matches with their cosine and draws their images into a file.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import InputError, command  # isort: skip

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image

import clip
from data import all_pairs, retrieval_split, training_pairs
from params import parse_args
from utils.distributed import is_main
from utils.files import atomic_write
from utils.method.features import embed_pairs
from utils.reading.images import Images
from utils.scoring.diagnostics import pictures
from utils.training.run import Run

SIDE = 224  # pixels of a picture that was found


@command
def main(argv=None):
    args = parse_args("search", argv)
    run = Run(args)
    by_image = is_image(args.query)
    model, preprocess = run.load_model()
    if args.split == "all":
        pairs = all_pairs(args, preprocess, run.log)
    elif args.split == "train":
        pairs = training_pairs(args, preprocess, run.log)
    else:
        pairs = retrieval_split(args, args.split, preprocess, run.log)

    # The query replaces what is not searched, so that one call encodes both
    if by_image:
        picture = [str(Path(os.path.expanduser(args.query)).resolve())]
        asked = {"images": Images(args.dataset_root, picture, preprocess)}
    else:
        tokens, lengths = clip.tokenize_with_lengths([args.query], args.context_length)
        if lengths[0] > args.context_length:
            run.log(f"warning: the query has {lengths[0]} tokens and was cut after "
                    f"{args.context_length}")
        asked = {"tokens": tokens}
    features = embed_pairs(model, dataclasses.replace(pairs, **asked), args, run.precision)
    images, texts = (F.normalize(x, dim=1) for x in features)
    query, gallery = (images, texts) if by_image else (texts, images)
    cosine = (gallery @ query[0]).cpu()
    best = cosine.argsort(descending=True, stable=True)[: args.top]
    if not is_main():
        return

    # A result is the first pair of the caption, or of the image, that was found
    first = np.unique(pairs.text_of if by_image else pairs.image_of, return_index=True)[1]
    found = first[best.numpy()]
    files = [pairs.images.names[k] for k in pairs.image_of[found]]
    captions = [pairs.captions[i] for i in found]
    scores = cosine[best].tolist()
    for rank, (score, file, caption) in enumerate(zip(scores, files, captions, strict=True), 1):
        print(f"{rank:3} {score:7.4f}  {file}  {caption}")

    names = (picture if by_image else []) + files
    found = Images(args.dataset_root, names, clip.Preprocess(SIDE))
    words = ["the query"] if by_image else []
    words += [f"{score:.3f}  {caption}" for score, caption in zip(scores, captions, strict=True)]
    figure = pictures([found[k] for k in range(len(names))], words)
    numbered = (Path("logs", "search", f"{n}.png") for n in itertools.count(1))
    out = args.out or next(path for path in numbered if not path.exists())
    with atomic_write(out, "wb") as f:
        figure.savefig(f, format="png")
    run.log(f"wrote {out}")


def is_image(query):
    """Whether a query is the path of a file, which should be an image. Raises InputError if the
    query is empty or names an image file that does not exist."""
    if not query.strip():
        raise InputError("the query is empty; give a text or an image file")
    exists = os.path.isfile(os.path.expanduser(query))
    if not exists and Path(query).suffix.lower() in Image.registered_extensions():
        raise InputError(f"the query {query} looks like an image file, but there is none")
    return exists


if __name__ == "__main__":
    main()
