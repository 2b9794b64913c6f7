"""Make a data set of your own from a table of images and captions.

    python dataset/prepare_pairs.py --pairs pairs.csv --images photos/ --root dataset/mine
    python dataset/prepare_pairs.py --pairs "data/*.parquet" --image_column jpg --root dataset/mine
    python dataset/prepare_pairs.py --pairs shards/ --root dataset/mine

The table is text with separators, JSON, Parquet or Arrow, or a .tar of img2dataset or webdataset, a
glob of such files or a folder of them. A caption may be a list of captions. An image is a path, or
the bytes of an image file (in Parquet, as Hugging Face's data sets have them, and in tars); images
given as bytes are named by the number of their row. Rows with the same image are its captions.

The split is drawn by image, so all captions of one are in the same part; it depends on the seed and
on which images can be used. Rows that cannot be used are counted and listed in unusable_rows.csv.
The command can be stopped and run again; nothing is written before all images have been looked at.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import InputError, command  # first: Ctrl-C ends in a line  # isort: skip

import csv
import hashlib
import os
import random
import shlex
import unicodedata
from collections import defaultdict

from tqdm import tqdm

from dataset.common import (
    JPEG,
    SPLIT_OF,
    Unusable,
    count_reasons,
    image_format,
    inner_name,
    new_split,
    print_sizes,
    put_image,
    write_splits,
)
from params import Parser
from utils.cleaning.captions import captions_in
from utils.cleaning.source import Digest, Source, save_source
from utils.cleaning.tables import Member, read_rows
from utils.files import atomic_write
from utils.reading.layout import SPLITS, write_lines

MOST_HELD_OUT = 5000  # images of dev and test unless asked for more; as many as MSCOCO has


def amount(text):
    """argparse type: a number of images ("1000", int) or a share of them ("0.1", float)."""
    number = float(text) if "." in text else int(text)
    if not (number >= 1 if isinstance(number, int) else 0 < number < 1):
        raise ValueError
    return number


amount.__name__ = "number or share below 1"  # argparse names the type in its message


class Usable:
    """The rows of a table that can be used.

    captions: {image name: list of (row number, place, caption)}. first: {number of the row that an
    image is taken from: its name}. split: {image name: its split}, where a column says it.
    unusable: list of (row number, reason, detail). source: the table as it was read.
    """

    def __init__(self, args):
        self.args = args
        self.captions, self.first, self.unusable = defaultdict(list), {}, []
        self.split, self.there = {}, None
        self.names = {}  # of images that were looked at, by name or by content, or what is wrong
        columns = args.image_column, args.caption_column
        digest = Digest(columns)
        for number, row in enumerate(self.rows("reading")):
            digest.add(row)
            try:
                self.add(number, row)
            except Unusable as why:
                self.unusable.append((number, *why.args, "")[:3])
        self.source = Source(os.path.abspath(args.pairs), *columns, digest.rows,
                             digest.sha256.hexdigest())

    def rows(self, what):
        columns = [self.args.image_column, self.args.caption_column, self.args.split_column]
        return tqdm(read_rows(self.args.pairs, list(filter(None, columns))), desc=what,
                    unit=" rows", disable=None)

    def add(self, number, row):
        """Note what row `number` holds. Raises `Unusable`."""
        if isinstance(row, str):
            raise Unusable(row)
        try:
            captions = captions_in(row[self.args.caption_column])
        except ValueError as error:
            raise Unusable("caption cannot be understood", str(error)) from None
        if not captions:
            raise Unusable("no caption")
        said = self.args.split_column and str(row[self.args.split_column]).strip().lower()
        if said is not None and said not in SPLIT_OF:
            raise Unusable("split is none of train, dev, test", said)
        name, split = self.image_in(number, row), SPLIT_OF.get(said)
        if self.split.setdefault(name, split) != split:
            raise Unusable("image is in two splits", f"{self.split[name]} and {split}")
        self.captions[name] += [(number, *caption) for caption in captions]

    def image_in(self, number, row):
        """Name of a row's image, which is looked at when it is a new one."""
        name, image = self.image(row)
        key = name or hashlib.sha256(image).digest()
        if key not in self.names:
            try:
                if name and not os.path.isfile(image):
                    raise Unusable("image does not exist", image + self.like(name))
                kind = image_format(image)
                extension = "jpg" if kind in JPEG else kind.lower()
                self.names[key] = self.first[number] = name or f"{number:08d}.{extension}"
            except Unusable as why:
                self.names[key] = why
        if isinstance(self.names[key], Unusable):
            raise self.names[key]
        return self.names[key]

    def image(self, row):
        """A row's image: its path below --images, or None, and where it is: a path or bytes."""
        value = row[self.args.image_column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Member):
            value = value.read()
        if isinstance(value, bytes):
            return None, value
        if not (isinstance(value, str) and value.strip()):
            raise Unusable("no image")
        name = value.strip()
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(self.args.images))
        try:
            name = inner_name(name)
        except ValueError as error:
            raise Unusable("image is outside the images folder or its name is no text",
                           str(error)) from None
        return name, os.path.join(self.args.images, name)

    def like(self, name):
        """What is there instead of an image that is not: a name with another slash, ending, case or
        Unicode form, or the file in another folder."""
        if self.there is None:
            self.there = {}
            for folder, _, files in os.walk(self.args.images):
                for file in files:
                    path = os.path.relpath(os.path.join(folder, file), self.args.images)
                    self.there.setdefault(plain_name(path), path)
                    self.there.setdefault(plain_name(file), path)
        name = plain_name(name)
        found = self.there.get(name) or self.there.get(name.rpartition("/")[2])
        return f"; there is {os.path.join(self.args.images, found)}" if found else ""

    def put_images(self):
        """Put the images into ROOT/images; returns how many were not there."""
        return sum(put_image(self.image(row)[1], self.args.root / "images" / self.first[number],
                             self.args.link)
                   for number, row in enumerate(self.rows("placing")) if number in self.first)


def plain_name(name):
    """A file name without what systems differ in: kind of slash, case, Unicode form, ending."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return os.path.splitext(name)[0]


def draw_split(count, dev, test, seed):
    """Draw a split of `count` images: {split: sorted list of int}; shares are of `count`; None is a
    tenth, but `MOST_HELD_OUT` at most.

    Raises InputError when dev and test leave nothing to train on.
    """
    dev, test = (min(MOST_HELD_OUT, max(1, round(count / 10))) if part is None
                 else part if isinstance(part, int) else max(1, round(part * count))
                 for part in (dev, test))
    if dev + test >= count:
        raise InputError(f"--dev and --test take {dev} + {test} images, but only {count} can be "
                         "used and training needs some; give smaller ones")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return {"dev": sorted(order[:dev]), "test": sorted(order[dev : dev + test]),
            "train": sorted(order[dev + test :])}


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", required=True, metavar="TABLE",
        help="table of images and captions: a file, a glob in quotes, or a folder")
    add("--images", type=Path, metavar="DIR",
        help="folder that the image paths start from; ROOT/images leaves the images where they "
             "are; without it the folder of the table")
    add("--root", type=Path, required=True, metavar="DIR", help="folder of the data set to make")
    add("--image_column", default="image", metavar="NAME", help="column or key with the image")
    add("--caption_column", default="caption", metavar="NAME",
        help="column or key with the caption, or a pattern of several, 'caption_*'")
    add("--split_column", metavar="NAME",
        help="column that says train, dev (or val) or test; without it the split is drawn")
    for split in ("dev", "test"):
        add(f"--{split}", type=amount, metavar="N",
            help=f"images of the {split} split, as number (1000) or share (0.1); without it a "
                 f"tenth, at most {MOST_HELD_OUT}, as every one is compared with every other")
    add("--seed", type=int, default=0, help="seed of the split; change it for another one")
    add("--link", choices=("hard", "symlink", "copy"), default="hard",
        help="how images get into ROOT/images; hard takes no room and becomes a copy across disks; "
             "symlink takes none across disks but breaks when --images moves; copy for images that "
             "you edit")
    args = parser.parse_args(argv)
    if args.images is None:
        args.images = Path(args.pairs).parent
    elif not args.images.is_dir():
        raise InputError(f"--images {args.images} is not a folder; give the one that the paths in "
                         f"{args.pairs} start from")

    usable = Usable(args)
    names = sorted(usable.captions)
    if not names:
        why = count_reasons(usable.unusable) or "it has none"
        raise InputError(f"no row of {args.pairs} can be used: {why}; image paths start from "
                         f"--images {args.images}")
    drawn = ({split: [i for i, name in enumerate(names) if usable.split[name] == split]
              for split in SPLITS} if args.split_column
             else draw_split(len(names), args.dev, args.test, args.seed))
    splits = {split: (ids, [[caption for *_, caption in usable.captions[names[i]]] for i in ids])
              for split, ids in drawn.items()}

    def write(folder):
        folder = Path(folder)
        write_splits(folder, splits, names)
        for split in SPLITS:
            write_lines(folder / f"{split}_rows.txt",
                        [f"{row} {at}" for i in drawn[split]
                         for row, at, _ in usable.captions[names[i]]])
        with atomic_write(folder / "unusable_rows.csv") as f:
            csv.writer(f, lineterminator="\n").writerows(
                [("row", "reason", "detail"), *usable.unusable])
        save_source(usable.source, folder)

    with new_split(args.root, write):
        placed = usable.put_images()
    print(f"placed {placed} images in {args.root / 'images'}, {len(names) - placed} were there")
    if usable.unusable:
        print(f"left out {len(usable.unusable)} rows, listed in unusable_rows.csv: "
              f"{count_reasons(usable.unusable)}")
    print_sizes(args.root, splits)
    print("train on it with:\n  python main_NPC.py --recipe robust --dataset_root "
          f"{shlex.quote(os.path.abspath(args.root))} --experiments mine")


if __name__ == "__main__":
    main()
