"""Make a noisy caption file: a share of the training captions, shuffled among themselves.

    python construct_noise.py --dataset f30k --dataset_root dataset/Flickr30K --noise_ratio 0.4

The same seed gives the same file as the released code.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import command  # isort: skip

from params import parse_args
from utils.reading.layout import read_captions, split_folder
from utils.reading.noise import construct_noise


@command
def main(argv=None):
    args = parse_args("noise", argv)
    clean = read_captions(split_folder(args.dataset_root) / "train_caps.txt")
    path, noisy = construct_noise(args)
    changed = sum(a != b for a, b in zip(clean, noisy, strict=True))
    print(f"{path}: {len(noisy)} captions, {changed} of them ({changed / len(noisy):.1%}) differ "
          f"from train_caps.txt")


if __name__ == "__main__":
    main()
