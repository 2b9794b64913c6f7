"""Make a data set of your own from a table of images and captions.

    python dataset/prepare_pairs.py --pairs pairs.csv --images photos/ --root dataset/mine
    python dataset/prepare_pairs.py --pairs "data/*.parquet" --image_column jpg --root dataset/mine
    python dataset/prepare_pairs.py --pairs shards/ --root dataset/mine

The table is text with separators, JSON, Parquet, or a .tar of img2dataset or webdataset; a glob of
such files; or a folder of them. A caption may be a list of captions. An image is a path, or the
bytes of an image file (in Parquet, as in Hugging Face's data sets, and in tars). Images given as
bytes are named by the number of their row. Rows with the same image are its captions.

The split is drawn by image, so all captions of an image are in the same split. It depends on the
seed and on which images can be used. Rows that cannot be used are counted, and listed in
unusable_rows.csv. Nothing is written before all images have been read, and the command can be
stopped and run again.
"""

import sys

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from utils.errors import InputError, command  # isort: skip

import contextlib
import csv
import filecmp
import hashlib
import io
import itertools
import os
import random
import shlex
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path

from dataset.common import SPLIT_OF, as_path, inner_name, print_sizes, write_splits
from params import Parser, path, positive_int
from utils.cleaning.captions import captions_in
from utils.cleaning.source import read_source, save_source
from utils.cleaning.tables import Member, read_rows
from utils.files import atomic_write, new_folder, require_new
from utils.progress import progress
from utils.reading.images import open_image
from utils.reading.layout import SPLITS, files_by_spelling, spelling, split_folder, write_lines

JPEG = ("JPEG", "MPO")  # an MPO is a JPEG with further pictures behind the first
MOST_HELD_OUT = 5000  # images of dev, and of test, by default; as many as MSCOCO has


class Unusable(Exception):
    """A row or an image cannot be used: the reason and, optionally, details."""


class Usable:
    """The rows of a table that can be used.

    captions: {image name: list of (row number, place, caption)}. first: {number of the row that an
    image is taken from: its name}. split: {image name: its split, None without a split column}.
    unusable: list of (row number, reason, detail). source: the table as it was read.
    """

    def __init__(self, args):
        self.args = args
        self.captions, self.first, self.split, self.unusable = defaultdict(list), {}, {}, []
        self.names = {}  # {path or hash of an image that was read: its name, or an `Unusable`}
        self.source = read_source(args.pairs, args.image_column, args.caption_column)
        for number, row in enumerate(self.rows("reading")):
            try:
                self.add(number, row)
            except Unusable as why:
                self.unusable.append((number, *why.args, "")[:3])

    def rows(self, what):
        """The rows of the table, with a progress bar."""
        columns = [self.args.image_column, self.args.caption_column, self.args.split_column]
        rows = read_rows(self.args.pairs, list(filter(None, columns)))
        return progress(rows, total=self.source.rows, desc=what, unit="row")

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
        plain = plain_name(name)
        near = self.files[plain] or self.files[os.path.basename(plain)]
        alike = [file for file in near if spelling(file) == spelling(name)]
        if len(alike) > 1:
            raise Unusable("image name fits several files", ", ".join(map(repr, sorted(alike))))
        if not alike or not os.path.isfile(os.path.join(self.args.images, *alike)):
            hint = f"; there is {os.path.join(self.args.images, near[0])}" if near else ""
            raise Unusable("image does not exist", place + hint)
        return name, os.path.join(self.args.images, *alike)

    @cached_property
    def files(self):
        """Dict from the `plain_name` of a path, or of its last part, to the list of files below
        --images that have it."""
        found = defaultdict(list)
        for file in itertools.chain(*files_by_spelling(self.args.images).values()):
            plain = plain_name(file)
            for name in {plain, os.path.basename(plain)}:
                found[name].append(file)
        return found

    def put_images(self, names):
        """Put the images `names` into ROOT/images; returns how many were not there."""
        target, placed = self.args.root / "images", 0
        in_place = os.path.realpath(target) == os.path.realpath(self.args.images)
        for number, row in enumerate(self.rows("placing")):
            name = self.first.get(number)
            if name in names:
                image = self.image(row)[1]
                if isinstance(image, bytes) or not in_place:
                    placed += put_image(image, target / name)
        return placed


def image_format(source):
    """Format ("JPEG", "PNG", ...) of an image, a path or bytes, which is decoded in full, as in
    training. Raises `Unusable` when it cannot be decoded."""
    try:
        with open_image(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.convert("RGB")
            return image.format
    except Exception as error:  # decoders raise almost anything on broken images
        said = " ".join(str(error).split())[:150]
        said = "no image that Pillow knows" if "cannot identify" in said else said
        where = "" if isinstance(source, bytes) else f"{source}: "
        raise Unusable("image cannot be read", where + said) from None


def put_image(source, target):
    """Put an image, a path or bytes, at `target`, a path as a hard link if the disk allows. Returns
    False when it is there already. Raises InputError when something else is at `target`; it is not
    overwritten."""
    if os.path.lexists(target):
        if target.is_file() and (target.read_bytes() == source if isinstance(source, bytes)
                                 else filecmp.cmp(source, target, shallow=False)):
            return False
        raise InputError(f"{target} exists and is not the same image; move it away or choose "
                         "another --root")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(source, bytes):
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            os.link(os.path.realpath(source), target)
            return True
        source = Path(source).read_bytes()
    with atomic_write(target, "wb") as f:
        f.write(source)
    return True


def plain_name(name):
    """A file name without what may be mistaken in it: kind of slash, case and ending."""
    return os.path.splitext(spelling(name.replace("\\", "/")).casefold())[0]


def draw_split(names, train, dev, test, seed):
    """Draw the splits among image names: {split: sorted list of names}. train, dev, test: numbers
    of images. None for dev or test: a tenth, at most `MOST_HELD_OUT`; for train: all that are left.
    Raises InputError when there are too few images."""
    count = len(names)
    tenth = min(MOST_HELD_OUT, max(1, round(count / 10)))
    dev, test = dev or tenth, test or tenth
    train = train or count - dev - test
    if train < 1 or dev + test + train > count:
        raise InputError(f"--train, --dev and --test ask for {max(train, 1)}, {dev} and {test} "
                         f"images, but only {count} can be used; give smaller ones")
    order = list(names)
    random.Random(seed).shuffle(order)
    parts = {"dev": order[:dev], "test": order[dev : dev + test],
             "train": order[dev + test : dev + test + train]}
    return {split: sorted(part) for split, part in parts.items()}


def count_reasons(unusable):
    """Text that counts the reasons in a list of (row, reason, detail), with an example of the most
    frequent one."""
    counts = Counter(reason for _, reason, _ in unusable).most_common(5)
    text = "; ".join(f"{count} rows: {reason}" for reason, count in counts)
    examples = (f" (row {row}: {detail})" for row, reason, detail in unusable
                if detail and reason == counts[0][0])
    return text + next(examples, "")


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
        help="column or key with the caption, or with a list of captions")
    add("--split_column", metavar="NAME",
        help="column that says train, dev (or val) or test; default: the split is drawn")
    add("--train", type=positive_int, metavar="N",
        help="images of the train split; default: all that dev and test leave")
    for split in ("dev", "test"):
        add(f"--{split}", type=positive_int, metavar="N",
            help=f"images of the {split} split; default: a tenth, at most {MOST_HELD_OUT}, as "
                 "scoring compares each image with every caption")
    add("--seed", type=int, default=0, help="seed of the split")
    args = parser.parse_args(argv)
    if args.images is None:
        args.images = Path(args.pairs).parent
    elif not args.images.is_dir():
        raise InputError(f"--images {args.images} is not a folder; give the one that the paths in "
                         f"{args.pairs} start from")
    if args.split_column and (args.train or args.dev or args.test):
        raise InputError("--split_column says which images are in a split; leave out --train, "
                         "--dev and --test")

    require_new("--root", split_folder(args.root))
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

    with new_folder("--root", split_folder(args.root)) as folder:
        write_splits(folder, splits, names)
        for split in SPLITS:
            write_lines(folder / f"{split}_rows.txt",
                        [f"{row} {place}" for name in drawn[split]
                         for row, place, _ in usable.captions[name]])
        with atomic_write(folder / "unusable_rows.csv") as f:
            csv.writer(f, lineterminator="\n").writerows(
                [("row", "reason", "detail"), *usable.unusable])
        save_source(usable.source, folder)
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
