"""The folder layout of the released data: where each file lies, how its lines are read and written.

    ROOT/annotations/scan_split/    {split}_ids.txt  {split}_caps.txt  image_name.txt
                                    {ratio}_noise_train_caps.txt
    ROOT/annotations/frozen_memory_bank/   (also read from annotations/memory_bank/)
    ROOT/images/

`train_ids.txt` has one id per image and `train_caps.txt` num_anns lines per image in that order;
`dev_ids.txt` and `test_ids.txt` have one id per caption.
"""

import os
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write, parsing

SPLITS = ("train", "dev", "test")
BANK_FOLDERS = ("frozen_memory_bank", "memory_bank")  # ours and their README's; their code's
DATASETS = {  # captions per id in train_caps.txt; None: as many as the two files add up to
    "coco": 5,  # MSCOCO
    "f30k": 5,  # Flickr30K
    "cc": 1,  # CC120K
    "pairs": None,  # any collection with an image_name.txt (dataset/prepare_pairs.py)
}
DATA_SET = "a folder with annotations/scan_split/ and images/ (dataset/README.md)"


def split_folder(root):
    """Folder of the caption and id files below the data set `root`."""
    return Path(root) / "annotations" / "scan_split"


def require_dataset(root):
    """Raise InputError unless the folder `root` has the parts of a data set."""
    for folder in (split_folder(root), Path(root) / "images"):
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist or is no folder; --dataset_root must be "
                             f"{DATA_SET}")


def read_lines(path):
    """Lines of a UTF-8 text file as a list of str, each stripped of white space at both ends.
    Raises InputError when the file is absent or not UTF-8."""
    with parsing(path, "a text file", f"--dataset_root must be {DATA_SET}"):
        try:
            text = Path(path).read_text("utf-8-sig")  # some editors write a byte order mark
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise InputError(f"{path}, line {line}: not valid UTF-8; re-encode the file") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def read_captions(path):
    """Captions of a file, one a line. Raises InputError when a line, or the file, is empty."""
    captions = read_lines(path)
    empty = [i + 1 for i, caption in enumerate(captions) if not caption]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise InputError(f"{path}, line {empty[0]}{more}: empty caption; every line must hold one")
    if not captions:
        raise InputError(f"{path} holds no captions")
    return captions


def read_ids(root, split, num_captions, num_anns, caption_file):
    """Image id of each caption of a split: list of str, `num_captions` long.

    In the training split each id of the file stands for `num_anns` captions (None: as many as the
    two files add up to); in the other splits it stands for one. Raises InputError, with the
    num_anns that would fit, when ids and captions do not add up.
    """
    path = split_folder(root) / f"{split}_ids.txt"
    ids = read_lines(path)
    for i, image_id in enumerate(ids):
        if not image_id:
            raise InputError(f"{path}, line {i + 1}: empty id; every line must hold one")
    repeat = num_anns if split == "train" else 1
    if repeat is None:
        repeat = max(1, num_captions // max(1, len(ids)))
    if len(ids) * repeat != num_captions:
        fits = ids and num_captions % len(ids) == 0
        advice = (f"--num_anns {num_captions // len(ids)} would fit" if split == "train" and fits
                  else "one of the two files is cut short or belongs to another data set")
        raise InputError(f"{path} has {len(ids)} lines and {caption_file} has {num_captions}, but "
                         f"{repeat} caption{'s' * (repeat > 1)} an id were expected; {advice}")
    return [image_id for image_id in ids for _ in range(repeat)]


def first_seen(items):
    """(distinct items in order of first appearance, (n,) int64 row of each item among them)."""
    rows = {}
    index = np.fromiter((rows.setdefault(item, len(rows)) for item in items), np.int64, len(items))
    return list(rows), index


def image_names(root, dataset, ids):
    """File names, below ROOT/images, of a list of image ids (str); same length.

    `coco`: COCO_2014_, the id in 12 digits, .jpg; `f30k` and `pairs`: line id (0-based) of
    image_name.txt; `cc`: the id and .jpg. Raises InputError for an id that fits none of these and
    for a name that leaves the images folder.
    """
    if dataset == "cc":
        for image_id in ids:
            if "/" in image_id:
                raise InputError(f"image id '{image_id}' in {split_folder(root)} is no file name")
        return [f"{i}.jpg" for i in ids]
    path = split_folder(root) / "image_name.txt"
    names = None if dataset == "coco" else read_lines(path)
    for line, name in enumerate(names or [], 1):
        if not name or os.path.isabs(name) or ".." in name.split("/"):
            raise InputError(f"{path}, line {line}: '{name}' is not a file name inside the images "
                             "folder")
    result = []
    for image_id in ids:
        if not (image_id.isascii() and image_id.isdigit() and len(image_id) < 20):
            raise InputError(f"image id '{image_id}' in {split_folder(root)} is not a number, "
                             f"which --dataset {dataset} expects; is --dataset right?")
        if names is None:
            result.append(f"COCO_2014_{int(image_id):012d}.jpg")
        elif int(image_id) < len(names):
            result.append(names[int(image_id)])
        else:
            raise InputError(f"{path} has {len(names)} lines, but there is an id {image_id}")
    return result


def find_images(root, names):
    """File names below ROOT/images, as they are on disk, of a list of image names; same length.

    A name that is no file stands for the one file that differs from it only in its Unicode form or
    in white space at its ends. Raises InputError, with a count and the first few names, when images
    are missing.
    """
    require_dataset(root)
    folder = Path(root) / "images"
    here = set(os.listdir(folder))
    # unlike Path.is_file, os.path.isfile takes names of any length
    absent = {name for name in names if name not in here and not os.path.isfile(folder / name)}
    if not absent:
        return names
    alike = files_by_spelling(folder)
    found = {name: files[0] for name in absent if len(files := alike[spelling(name)]) == 1}
    missing = [name for name in dict.fromkeys(names) if name in absent - found.keys()]
    if missing:
        raise InputError(f"{len(missing)} images are missing from {folder}: {few(missing)}")
    return [found.get(name, name) for name in names]


def spelling(name):
    """A file name without what two spellings of it may differ in: the Unicode form, and white space
    at its ends."""
    return unicodedata.normalize("NFC", name).strip()


def files_by_spelling(folder):
    """Dict from a `spelling` to the list of files below `folder`, relative to it, that have it; []
    for any other."""
    found = defaultdict(list)
    for parent, _, files in os.walk(folder):
        for file in files:
            path = os.path.relpath(os.path.join(parent, file), folder)
            found[spelling(path)].append(path)
    return found


def few(names, most=3):
    """The first names of a list as text: "a, b, c, ..."."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def find_by_ratio(folder, suffix, ratio):
    """Path of the file `{ratio}{suffix}` in `folder`, however the number is spelled (0, 0.0, 0.20);
    None when there is none."""
    matches = []
    for path in sorted(Path(folder).glob(f"*{suffix}")):
        try:
            if float(path.name[: -len(suffix)]) == float(ratio):
                matches.append(path)
        except ValueError:
            continue
    canonical = Path(folder) / f"{ratio_name(ratio)}{suffix}"
    return canonical if canonical in matches else (matches[0] if matches else None)


def ratio_name(ratio):
    """A noise ratio as we write it, in one spelling with all its digits: 0.2 for 0.20."""
    return repr(abs(float(ratio))).removesuffix(".0")


def write_split(folder, split, image_ids, captions):
    """Write `{split}_ids.txt` and `{split}_caps.txt` to a folder.

    image_ids: one id (str or int) per image. captions: per image, a list of str. If all training
    images have the same number of captions, train_ids.txt has one line per image. Otherwise, and in
    dev and test, there is one id line per caption (read back with num_anns 1).
    """
    one_id_per_image = split == "train" and len({len(c) for c in captions}) == 1
    write_lines(Path(folder) / f"{split}_ids.txt",
                [i for i, own in zip(image_ids, captions, strict=True)
                 for _ in range(1 if one_id_per_image else len(own))])
    write_lines(Path(folder) / f"{split}_caps.txt", [c for own in captions for c in own])


def write_lines(path, lines):
    """Write one item a line."""
    with atomic_write(path) as f:
        f.writelines(f"{line}\n" for line in lines)
