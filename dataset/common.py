"""What the preparation commands share: images, the rows that cannot be used, and the files of a
split.

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

from utils.errors import InputError
from utils.files import atomic_write, new_folder
from utils.reading.layout import SPLITS, split_folder, write_lines, write_split

JPEG = ("JPEG", "MPO")  # an MPO is a JPEG with further pictures behind the first
SPLIT_OF = {"train": "train", "training": "train", "restval": "train", "dev": "dev", "val": "dev",
            "valid": "dev", "validation": "dev", "test": "test", "testing": "test"}


class Unusable(Exception):
    """Why a row or an image cannot be used: a reason, and perhaps the case's details."""


def count_reasons(unusable):
    """How often what is wrong, with an example of the most frequent, as text. unusable: a list of
    (row, reason, detail)."""
    counts = Counter(reason for _, reason, _ in unusable).most_common(5)
    text = "; ".join(f"{count} rows: {reason}" for reason, count in counts)
    examples = [f" (row {row}: {detail})" for row, reason, detail in unusable
                if detail and reason == counts[0][0]]
    return text + (examples or [""])[0]


# ---- images --------------------------------------------------------------------------------------


def inner_name(name):
    """`name` as a plain path below a folder ("a/b.jpg"). Raises ValueError when it leads out of the
    folder or does not fit on a line of UTF-8 text."""
    name.encode()
    if name != name.strip() or not {*"\n\r\0"}.isdisjoint(name):
        raise ValueError(f"image name {name!r} does not fit on a line of image_name.txt")
    plain = os.path.normpath(name).replace(os.sep, "/")
    if os.path.isabs(name) or plain.split("/")[0] in (".", ".."):
        raise ValueError(f"image {name!r} does not lie inside the images folder")
    return plain


def opened(source):
    """PIL image of a path or of bytes."""
    from utils.reading.images import open_image  # with torch, which a --help does without

    return open_image(io.BytesIO(source) if isinstance(source, bytes) else source)


def image_format(source):
    """Format ("JPEG", "PNG", ...) of an image, given as path or bytes, which is decoded in full, as
    training will do. Raises `Unusable` when it cannot be."""
    try:
        if not isinstance(source, bytes) and not os.path.isfile(source):
            raise ValueError("no regular file")  # a pipe would block
        with opened(source) as image:
            image.convert("RGB")
            return image.format
    except Exception as error:  # whatever a decoder stumbles over, the image is no use
        said = " ".join(str(error).split())[:150]
        said = "no image that Pillow knows" if "cannot identify" in said else said
        where = "" if isinstance(source, bytes) else f"{source}: "
        raise Unusable("image cannot be read", where + said) from None


def as_jpeg(source):
    """Bytes of an image (path or bytes) re-encoded as JPEG."""
    buffer = io.BytesIO()
    with opened(source) as image:
        from clip.preprocess import to_8_bit

        to_8_bit(image).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def put_image(source, target, link="hard"):
    """Put an image, a path or bytes, at `target`. Returns False when it is there already.

    link: "hard" (a copy where the file system refuses), "symlink" or "copy"; bytes are written.
    Raises InputError when something else is at `target`, which is never overwritten.
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
    """Let the function `write` put the files of a data set into a folder, which takes its place
    below `root` once the block, which puts the images there, is through.

    Raises InputError when other files are there: noisy captions and memory banks belong to them.
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
    """Say what was written."""
    for split in SPLITS:
        ids, captions = splits[split]
        print(f"{split:>5}: {len(ids):7d} images, {sum(map(len, captions)):7d} captions")
    print(f"written to {split_folder(root)}")
