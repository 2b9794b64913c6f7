"""Draw CC120K, a random split of Conceptual Captions, from images that were downloaded.

    python dataset/prepare_cc120k.py --shards cc3m/ --root dataset/CC120K
    python dataset/prepare_cc120k.py --tsv cc3m.tsv --images cc3m/ --root dataset/CC120K

--shards is the output folder of img2dataset, as folders (00000/000000000.jpg with .txt or .json)
or as webdataset tars (00000.tar with the same inside). --tsv is Conceptual Captions' own file,
caption<TAB>url a row; the image of a row is the file below --images whose name without extension is
the row's number, counted from 0 and padded with zeros or not, unless --mapping names it.

The split depends on the seed and on which images can be used, not on the order of files. Images
become ROOT/images/ID.jpg, where ID is the file's name without extension or the row's number. It can
be stopped and run again; nothing is written before all images of the split are known.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import InputError, command  # first: Ctrl-C ends in a line  # isort: skip

import itertools
import os
import random
import re

from tqdm import tqdm

from dataset.common import (
    JPEG,
    Unusable,
    as_jpeg,
    count_reasons,
    image_format,
    inner_name,
    new_split,
    print_sizes,
    put_image,
    write_splits,
)
from params import Parser, positive_int
from utils.cleaning.captions import one_line
from utils.cleaning.tables import IMAGES, Member, read_rows
from utils.reading.layout import read_lines, read_text

PLAIN_KEY = re.compile(r"[\w-]+", re.ASCII)


def read_shards(folder):
    """Samples of img2dataset's output: {key: (Member, caption or what stands for it)}.

    Raises InputError when a key occurs twice, is no plain name, or no image is found.
    """
    samples = {}
    for row in tqdm(read_rows(folder, ("key", "image", "caption")), desc="listing", unit=" samples",
                    disable=None):
        key, image = row["key"], row["image"]
        if image is None:  # a caption whose download failed
            continue
        if not PLAIN_KEY.fullmatch(key):
            raise InputError(f"{image.file}: image {key!r} must be named with letters, digits, _ "
                             "and - only; rename it")
        if key in samples:
            raise InputError(f"{image.file}: a second image is named {key}; give the output of one "
                             "run of img2dataset, as folders or as tars")
        samples[key] = image, row["caption"]
    if not samples:
        raise InputError(f"--shards {folder} holds no images, neither as files nor in .tar shards")
    return samples


def read_tsv(path):
    """Captions of the rows of Conceptual Captions' TSV; a header "caption url" is none.

    The url is what follows the last tab. Raises InputError when a row has none.
    """
    lines = read_text(path, "--tsv is Conceptual Captions' list").removesuffix("\n").split("\n")
    header = re.fullmatch(r"\s*caption\s*\t\s*url\s*", lines[0], re.IGNORECASE) is not None
    rows = [line.rpartition("\t") for line in lines[header:]]
    for number, (_, tab, _) in enumerate(rows, start=1 + header):
        if not tab:
            raise InputError(f"--tsv {path}, line {number}: no tab; expected caption<TAB>url")
    return [caption for caption, _, _ in rows]


def match_rows(captions, folder, mapping):
    """Samples of a TSV: {row number: (path, caption)}.

    mapping: a TSV of row number<TAB>file below `folder`, or None: file names are row numbers.
    Raises InputError when a row is named twice or does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder} is not a folder; give the one with the images")
    if mapping:
        found = [line.split("\t", 1) for line in read_lines(mapping)]
    else:
        found = [(path.stem, path) for path in sorted(folder.rglob("*"))
                 if re.fullmatch("[0-9]+", path.stem) and path.suffix[1:].lower() in (*IMAGES, "")]
    samples = {}
    for line, (row, *path) in enumerate(found, start=1):
        try:
            row, path = int(row), folder / inner_name(path[0].strip()) if mapping else path[0]
        except (ValueError, IndexError) as error:
            raise InputError(f"--mapping {mapping}, line {line}: expected row number, from 0,<TAB>"
                             f"file ({error})") from None
        if not 0 <= row < len(captions):
            raise InputError(f"{path}: there is no row {row} in --tsv, which has {len(captions)} "
                             "rows, counted from 0; do the two belong together?")
        if row in samples:
            raise InputError(f"{path}: row {row} has a second image; the first is "
                             f"{samples[row][0]}")
        if os.path.isfile(path):
            samples[row] = path, captions[row]
    if not samples:
        raise InputError(f"no image of a row of --tsv was found in --images {folder}; files must "
                         "be named by row number, such as 000000017.jpg, or be listed in --mapping")
    return samples


def draw_usable(samples, sizes, seed):
    """Draw usable samples: list of (key, image, caption, format), and of (key, reason, detail) of
    those that are not.

    Dev comes first, then test, then train, so that dev and test stay the same for another --train.
    Only as many images are opened as are needed. Raises InputError when there are too few.
    """
    wanted, keys, drawn, unusable = sum(sizes.values()), sorted(samples), [], []
    random.Random(seed).shuffle(keys)
    with tqdm(total=wanted, desc="choosing", unit=" images", disable=None) as bar:
        for key in keys:
            if len(drawn) == wanted:
                break
            image, caption = samples[key]
            caption = one_line(caption) if isinstance(caption, str) else ""
            try:
                if not caption:
                    raise Unusable("no caption")
                drawn.append((str(key), image, caption, image_format(content(image))))
                bar.update()
            except Unusable as why:
                unusable.append((key, *why.args, "")[:3])
    if len(drawn) < wanted:
        usable = len(drawn)
        part = min(sizes["dev"], sizes["test"], max(1, usable // 100))
        fits = (f"--train {usable - 2 * part} --dev {part} --test {part} would fit" if usable > 2
                else "at least 3 are needed")
        left_out = f" (left out {count_reasons(unusable)})" if unusable else ""
        raise InputError(f"{usable} of {len(samples)} images can be used{left_out}, but --train, "
                         f"--dev and --test ask for {wanted}; {fits}")
    return drawn, unusable


def content(image):
    """A path, or the bytes of a `Member`."""
    return image.read() if isinstance(image, Member) else image


@command
def main(argv=None):
    parser = Parser(__doc__)
    source, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    source.add_argument("--shards", type=Path, metavar="DIR",
                        help="output folder of img2dataset, with folders or tars")
    source.add_argument("--tsv", type=Path, metavar="FILE",
                        help="Conceptual Captions' TSV; use it with --images when the images were "
                             "downloaded otherwise")
    add("--images", type=Path, metavar="DIR",
        help="folder with the images of --tsv, sub-folders included")
    add("--mapping", type=Path, metavar="FILE",
        help="TSV of row number (from 0)<TAB>file below --images, when the files are not named by "
             "row number")
    add("--root", type=Path, required=True, metavar="DIR", help="folder of the data set to make")
    for split, size in (("train", 118851), ("dev", 1000), ("test", 1000)):
        add(f"--{split}", type=positive_int, default=size, metavar="N",
            help=f"images of the {split} split; the paper's, to be lowered when fewer could be "
                 "downloaded")
    add("--seed", type=int, default=0, help="seed of the draw; change it for another split")
    args = parser.parse_args(argv)
    if args.tsv and not args.images:
        raise InputError("--tsv needs --images, the folder with the downloaded images")
    if args.shards and (args.images or args.mapping):
        raise InputError("--images and --mapping belong to --tsv; leave them out with --shards")

    samples = (read_shards(args.shards) if args.shards
               else match_rows(read_tsv(args.tsv), args.images, args.mapping))
    sizes = {"dev": args.dev, "test": args.test, "train": args.train}
    drawn, unusable = draw_usable(samples, sizes, args.seed)

    splits, rest = {}, iter(drawn)
    for split, size in sizes.items():
        part = list(itertools.islice(rest, size))
        splits[split] = [key for key, *_ in part], [[caption] for _, _, caption, _ in part]
    placed = 0
    with new_split(args.root, lambda folder: write_splits(folder, splits)):
        for key, image, _, kind in tqdm(drawn, desc="placing", unit=" images", disable=None):
            image = content(image)
            placed += put_image(image if kind in JPEG else as_jpeg(image),
                                args.root / "images" / f"{key}.jpg")

    print(f"found {len(samples)} images, looked at {len(drawn) + len(unusable)}, "
          f"placed {placed} in {args.root / 'images'}, {len(drawn) - placed} were there")
    if unusable:
        print(f"left out {count_reasons(unusable)}")
    print_sizes(args.root, splits)


if __name__ == "__main__":
    main()
