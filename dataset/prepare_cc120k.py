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

import itertools
import os
import random
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.common import (
    JPEG,
    as_jpeg,
    image_format,
    inner_name,
    new_split,
    place,
    report,
    write_splits,
)
from params import Parser, positive_int
from utils.cleaning.captions import one_line
from utils.cleaning.tables import IMAGES, Member, read_rows
from utils.errors import InputError, command
from utils.reading.layout import few, read_lines, read_text

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
    header = [field.strip().lower() for field in lines[0].split("\t")] == ["caption", "url"]
    rows = []
    for number, line in enumerate(lines[header:], start=1 + header):
        caption, tab, _ = line.rpartition("\t")
        if not tab:
            raise InputError(f"--tsv {path}, line {number}: no tab; expected caption<TAB>url")
        rows.append(caption)
    return rows


def match_rows(rows, folder, mapping):
    """Samples of a TSV: {row number: (path, caption)}.

    mapping: a TSV of row number<TAB>file below `folder`, or None: file names are row numbers.
    Raises InputError when a row is named twice or does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder} is not a folder; give the one with the images")
    found = []
    if mapping:
        for number, line in enumerate(read_lines(mapping), start=1):
            row, _, name = line.partition("\t")
            try:
                found.append((int(row), folder / inner_name(name.strip())))
            except ValueError as error:
                raise InputError(f"--mapping {mapping}, line {number}: expected row number, from "
                                 f"0,<TAB>file ({error})") from None
    else:
        found = [(int(path.stem), path) for path in sorted(folder.rglob("*"))
                 if re.fullmatch("[0-9]+", path.stem)
                 and path.suffix[1:].lower() in (*IMAGES, "")]
    samples = {}
    for row, path in found:
        if not 0 <= row < len(rows):
            raise InputError(f"{path}: there is no row {row} in --tsv, which has {len(rows)} rows, "
                             "counted from 0; do the two belong together?")
        if row in samples:
            raise InputError(f"{path}: row {row} has a second image; the first is "
                             f"{samples[row][0]}")
        if os.path.isfile(path):
            samples[row] = path, rows[row]
    if not samples:
        raise InputError(f"no image of a row of --tsv was found in --images {folder}; files must "
                         "be named by row number, such as 000000017.jpg, or be listed in --mapping")
    return samples


def draw(samples, sizes, seed):
    """Draw usable samples: list of (key, image, caption, format), and {reason: list of keys}.

    Dev comes first, then test, then train, so that dev and test stay the same for another --train.
    Only as many images are opened as are needed. Raises InputError when there are too few.
    """
    wanted = sum(sizes.values())
    keys = sorted(samples)
    random.Random(seed).shuffle(keys)
    drawn, left_out = [], {"images that cannot be read": [], "images without a caption": []}
    with tqdm(total=wanted, desc="choosing", unit=" images", disable=None) as bar:
        for key in keys:
            if len(drawn) == wanted:
                break
            image, caption = samples[key]
            caption = one_line(caption) if isinstance(caption, str) else ""
            if not caption:
                left_out["images without a caption"].append(key)
                continue
            try:
                kind = image_format(image.read() if isinstance(image, Member) else image)
            except ValueError:
                left_out["images that cannot be read"].append(key)
                continue
            drawn.append((str(key), image, caption, kind))
            bar.update()
    if len(drawn) < wanted:
        usable = len(drawn)
        part = min(sizes["dev"], sizes["test"], max(1, usable // 100))
        fits = (f"--train {usable - 2 * part} --dev {part} --test {part} would fit" if usable > 2
                else "at least 3 are needed")
        reasons = "; ".join(f"{len(names)} {reason} ({few(names)})"
                            for reason, names in left_out.items() if names)
        raise InputError(f"{usable} of {len(samples)} images can be used"
                         f"{' (left out: ' + reasons + ')' if reasons else ''}, but --train, --dev "
                         f"and --test ask for {wanted}; {fits}")
    return drawn, left_out


@command
def main(argv=None):
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", type=Path, metavar="DIR",
                        help="output folder of img2dataset, with folders or tars")
    source.add_argument("--tsv", type=Path, metavar="FILE",
                        help="Conceptual Captions' TSV; use it with --images when the images were "
                             "downloaded otherwise")
    parser.add_argument("--images", type=Path, metavar="DIR",
                        help="folder with the images of --tsv, sub-folders included")
    parser.add_argument("--mapping", type=Path, metavar="FILE",
                        help="TSV of row number (from 0)<TAB>file below --images, when the files "
                             "are not named by row number")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR",
                        help="folder of the data set to make")
    for split, size in (("train", 118851), ("dev", 1000), ("test", 1000)):
        parser.add_argument(f"--{split}", type=positive_int, default=size, metavar="N",
                            help=f"images of the {split} split; the paper's, to be lowered when "
                                 "fewer could be downloaded")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the draw; change it for another split")
    args = parser.parse_args(argv)
    if args.tsv and not args.images:
        raise InputError("--tsv needs --images, the folder with the downloaded images")
    if args.shards and (args.images or args.mapping):
        raise InputError("--images and --mapping belong to --tsv; leave them out with --shards")

    samples = (read_shards(args.shards) if args.shards
               else match_rows(read_tsv(args.tsv), args.images, args.mapping))
    sizes = {"dev": args.dev, "test": args.test, "train": args.train}
    drawn, left_out = draw(samples, sizes, args.seed)

    splits, rest = {}, iter(drawn)
    for split, size in sizes.items():
        part = list(itertools.islice(rest, size))
        splits[split] = [key for key, *_ in part], [[caption] for _, _, caption, _ in part]
    placed = 0
    with new_split(args.root, lambda folder: write_splits(folder, splits)):
        for key, image, _, kind in tqdm(drawn, desc="placing", unit=" images", disable=None):
            content = image.read() if isinstance(image, Member) else image
            placed += place(content if kind in JPEG else as_jpeg(content),
                            args.root / "images" / f"{key}.jpg")

    looked_at = len(drawn) + sum(map(len, left_out.values()))
    print(f"found {len(samples)} images, looked at {looked_at}, "
          f"placed {placed} in {args.root / 'images'}, {len(drawn) - placed} were there")
    for reason, names in left_out.items():
        if names:
            print(f"left out: {len(names)} {reason} ({few(names)})")
    report(args.root, splits)


if __name__ == "__main__":
    main()
