"""The cleaned data set, and the user's table without wrong captions: `--write_clean`."""

import itertools
import os
import shlex
from collections import defaultdict
from pathlib import Path

import numpy as np

from utils.cleaning.captions import captions_in
from utils.cleaning.source import SOURCE, rows_of
from utils.cleaning.tables import Shards, read_rows, table_of
from utils.errors import InputError
from utils.files import atomic_write, new_folder
from utils.reading.layout import (
    SPLITS,
    read_captions,
    read_lines,
    split_folder,
    write_lines,
    write_split,
)


def write_clean(args, pairs, keep, splits, rows, source, log):
    """Make the data set --write_clean of the pairs that `keep` (n,) bool keeps. The pairs are those
    of `splits`. If the data set came from a table, `source` is its `Source`, rows (n, 2) are the
    pairs' rows and places there, and the table is written without the other pairs."""
    few = f"--keep_above {args.keep_above} keeps {keep.sum()} of {len(keep)} pairs; lower it"
    if keep.sum() < 2:
        raise InputError(few)
    said = (f"wrote {args.write_clean}: the {keep.sum()} of {len(keep)} pairs that --keep_above "
            f"{args.keep_above} and the labels keep")
    with new_folder("--write_clean", args.write_clean) as folder:
        if not write_subset(pairs, keep, splits, rows, args.dataset_root, folder):
            raise InputError(f"{few}: a split would have no pairs")
        if source:
            captions = [pairs.captions[i] for i in np.flatnonzero(keep)]
            others = [split for split in SPLITS if split not in splits]  # are kept whole
            for split in others:
                captions += read_captions(split_folder(args.dataset_root) / f"{split}_caps.txt")
            held = np.concatenate([rows[keep], rows_of(args.dataset_root, others)])
            name, number = write_table(source, folder, held, captions)
            said += (f"\nwrote {Path(args.write_clean) / name}: {number} of the {source.rows} rows "
                     f"of {source.table}, without wrong captions and rows that could not be used")
            if others:
                said += (f"; {len(captions) - keep.sum()} captions of {' and '.join(others)} were "
                         "not judged")
    log(f"{said}\ntrain on it with:\n  python main_CLIP.py --dataset {args.dataset} "
        f"--dataset_root {shlex.quote(args.write_clean)} --num_anns 1")


def write_table(source, folder, rows, captions):
    """Write the table without wrong captions, and without rows that lose all their captions, into a
    folder, and read it back. Returns its name and its number of rows.

    rows (n, 2), as of `rows_of`, and captions, n str, are those of the pairs that stay. Raises
    InputError when the written table does not hold exactly these.
    """
    keep = defaultdict(dict)  # {row: {place: caption}}
    for (row, place), caption in zip(rows.tolist(), captions, strict=True):
        keep[row][place] = caption
    table = table_of(source.table)
    target = Path(folder) / f"cleaned{table.suffix}"
    table.copy(target, source.caption_column, keep)
    image, caption = ("key", "caption") if isinstance(table, Shards) else source[1:3]
    originals = enumerate(read_rows(source.table, (image, source.caption_column)))
    wanted = ((row[image], [caption for _, caption in sorted(keep[number].items())])
              for number, row in originals if number in keep)
    written = ((row[image], [text for _, text in captions_in(row[caption])])
               if isinstance(row, dict) else row for row in read_rows(target, (image, caption)))
    if any(one != other for one, other in itertools.zip_longest(wanted, written)):
        raise InputError(f"a copy of {source.table} in the same format would not hold the pairs "
                         "that are kept, so none is written; save the table in another format and "
                         "prepare the data set from that")
    return target.name, len(keep)


def write_subset(pairs, keep, splits, rows, dataset_root, target):
    """Make the data set `target` of the pairs that `keep` (n,) bool keeps, among those of `splits`
    of `dataset_root`, with an id for each caption. rows (n, 2): the pairs' rows and places in the
    user's table, or None. The other splits are copied, and images/ is a link. Returns False when
    all pairs of a split would be gone."""
    source, folder, start = split_folder(dataset_root), split_folder(target), 0
    for split in splits:
        length = len(read_lines(source / f"{split}_caps.txt")) if len(splits) > 1 else len(pairs)
        kept = start + np.flatnonzero(keep[start : start + length])
        start += length
        if length and not len(kept):
            return False
        write_split(folder, split, [pairs.image_ids[k] for k in pairs.image_of[kept]],
                    [[pairs.captions[i]] for i in kept])
        if rows is not None:
            write_lines(folder / f"{split}_rows.txt", (f"{row} {place}" for row, place
                                                       in rows[kept]))
    for name in ("image_name.txt", SOURCE, *(
            f"{split}_{what}.txt" for split in SPLITS if split not in splits
            for what in ("ids", "caps", "rows"))):
        if (source / name).exists():
            with atomic_write(folder / name, "wb") as f:
                f.write((source / name).read_bytes())
    os.symlink(os.path.realpath(Path(dataset_root) / "images"), Path(target) / "images")
    return True
