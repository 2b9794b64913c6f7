"""Make a data set of your own from a table of images and captions.

    python dataset/prepare_pairs.py --pairs pairs.csv --images photos/ --root dataset/mine
    python dataset/prepare_pairs.py --pairs "data/*.parquet" --image_column jpg --root dataset/mine
    python dataset/prepare_pairs.py --pairs shards/ --root dataset/mine

The table is text with separators, JSON, Parquet, Arrow, or a .tar of img2dataset or webdataset; a
glob of such files; or a folder of them. A caption may be a list of captions. An image is a path, or
the bytes of an image file (in Parquet, as in Hugging Face's data sets, and in tars). Images given
as bytes are named by the number of their row. Rows with the same image are its captions.

The split is drawn by image, so all captions of an image are in the same split. It depends on the
seed and on which images can be used. Rows that cannot be used are counted, and listed in
unusable_rows.csv. Nothing is written before all images have been read, and the command can be
stopped and run again.
"""

import sys

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from utils.errors import InputError, command  # isort: skip

import csv
import hashlib
import itertools
import os
import random
import shlex
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from dataset.common import (
    JPEG,
    SPLIT_OF,
    Unusable,
    as_path,
    count_reasons,
    image_format,
    inner_name,
    new_split,
    print_sizes,
    put_image,
    write_splits,
)
from params import Parser, path
from utils.cleaning.captions import captions_in
from utils.cleaning.source import Digest, Source, save_source
from utils.cleaning.tables import Member, read_rows, table_of
from utils.files import atomic_write
from utils.progress import progress
from utils.reading.layout import SPLITS, files_by_spelling, spelling, write_lines

MOST_HELD_OUT = 5000  # images of dev, and of test, by default; as many as MSCOCO has


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
    image is taken from: its name}. split: {image name: its split, None without a split column}.
    unusable: list of (row number, reason, detail). source: the table as it was read.
    """

    def __init__(self, args):
        self.args = args
        self.captions, self.first, self.unusable = defaultdict(list), {}, []
        self.split = {}
        self.names = {}  # {path or hash of an image that was read: its name, or an `Unusable`}
        self.count = table_of(args.pairs).count()
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
        """The rows of the table, with a progress bar."""
        columns = [self.args.image_column, self.args.caption_column, self.args.split_column]
        rows = read_rows(self.args.pairs, list(filter(None, columns)))
        return progress(rows, total=self.count, desc=what, unit="row")

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
        """Name of a row's image. A new image is decoded, and named. Raises `Unusable`."""
        name, image = self.image(row)
        key = name or hashlib.sha256(image).digest()
        if key not in self.names:
            try:
                if name and not os.path.isfile(image):
                    raise Unusable("image does not exist", image + self.hint(name))
                kind = image_format(image)
                extension = "jpg" if kind in JPEG else kind.lower()
                self.names[key] = self.first[number] = name or f"{number:08d}.{extension}"
            except Unusable as why:
                self.names[key] = why
        if isinstance(self.names[key], Unusable):
            raise self.names[key]
        return self.names[key]

    def image(self, row):
        """(name, path) of a row's image below --images, or (None, its bytes). Raises `Unusable`."""
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
        if name.startswith(("http://", "https://")):
            raise Unusable("image is a URL; download the images first, as with img2dataset", name)
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(self.args.images))
        try:
            name = inner_name(name)
        except ValueError as error:
            raise Unusable("image is outside the images folder or its name is no text",
                           str(error)) from None
        place = os.path.join(self.args.images, name)
        if value == value.strip() and os.path.isfile(place):
            return name, place
        alike = self.there.get(spelling(name), [])
        if len(alike) > 1:
            raise Unusable("image name fits several files", ", ".join(map(repr, sorted(alike))))
        return name, os.path.join(self.args.images, *alike) if alike else place

    @cached_property
    def there(self):
        """`files_by_spelling` of --images."""
        return files_by_spelling(self.args.images)

    @cached_property
    def by_plain_name(self):
        """{`plain_name` of a path or of its last part: the path} of the files below --images."""
        found = {}
        for file in itertools.chain(*self.there.values()):
            found.setdefault(plain_name(file), file)
            found.setdefault(plain_name(os.path.basename(file)), file)
        return found

    def hint(self, name):
        """Text that names the file which the name of an absent one may mean, or ""."""
        plain = plain_name(name)
        file = self.by_plain_name.get(plain) or self.by_plain_name.get(os.path.basename(plain))
        return f"; there is {os.path.join(self.args.images, file)}" if file else ""

    def put_images(self, names):
        """Put the images `names` into ROOT/images; returns how many were not there."""
        target, placed = self.args.root / "images", 0
        in_place = os.path.realpath(target) == os.path.realpath(self.args.images)
        for number, row in enumerate(self.rows("placing")):
            name = self.first.get(number)
            if name in names:
                image = self.image(row)[1]
                if isinstance(image, bytes) or not in_place:
                    placed += put_image(image, target / name, self.args.link)
        return placed


def plain_name(name):
    """A file name without what may be mistaken in it: kind of slash, case and ending."""
    return os.path.splitext(spelling(name.replace("\\", "/")).casefold())[0]


def draw_split(names, train, dev, test, seed):
    """Draw the splits among image names: {split: sorted list of names}. Amounts are numbers or
    shares of the images. None for dev or test: a tenth, at most `MOST_HELD_OUT`; for train: all
    that are left. Raises InputError when there are too few images."""
    count = len(names)

    def number(part):
        return part if isinstance(part, int) else max(1, round(part * count))

    tenth = min(MOST_HELD_OUT, max(1, round(count / 10)))
    dev, test = (tenth if part is None else number(part) for part in (dev, test))
    train = count - dev - test if train is None else number(train)
    if train < 1 or dev + test + train > count:
        raise InputError(f"--train, --dev and --test ask for {max(train, 1)}, {dev} and {test} "
                         f"images, but only {count} can be used; give smaller ones")
    order = list(names)
    random.Random(seed).shuffle(order)
    parts = {"dev": order[:dev], "test": order[dev : dev + test],
             "train": order[dev + test : dev + test + train]}
    return {split: sorted(part) for split, part in parts.items()}


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=path, required=True, metavar="TABLE",
        help="table of images and captions: a file, a glob in quotes, or a folder")
    add("--images", type=as_path, metavar="DIR",
        help="folder that the image paths start from; ROOT/images leaves the images where they "
             "are; default: the folder of the table")
    add("--root", type=as_path, required=True, metavar="DIR", help="folder of the data set to make")
    add("--image_column", default="image", metavar="NAME", help="column or key with the image")
    add("--caption_column", default="caption", metavar="NAME",
        help="column or key with the caption, or a pattern of several, 'caption_*'")
    add("--split_column", metavar="NAME",
        help="column that says train, dev (or val) or test; default: the split is drawn")
    add("--train", type=amount, metavar="N",
        help="images of the train split, as a number (118851) or a share (0.5); default: all that "
             "dev and test leave")
    for split in ("dev", "test"):
        add(f"--{split}", type=amount, metavar="N",
            help=f"images of the {split} split, as a number (1000) or a share (0.1); default: a "
                 f"tenth, at most {MOST_HELD_OUT}, as scoring compares each image with every "
                 "caption")
    add("--seed", type=int, default=0, help="seed of the split")
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
    if args.split_column and (args.train or args.dev or args.test):
        raise InputError("--split_column says which images are in a split; leave out --train, "
                         "--dev and --test")

    usable = Usable(args)
    if not usable.captions:
        why = count_reasons(usable.unusable) or "it has none"
        raise InputError(f"no row of {args.pairs} can be used: {why}; image paths start from "
                         f"--images {args.images}")
    all_names = sorted(usable.captions)
    drawn = ({split: [name for name in all_names if usable.split[name] == split]
              for split in SPLITS} if args.split_column
             else draw_split(all_names, args.train, args.dev, args.test, args.seed))
    names = sorted(sum(drawn.values(), []))
    number = {name: i for i, name in enumerate(names)}
    splits = {split: ([number[name] for name in part],
                      [[caption for *_, caption in usable.captions[name]] for name in part])
              for split, part in drawn.items()}

    def write(target):
        target = Path(target)
        write_splits(target, splits, names)
        for split in SPLITS:
            write_lines(target / f"{split}_rows.txt",
                        [f"{row} {place}" for name in drawn[split]
                         for row, place, _ in usable.captions[name]])
        with atomic_write(target / "unusable_rows.csv") as f:
            csv.writer(f, lineterminator="\n").writerows(
                [("row", "reason", "detail"), *usable.unusable])
        save_source(usable.source, target)

    with new_split(args.root, write):
        placed = usable.put_images(number)
    print(f"placed {placed} images in {args.root / 'images'}, {len(names) - placed} were there")
    if usable.unusable:
        print(f"left out {len(usable.unusable)} rows, listed in unusable_rows.csv: "
              f"{count_reasons(usable.unusable)}")
    if len(names) < len(all_names):
        print(f"did not draw {len(all_names) - len(names)} images, as --train asks for fewer")
    print_sizes(args.root, splits)
    root = shlex.quote(os.path.abspath(args.root))
    print("No caption was checked. If some are wrong, so are some of dev and test, and every score "
          "is of such captions. Find them in all three splits with:\n"
          f"  python find_noise.py --dataset_root {root} --out logs/noise\n"
          "Train with:\n"
          f"  python main_NPC.py --recipe robust --dataset_root {root} --experiments mine")


if __name__ == "__main__":
    main()
