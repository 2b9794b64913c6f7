"""Noisy caption files: which captions change places, and the names of the files.

{ratio}_noise_train_caps.txt, the released name, holds the random noise of seed `SEED`, or is one of
the authors' own files. {ratio}_noise_{kind}_seed{seed}_train_caps.txt holds any other noise.
"""

from collections import defaultdict

import numpy as np

from utils.distributed import main_first
from utils.files import atomic_write
from utils.progress import progress
from utils.reading.layout import (
    find_by_ratio,
    first_seen,
    ratio_name,
    read_captions,
    read_ids,
    split_folder,
)

KINDS = ("random", "similar")
SEED = 99
SUFFIX = "_noise_train_caps.txt"
TOO_COMMON = 0.5  # share of the captions above which a word says nothing
BLOCK = 64  # captions that are compared with all others at a time


# ---- which captions change places ----------------------------------------------------------------


def drawn(n, noise_ratio, rng):
    """int(noise_ratio n) of the positions 0..n-1, int64, in random order."""
    positions = np.arange(n)
    rng.shuffle(positions)
    return positions[: int(noise_ratio * n)]


def random_order(n, noise_ratio, seed):
    """Random noise, as in the released code: a permutation `order` (n,) int64; line i of the noisy
    file is clean caption order[i].

    The captions at random positions are shuffled. Some of them stay where they were or move within
    their image, so the true share of wrong pairs is a little below the ratio.
    """
    rng = np.random.RandomState(seed)
    positions = drawn(n, noise_ratio, rng)
    source = positions.copy()
    rng.shuffle(source)
    order = np.arange(n)
    order[positions] = source
    return order


def similar_order(captions, image_of, noise_ratio, seed):
    """Near misses (as in LEMoN, Zhang et al. 2025), as a permutation like that of `random_order`.

    The positions are those of random noise. In random order, each position exchanges its caption
    with the position whose caption is most similar (cosine of TF-IDF; of equals the earlier one)
    among those that are left, that belong to another image, and where neither image has the
    caption that it would get among its own. captions: n str; image_of: (n,) hashable, the image of
    each.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes seconds to import

    n = len(captions)
    positions = drawn(n, noise_ratio, np.random.RandomState(seed))
    order, m = np.arange(n), len(positions)
    if m < 2:
        return order
    text, image = first_seen(captions)[1], first_seen(image_of)[1]
    texts_of, images_of = defaultdict(list), defaultdict(list)  # of an image, of a text
    for t, i in zip(text, image, strict=True):
        texts_of[i].append(t)
        images_of[t].append(i)
    text, image = text[positions], image[positions]

    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", dtype=np.float32)
    vectors = words.fit_transform([captions[i] for i in positions])  # (m, words)
    counts = np.bincount(vectors.indices, minlength=vectors.shape[1])
    vectors = vectors[:, counts <= TOO_COMMON * m]

    left = np.ones(m, bool)

    def best(p, others, similarity):
        """The position among `others` that p exchanges its caption with, or None."""
        fits = (left[others] & np.isin(text[others], texts_of[image[p]], invert=True)
                & np.isin(image[others], images_of[text[p]], invert=True))
        if not fits.any():
            return None
        others, similarity = others[fits], similarity[fits]
        return others[similarity == similarity.max()].min()

    with progress(total=m, desc="similar captions", unit="caption") as bar:
        while left.any():
            todo = np.flatnonzero(left)
            rows = todo[:BLOCK]
            similarity = vectors[rows] @ vectors[todo].T
            for p, low, high in zip(rows, similarity.indptr, similarity.indptr[1:], strict=False):
                if not left[p]:
                    continue
                left[p] = False
                q = best(p, todo[similarity.indices[low:high]], similarity.data[low:high])
                if q is None:  # no caption that fits shares a word with p's
                    others = np.flatnonzero(left)
                    q = best(p, others, np.zeros(len(others), np.float32))
                if q is not None:
                    left[q] = False
                    order[positions[p]], order[positions[q]] = positions[q], positions[p]
            bar.update(len(todo) - left.sum())
    return order


# ---- the files -----------------------------------------------------------------------------------


def suffix_of(kind, seed):
    """What follows the ratio in the name of a noise file."""
    released = (kind, seed) == ("random", SEED)
    return SUFFIX if released else f"_noise_{kind}_seed{seed}_train_caps.txt"


def construct_noise(args, replace=True):
    """Write the noisy caption file of the options; returns (path, noisy captions). If `replace` is
    False, a file that another run has written meanwhile stays."""
    ratio, seed = args.noise_ratio, args.noise_seed
    folder = split_folder(args.dataset_root)
    clean = folder / "train_caps.txt"
    captions = read_captions(clean)
    ids = read_ids(args.dataset_root, "train", len(captions), args.num_anns, clean)
    order = (random_order(len(captions), ratio, seed) if args.noise_kind == "random"
             else similar_order(captions, ids, ratio, seed))
    noisy = [captions[i] for i in order]
    path = folder / f"{ratio_name(ratio)}{suffix_of(args.noise_kind, seed)}"
    with atomic_write(path, replace=replace) as f:
        f.writelines(f"{caption}\n" for caption in noisy)
    return path, noisy


def training_captions(args, log=print):
    """(captions, path) to train on: the clean captions at ratio 0, else those of the options' noise
    file, which is made if it is missing.

    If random noise of this seed has no file, a file of the released name is taken, and the log says
    so: it may be the authors'. A file of that name that holds the noise of seed `SEED` is not taken
    for another seed.
    """
    ratio, kind, seed = args.noise_ratio, args.noise_kind, args.noise_seed
    folder = split_folder(args.dataset_root)
    clean = folder / "train_caps.txt"
    if float(ratio) == 0:
        return read_captions(clean), clean
    with main_first():
        path = find_by_ratio(folder, suffix_of(kind, seed), ratio)
        if kind == "random" and path is None:
            path = find_by_ratio(folder, SUFFIX, ratio)
            if path is not None and made_with(SEED, path, clean, ratio):
                path = None
        if path is not None and path.name.endswith(SUFFIX):
            if not made_with(seed, path, clean, ratio):
                log(f"noise file at hand: {path}, not made for --seed {seed}")
        if path is None:
            path, _ = construct_noise(args, replace=False)
            log(f"No {kind} noise of ratio {ratio_name(ratio)} and seed {seed} yet: made {path}")
    return read_captions(path), path


def made_with(seed, path, clean, noise_ratio):
    """Whether the file at `path` holds the random noise of a seed. clean: path of the clean
    captions."""
    if not clean.exists():
        return False
    captions = read_captions(clean)
    order = random_order(len(captions), noise_ratio, seed)
    return read_captions(path) == [captions[i] for i in order]
