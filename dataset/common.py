"""What the preparation commands share: reading and placing images, and the files of a split.

A split is (ids, captions): one id per image and, per image, its list of captions.
"""

import contextlib
import filecmp
import io
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from params import path
from utils.errors import InputError
from utils.files import atomic_write, new_folder
from utils.reading.images import open_image
from utils.reading.layout import SPLITS, split_folder, write_lines, write_split

JPEG = ("JPEG", "MPO")  # an MPO is a JPEG with further pictures behind the first
SPLIT_OF = {"train": "train", "training": "train", "restval": "train", "dev": "dev", "val": "dev",
            "valid": "dev", "validation": "dev", "test": "test", "testing": "test"}


def as_path(text):
    """An argparse type: a path with ~ expanded, as `Path`."""
    return Path(path(text))


class Unusable(Exception):
    """A row or an image cannot be used: the reason and, optionally, details."""


def count_reasons(unusable):
    """Text that counts the reasons in a list of (row, reason, detail), with an example of the most
    frequent one."""
    counts = Counter(reason for _, reason, _ in unusable).most_common(5)
    text = "; ".join(f"{count} rows: {reason}" for reason, count in counts)
    examples = [f" (row {row}: {detail})" for row, reason, detail in unusable
                if detail and reason == counts[0][0]]
    return text + (examples or [""])[0]


# ---- images --------------------------------------------------------------------------------------


def inner_name(name):
    """`name` as a plain path below a folder ("a/b.jpg"). Raises ValueError when the path leads out
    of the folder or does not fit on a line of UTF-8 text."""
    name.encode()
    if name != name.strip() or not {*"\n\r\0"}.isdisjoint(name):
        raise ValueError(f"image name {name!r} does not fit on a line of image_name.txt")
    plain = os.path.normpath(name)
    if os.path.isabs(name) or plain.split("/")[0] in (".", ".."):
        raise ValueError(f"image {name!r} does not lie inside the images folder")
    return plain


def image_format(source):
    """Format ("JPEG", "PNG", ...) of an image, a path or bytes, which is decoded in full, as in
    training. Raises `Unusable` when it cannot be decoded."""
    try:
        if not isinstance(source, bytes) and not os.path.isfile(source):
            raise ValueError("no regular file")  # opening a pipe would block
        with open_image(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.convert("RGB")
            return image.format
    except Exception as error:  # decoders raise almost anything on broken images
        said = " ".join(str(error).split())[:150]
        said = "no image that Pillow knows" if "cannot identify" in said else said
        where = "" if isinstance(source, bytes) else f"{source}: "
        raise Unusable("image cannot be read", where + said) from None


def put_image(source, target, link="hard"):
    """Put an image, a path or bytes, at `target`. Returns False when it is there already.

    link, for a path: "hard" (a copy where the file system refuses links), "symlink" or "copy".
    Raises InputError when something else is at `target`; it is not overwritten.
    """
    target = Path(target)
    if os.path.lexists(target):
        if target.is_file() and (target.read_bytes() == source if isinstance(source, bytes)
                                 else filecmp.cmp(source, target, shallow=False)):
            return False
        raise InputError(f"{target} exists and is not the same image; move it away or choose "
                         "another --root")
    target.parent.mkdir(parents=True, exist_ok=True)
    if link == "symlink" and not isinstance(source, bytes):
        os.symlink(os.path.realpath(source), target)
        return True
    if link == "hard" and not isinstance(source, bytes):
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            os.link(os.path.realpath(source), target)
            return True
    with (io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as original,
          atomic_write(target, "wb") as f):
        shutil.copyfileobj(original, f)
    return True


# ---- splits --------------------------------------------------------------------------------------


def write_splits(folder, splits, names=None):
    """Write the id and caption files of `splits` {"train" | "dev" | "test": split} to a folder, and
    image_name.txt when `names` are given."""
    if names is not None:
        write_lines(Path(folder) / "image_name.txt", names)
    for split in SPLITS:
        write_split(folder, split, *splits[split])


@contextlib.contextmanager
def new_split(root, write):
    """Make the split files of the data set `root`: `write(folder)` writes them into a folder, which
    takes its place below `root` after the block. The block places the images.

    Raises InputError when other split files are there: noisy captions and memory banks belong to
    them.
    """
    target = split_folder(root)
    with tempfile.TemporaryDirectory() as new:
        write(new)
        files = os.listdir(new)
        if len(filecmp.cmpfiles(new, target, files, shallow=False)[0]) == len(files):
            yield
            return
    with new_folder("--root", target) as folder:
        write(folder)
        yield


def print_sizes(root, splits):
    """Print how many images and captions each split has, and where they are."""
    for split in SPLITS:
        ids, captions = splits[split]
        print(f"{split:>5}: {len(ids):7d} images, {sum(map(len, captions)):7d} captions")
    print(f"written to {split_folder(root)}")
