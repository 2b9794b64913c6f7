"""What the preparation commands share: captions, images, and writing the layout of utils/layout.py.

A prepared data set is a dict `splits`: {"train" | "dev" | "test": (ids, captions)}, with one id per
image and, per image, its list of captions.
"""

import argparse
import contextlib
import filecmp
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from PIL import Image

import params
from clip.preprocess import check_usable, to_8_bit
from utils.errors import InputError
from utils.files import atomic_write
from utils.reading.layout import MAX_LINE, SPLITS, split_folder, write_image_names, write_split

JPEG = ("JPEG", "MPO")  # an MPO is a JPEG with further pictures behind the first


def clean(text):
    """One line of plain text: runs of white space, line ends and NUL become one blank each. It ends
    where a line would be too long to be read again, which is far beyond 77 tokens."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of characters
    line = " ".join(text.replace("\0", " ").split())
    return line.encode()[: MAX_LINE - 1].decode(errors="ignore").rstrip()


def few(names, most=3):
    """The first names of a list as text: "a, b, c, ..."."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


class Parser(params.Parser):
    """The other commands' parser, which shows a script's docstring as it stands."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text):
    """argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "number of at least 1"  # argparse names the type in its message


def read_text(path, option):
    """Text of a UTF-8 file, with or without byte order mark and with the line ends it has."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {option} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path}, byte {error.start + 1}: not valid UTF-8; re-encode the "
                         "file") from None


def is_surrogate(character):
    """Whether a character is half of one, which UTF-8 cannot hold (a name that is not UTF-8)."""
    return "\ud800" <= character <= "\udfff"


def inner_name(name, where):
    """`name` as a plain path below a folder ("a/b.jpg"). `where` says for the error what names it.

    Raises InputError when it is empty, leads out of the folder, or does not fit on a line of text.
    """
    if name != name.strip() or not {*"\n\r\0"}.isdisjoint(name) or any(map(is_surrogate, name)):
        raise InputError(f"{where}: image name {name!r} has characters that a line of "
                         "image_name.txt cannot hold; rename the file")
    plain = os.path.normpath(name).replace(os.sep, "/") if name else "."
    if os.path.isabs(name) or plain.split("/")[0] in (".", ".."):
        raise InputError(f"{where}: image {name!r} does not lie inside the images folder; give its "
                         "path relative to that folder")
    return plain


def image_format(source):
    """Format ("JPEG", "PNG", ...) of an image, given as path or bytes; None when it cannot be used.

    It is decoded in full, as training will do. Decompression bombs count as unusable.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                check_usable(image)
                image.convert("RGB")
                return image.format
    except Exception:  # whatever a decoder stumbles over, the image is no use
        return None


def as_jpeg(source):
    """Bytes of an image (path or bytes) re-encoded as JPEG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            to_8_bit(image).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def same_content(source, target):
    """Whether the file `target` holds what `source`, a path or bytes, holds."""
    if isinstance(source, bytes):
        return os.path.getsize(target) == len(source) and Path(target).read_bytes() == source
    return os.path.samefile(source, target) or filecmp.cmp(source, target, shallow=False)


def place(source, target, link="hard"):
    """Put an image, a path or bytes, at `target`. Returns False when it is there already.

    link: "hard" (a copy where the file system refuses), "symlink" or "copy"; bytes are written.
    Raises InputError when something else is at `target`, which is never overwritten.
    """
    target = Path(target)
    if os.path.lexists(target):
        if target.is_file() and same_content(source, target):
            return False
        raise InputError(f"{target} exists and is not the same image; move it away or choose "
                         "another --root")
    if isinstance(source, bytes):
        with atomic_write(target, "wb") as f:
            f.write(source)
        return True
    real = os.path.realpath(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link == "symlink":
            os.symlink(real, target)
            return True
    except OSError as error:
        raise InputError(f"cannot make {target}: {error.strerror}; choose a --root that you may "
                         "write to") from None
    if link == "hard":
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            os.link(real, target)
            return True
    with open(real, "rb") as original, atomic_write(target, "wb") as f:
        shutil.copyfileobj(original, f)
    return True


def write_layout(root, splits, names=None):
    """Write the id and caption files of `splits`, and image_name.txt when `names` are given."""
    if names is not None:
        write_image_names(root, names)
    for split in SPLITS:
        write_split(root, split, *splits[split])


def check_layout(root, splits, names=None):
    """Raise InputError when `write_layout` would replace a file by another content.

    Noisy captions and memory banks are made from these files and would no longer fit them.
    """
    with tempfile.TemporaryDirectory() as staging:
        write_layout(staging, splits, names)
        new = {path.name: path.read_bytes() for path in sorted(split_folder(staging).iterdir())}
    folder = split_folder(root)
    other = [name for name, data in new.items()
             if (folder / name).exists() and (folder / name).read_bytes() != data]
    if other:
        raise InputError(f"{folder} holds another split already ({', '.join(other)} differ); move "
                         "that folder away, with the files made from it, or choose another --root")


def report(root, splits, left_out):
    """Print what was written and left out. left_out: {reason: list of names}."""
    for reason, names in left_out.items():
        if names:
            print(f"left out: {len(names)} {reason} ({few(names)})")
    for split in SPLITS:
        ids, captions = splits[split]
        print(f"{split:>5}: {len(ids):7d} images, {sum(map(len, captions)):7d} captions")
    print(f"written to {split_folder(root)}")
