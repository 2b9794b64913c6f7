"""Make a data set of your own from a list of images and captions.

    python dataset/prepare_pairs.py --pairs pairs.csv --images photos/ --root dataset/mine

The list is a .csv or .tsv with a header, or a .jsonl with one object a line, whose caption may be a
list. Image paths are relative to --images. Rows with the same image are its captions, any number.
A .csv may quote its fields; a .tsv is read as it stands, without quotes.

The split is drawn by image, so all captions of one are in the same part; it depends on the seed and
on which images can be used. Images keep their names, sub-folders included. The command can be
stopped and run again; nothing is written before all images have been looked at.
"""

import csv
import io
import json
import os
import random
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.common import clean, image_format, inner_name, new_split, place, report
from params import Parser
from utils.errors import InputError, command
from utils.reading.layout import few, read_text


def amount(text):
    """argparse type: a number of images ("1000", int) or a share of them ("0.1", float)."""
    number = float(text) if "." in text else int(text)
    if not (number >= 1 if isinstance(number, int) else 0 < number < 1):
        raise ValueError
    return number


amount.__name__ = "number or share below 1"  # argparse names the type in its message


def read_table(path):
    """Rows of a .csv, .tsv or .jsonl with header: yields (line number, dict of column: value)."""
    text = read_text(path, "--pairs is the list of images and captions")
    kind = path.suffix.lower()
    if kind == ".jsonl":
        for number, line in enumerate(io.StringIO(text), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected an object with the image and "
                                 "its captions")
            yield number, row
    elif kind in (".csv", ".tsv"):
        form = ({"strict": True} if kind == ".csv"
                else {"delimiter": "\t", "quoting": csv.QUOTE_NONE})
        table = csv.DictReader(io.StringIO(text, newline=""), **form)
        try:
            for row in table:
                if None in row or None in row.values():  # too long or too short
                    raise InputError(f"{path}, line {table.line_num}: not as many fields as the "
                                     "header; in a .csv put captions with commas in double quotes")
                yield table.line_num, row
        except csv.Error as error:
            raise InputError(f"{path}, line {table.line_num}: {error}; check the quotes") from None
    else:
        raise InputError(f"--pairs {path} must end in .csv, .tsv or .jsonl, which says how it is "
                         "read")


def read_pairs(path, images, image_column, caption_column):
    """Captions by image: {name below `images`: list of str}, and the lines with an empty caption.

    Raises InputError on a missing column, a value of the wrong type, or an image outside `images`.
    """
    captions, empty = {}, []
    for number, row in tqdm(read_table(path), desc="reading", unit=" rows", disable=None):
        where = f"{path}, line {number}"
        for option, column in (("image", image_column), ("caption", caption_column)):
            if column not in row:
                raise InputError(f"{where}: no column '{column}', only {', '.join(row)}; give "
                                 f"--{option}_column")
        name, own = row[image_column], row[caption_column]
        own = own if isinstance(own, list) else [own]
        if not (isinstance(name, str) and own and all(isinstance(c, str) for c in own)):
            raise InputError(f"{where}: '{image_column}' must be text and '{caption_column}' text "
                             "or a list of texts")
        name = name.strip()
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(images))
        kept = [caption for caption in map(clean, own) if caption]
        empty += [f"line {number}"] * (len(own) - len(kept))
        if kept:
            try:
                captions.setdefault(inner_name(name), []).extend(kept)
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
    if not captions:
        raise InputError(f"--pairs {path} holds no captions")
    return captions, empty


def usable_images(names, folder):
    """Names, sorted, of the images below a folder that can be read; and {reason: other names}."""
    usable, left_out = [], {"images that do not exist": [], "images that cannot be read": []}
    for name in tqdm(sorted(names), desc="checking", unit=" images", disable=None):
        if not os.path.isfile(folder / name):
            left_out["images that do not exist"].append(name)
        elif image_format(folder / name) is None:
            left_out["images that cannot be read"].append(name)
        else:
            usable.append(name)
    return usable, left_out


def draw(count, dev, test, seed):
    """Draw a split of `count` images: {split: sorted list of int}; shares are of `count`.

    Raises InputError when dev and test leave nothing to train on.
    """
    size = {split: part if isinstance(part, int) else max(1, round(part * count))
            for split, part in (("dev", dev), ("test", test))}
    if sum(size.values()) >= count:
        raise InputError(f"--dev and --test take {size['dev']} + {size['test']} images, but only "
                         f"{count} can be used and training needs some; give smaller ones")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    held_out = size["dev"] + size["test"]
    return {"dev": sorted(order[:size["dev"]]), "test": sorted(order[size["dev"]:held_out]),
            "train": sorted(order[held_out:])}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--pairs", type=Path, required=True,
                        help="list of images and captions: .csv, .tsv or .jsonl (no default)")
    parser.add_argument("--images", type=Path, required=True,
                        help="folder that the image paths start from (no default); ROOT/images "
                             "leaves the images where they are")
    parser.add_argument("--root", type=Path, required=True,
                        help="folder of the data set to make (no default)")
    parser.add_argument("--image_column", default="image", metavar="NAME",
                        help="column or key with the image path (default: %(default)s); change it "
                             "when yours is called otherwise")
    parser.add_argument("--caption_column", default="caption", metavar="NAME",
                        help="column or key with the caption (default: %(default)s); change it "
                             "when yours is called otherwise")
    for split in ("dev", "test"):
        parser.add_argument(f"--{split}", type=amount, default=0.1, metavar="N",
                            help=f"images of the {split} split, as number (1000) or share (0.1) "
                                 "(default: %(default)s); give a number for a large data set, as "
                                 "every one is compared with every other")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the split (default: %(default)s); change it for another one")
    parser.add_argument("--link", choices=("hard", "symlink", "copy"), default="hard",
                        help="how images get into ROOT/images (default: %(default)s, which takes "
                             "no room and becomes a copy across disks); symlink takes none across "
                             "disks but breaks when --images moves; copy for images that you edit")
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        raise InputError(f"--images {args.images} is not a folder; give the one that the paths in "
                         f"{args.pairs} start from")

    captions, empty = read_pairs(args.pairs, args.images, args.image_column, args.caption_column)
    names, left_out = usable_images(captions, args.images)
    if not names:
        reasons = "; ".join(f"{len(n)} {reason} ({few(n)})" for reason, n in left_out.items() if n)
        raise InputError(f"no image of {args.pairs} can be used: {reasons}; is --images "
                         f"{args.images} the folder that its paths start from?")
    splits = {split: (ids, [captions[names[i]] for i in ids])
              for split, ids in draw(len(names), args.dev, args.test, args.seed).items()}
    target, placed = args.root / "images", 0
    with new_split(args.root, splits, names):
        if not (target.is_dir() and os.path.samefile(target, args.images)):
            for name in tqdm(names, desc="placing", unit=" images", disable=None):
                placed += place(args.images / name, target / name, args.link)

    print(f"placed {placed} images in {target}, {len(names) - placed} were there")
    report(args.root, splits, left_out | {"empty captions": empty})
    print("train on it with:\n  python main_NPC.py --dataset pairs --dataset_root "
          f"{shlex.quote(os.path.abspath(args.root))}")


if __name__ == "__main__":
    main()
