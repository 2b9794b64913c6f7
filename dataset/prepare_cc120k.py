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

import json
import os
import random
import re
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.common import (
    JPEG,
    as_jpeg,
    clean,
    image_format,
    inner_name,
    new_split,
    place,
    report,
)
from params import Parser, positive_int
from utils.errors import InputError, command
from utils.files import reading
from utils.reading.layout import few, read_lines, read_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
PLAIN_KEY = re.compile(r"[\w-]+", re.ASCII)


class Member(NamedTuple):
    """A file inside a tar: where its bytes lie. Nothing is ever unpacked by its name."""

    tar: str
    offset: int
    size: int


def read(source):
    """Bytes of a file given as path or Member."""
    if not isinstance(source, Member):
        return Path(source).read_bytes()
    with open(source.tar, "rb") as f:
        f.seek(source.offset)
        return f.read(source.size)


def walk(folder, option):
    """Paths (str) of all files below a folder, in sorted order."""
    if not folder.is_dir():
        raise InputError(f"{option} {folder} is not a folder; give the one with the images")
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from filter(os.path.isfile, (os.path.join(parent, name) for name in sorted(names)))


def tar_members(path):
    """(name without folders, Member) of each file of a tar; InputError when it is broken."""
    with (reading(path, "a whole, uncompressed tar", "download the shard again or move it away"),
          tarfile.open(path, "r:") as tar):
        for member in tar:
            if member.size < 0:  # some versions of tarfile would run in circles
                raise ValueError("a member of negative size")
            if member.isreg() and not member.issparse():
                yield member.name.rsplit("/", 1)[-1], Member(path, member.offset_data, member.size)


def read_shards(folder):
    """Samples of img2dataset's output: {key: (image, text)}; and {reason: keys} of what is over.

    image is a path or Member, text ("txt" | "json", path or Member) or None when there is neither.
    Raises InputError when a key occurs twice, is no plain name, or no image is found.
    """
    images, texts = {}, {}
    for path in tqdm(walk(folder, "--shards"), desc="listing", unit=" files", disable=None):
        members = tar_members(path) if path.endswith(".tar") else [(os.path.basename(path), path)]
        for name, source in members:
            key, _, extension = name.partition(".")  # webdataset's rule: up to the first dot
            extension = extension.lower()
            if not key or extension not in (*IMAGE_EXTENSIONS, "txt", "json"):
                continue
            where = source.tar if isinstance(source, Member) else path
            if extension in ("txt", "json"):
                if key not in texts or extension == "txt":
                    texts[key] = (extension, source)
                continue
            if not PLAIN_KEY.fullmatch(key):
                raise InputError(f"{where}: image {name!r} must be named with letters, digits, _ "
                                 "and - only; rename it")
            if key in images:
                raise InputError(f"{where}: a second image is named {key}; give the output of one "
                                 "run of img2dataset, as folders or as tars")
            images[key] = source
    if not images:
        raise InputError(f"--shards {folder} holds no images, neither as files nor in .tar shards")
    alone = sorted(key for key in texts.keys() - images.keys() if not key.endswith("_stats"))
    return ({key: (image, texts.get(key)) for key, image in images.items()},
            {"captions without an image": alone})


def shard_caption(text):
    """Caption, cleaned, of what `read_shards` gives as caption source; "" when there is none."""
    if text is None:
        return ""
    extension, source = text
    content = read(source).decode("utf-8", "replace")
    if extension == "json":
        try:
            content = json.loads(content).get("caption")
        except (ValueError, AttributeError):
            content = None
    return clean(content) if isinstance(content, str) else ""


def read_rows(path):
    """Captions, cleaned, of the rows of Conceptual Captions' TSV; a header "caption url" is none.

    The url is what follows the last tab. Raises InputError when a row has none.
    """
    lines = read_text(path, "--tsv is Conceptual Captions' list").removesuffix("\n").split("\n")
    header = [field.strip().lower() for field in lines[0].split("\t")] == ["caption", "url"]
    rows = []
    for number, line in enumerate(lines[header:], start=1 + header):
        caption, tab, _ = line.rpartition("\t")
        if not tab:
            raise InputError(f"--tsv {path}, line {number}: no tab; expected caption<TAB>url")
        rows.append(clean(caption))
    return rows


def match_rows(rows, folder, mapping):
    """Images of the rows of a TSV: {row number: path}; and {reason: files} of what is left over.

    mapping: a TSV of row number<TAB>file below `folder`, or None: file names are row numbers.
    Raises InputError when a row is named twice or does not exist.
    """
    images, other, absent = {}, [], []
    if mapping:
        pairs = []
        for number, line in enumerate(read_lines(mapping), start=1):
            where = f"--mapping {mapping}, line {number}"
            row, tab, name = line.partition("\t")
            try:
                pairs.append((int(row), str(folder / inner_name(name.strip())), where))
            except ValueError as error:
                raise InputError(f"{where}: expected row number, from 0,<TAB>file ({error})"
                                 ) from None
    else:
        pairs = []
        for path in walk(folder, "--images"):
            stem, extension = os.path.splitext(os.path.basename(path))
            if extension[1:].lower() in (*IMAGE_EXTENSIONS, "") and re.fullmatch("[0-9]+", stem):
                pairs.append((int(stem), path, path))
            else:
                other.append(path)
    for row, path, where in pairs:
        if row >= len(rows):
            raise InputError(f"{where}: row {row} is past the end of --tsv, which has {len(rows)} "
                             "rows, counted from 0; do the two belong together?")
        if row in images:
            raise InputError(f"{where}: row {row} has a second image; the first is {images[row]}")
        if os.path.isfile(path):
            images[row] = path
        else:
            absent.append(path)
    if not images:
        raise InputError(f"no image of a row of --tsv was found in --images {folder}; files must "
                         "be named by row number, such as 000000017.jpg, or be listed in --mapping")
    return images, {"files that are not named by a row number": other,
                    "rows of --mapping whose file does not exist": absent}


def draw(samples, sizes, seed, caption_of):
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
            image, text = samples[key]
            caption = caption_of(text)
            if not caption:
                left_out["images without a caption"].append(key)
                continue
            kind = image_format(read(image) if isinstance(image, Member) else image)
            if kind is None:
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
    source.add_argument("--shards", type=Path,
                        help="output folder of img2dataset, folders or tars (no default); use it "
                             "when img2dataset made the download")
    source.add_argument("--tsv", type=Path,
                        help="Conceptual Captions' TSV (no default); use it with --images when the "
                             "images were downloaded otherwise")
    parser.add_argument("--images", type=Path,
                        help="folder with the images of --tsv, sub-folders included (no default)")
    parser.add_argument("--mapping", type=Path,
                        help="TSV of row number (from 0)<TAB>file below --images (default: the "
                             "files are named by row number); give it when they are not")
    parser.add_argument("--root", type=Path, required=True,
                        help="folder of the data set to make (no default)")
    parser.add_argument("--train", type=positive_int, default=118851, metavar="N",
                        help="training images (default: %(default)s, the paper's); lower it when "
                             "fewer could be downloaded")
    parser.add_argument("--dev", type=positive_int, default=1000, metavar="N",
                        help="validation images (default: %(default)s); lower it with --train")
    parser.add_argument("--test", type=positive_int, default=1000, metavar="N",
                        help="test images (default: %(default)s); lower it with --train")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the draw (default: %(default)s); change it for another split")
    args = parser.parse_args(argv)
    if args.tsv and not args.images:
        raise InputError("--tsv needs --images, the folder with the downloaded images")
    if args.shards and (args.images or args.mapping):
        raise InputError("--images and --mapping belong to --tsv; leave them out with --shards")

    if args.shards:
        (samples, unmatched), caption_of = read_shards(args.shards), shard_caption
    else:
        rows = read_rows(args.tsv)
        images, unmatched = match_rows(rows, args.images, args.mapping)
        samples, caption_of = {row: (path, rows[row]) for row, path in images.items()}, str
    sizes = {"dev": args.dev, "test": args.test, "train": args.train}
    drawn, left_out = draw(samples, sizes, args.seed, caption_of)

    splits, start = {}, 0
    for split, size in sizes.items():
        part = drawn[start:start + size]
        splits[split] = [key for key, *_ in part], [[caption] for _, _, caption, _ in part]
        start += size
    placed = 0
    with new_split(args.root, splits):
        for key, image, _, kind in tqdm(drawn, desc="placing", unit=" images", disable=None):
            content = read(image) if isinstance(image, Member) else image
            placed += place(content if kind in JPEG else as_jpeg(content),
                            args.root / "images" / f"{key}.jpg")

    looked_at = len(drawn) + sum(map(len, left_out.values()))
    print(f"found {len(samples)} images, looked at {looked_at}, "
          f"placed {placed} in {args.root / 'images'}, {len(drawn) - placed} were there")
    report(args.root, splits, unmatched | left_out)


if __name__ == "__main__":
    main()
