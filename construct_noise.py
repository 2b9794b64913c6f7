"""Make a noisy caption file: a share of the training captions, shuffled among themselves.

    python construct_noise.py --dataset f30k --dataset_root dataset/Flickr30K --noise_ratio 0.4

The same seed gives the same file as the released code.
"""

import numpy as np

from params import parse_args
from utils.distributed import main_first
from utils.errors import command
from utils.files import atomic_write
from utils.reading.layout import find_by_ratio, ratio_name, read_captions, read_ids, split_folder

SUFFIX = "_noise_train_caps.txt"


def noise_order(n, noise_ratio, seed):
    """Permutation (n,) int64: position i of the noisy file takes clean caption order[i].

    int(noise_ratio n) random positions exchange their captions; some of these may stay where they
    were or move within their image, so the true share of wrong pairs is a little below the ratio.
    """
    rng = np.random.RandomState(seed)
    positions = np.arange(n)
    rng.shuffle(positions)
    positions = positions[: int(noise_ratio * n)]
    source = positions.copy()
    rng.shuffle(source)
    order = np.arange(n)
    order[positions] = source
    return order


def construct_noise(dataset_root, noise_ratio, seed, replace=True):
    """Write {ratio}_noise_train_caps.txt from train_caps.txt; returns (path, noisy captions).

    Without `replace` a file that another run has written meanwhile stays.
    """
    folder = split_folder(dataset_root)
    captions = read_captions(folder / "train_caps.txt")
    noisy = [captions[i] for i in noise_order(len(captions), noise_ratio, seed)]
    path = folder / f"{ratio_name(noise_ratio)}{SUFFIX}"
    with atomic_write(path, replace=replace) as f:
        f.writelines(f"{caption}\n" for caption in noisy)
    return path, noisy


def training_captions(dataset_root, noise_ratio, seed, log=print):
    """(captions, path) to train on: clean at ratio 0, else the noisy file, made if missing."""
    folder = split_folder(dataset_root)
    if float(noise_ratio) == 0:
        path = folder / "train_caps.txt"
        return read_captions(path), path
    with main_first():
        path = find_by_ratio(folder, SUFFIX, noise_ratio)
        if path is None:
            path, noisy = construct_noise(dataset_root, noise_ratio, seed, replace=False)
            log(f"No noise file for ratio {ratio_name(noise_ratio)} yet: made {path} with seed "
                f"{seed}")
            if read_captions(path) != noisy:
                log("warning: another run has just made that file with another seed; that one is "
                    "used")
    return read_captions(path), path


@command
def main(argv=None):
    args = parse_args("noise", argv)
    clean = read_captions(split_folder(args.dataset_root) / "train_caps.txt")
    read_ids(args.dataset_root, "train", len(clean), args.num_anns, "train_caps.txt")  # they fit
    path, noisy = construct_noise(args.dataset_root, args.noise_ratio, args.seed)
    changed = sum(a != b for a, b in zip(clean, noisy, strict=True))
    print(f"{path}: {len(noisy)} captions, {changed} of them ({changed / len(noisy):.1%}) differ "
          f"from train_caps.txt")


if __name__ == "__main__":
    main()
