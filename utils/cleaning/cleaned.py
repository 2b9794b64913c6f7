"""The cleaned data set, and the person's table without wrong pairs: `--write_clean`."""

import itertools
import os
import shlex
from pathlib import Path

import numpy as np

from utils.cleaning.source import SOURCE, copy_cleaned, rows_of
from utils.cleaning.tables import copy_suffix
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
    """Make the data set --write_clean of the pairs that `keep` (n,) bool names, and, where it came
    from a table, `source`, the table without the others. The pairs are those of `splits`; rows
    (n, 2) are where the table has them, or None."""
    few = f"--keep_above {args.keep_above} keeps {keep.sum()} of {len(keep)} pairs; lower it"
    if keep.sum() < 2:
        raise InputError(few)
    with new_folder("--write_clean", args.write_clean) as folder:
        counts = write_subset(pairs, keep, splits, rows, args.dataset_root, folder)
        if [] in counts.values():
            raise InputError(f"{few}: a split would be left with none")
        said = (f"wrote {args.write_clean}: the {keep.sum()} of {len(keep)} pairs that "
                f"--keep_above {args.keep_above} and the labels keep")
        if source:
            others = [split for split in SPLITS if split not in splits]
            table = f"cleaned{copy_suffix(source.table)}"
            captions = [pairs.captions[i] for i in np.flatnonzero(keep)]
            for split in others:
                captions += read_captions(split_folder(args.dataset_root) / f"{split}_caps.txt")
            held = [rows[keep], *(rows_of(args.dataset_root, split) for split in others)]
            number = copy_cleaned(source, folder / table, np.concatenate(held), captions)
            said += (f"\nwrote {Path(args.write_clean) / table}: {number} of the {source.rows} "
                     f"rows of {source.table}, without wrong captions and what could not be used"
                     + (f"; {len(captions) - keep.sum()} captions of {' and '.join(others)} were "
                        "judged by nobody" if others else ""))
    counts = counts.get("train", [1])
    log(f"{said}\ntrain on it with:\n"
        f"  python main_CLIP.py --dataset {args.dataset} --dataset_root "
        f"{shlex.quote(args.write_clean)} --num_anns "
        f"{counts[0] if len(set(counts)) == 1 else 1}")


def write_subset(pairs, keep, splits, rows, dataset_root, target):
    """Make the data set `target` of the pairs of `dataset_root` that `keep` (n,) bool names, which
    are those of `splits`; rows (n, 2) are where the user's table has them, or None. Other splits
    are copies, images/ is a link. Returns {split: number of captions of each image}."""
    source, folder, start, result = split_folder(dataset_root), split_folder(target), 0, {}
    for split in splits:
        length = len(read_lines(source / f"{split}_caps.txt")) if len(splits) > 1 else len(pairs)
        kept = start + np.flatnonzero(keep[start : start + length])
        start += length
        kept = kept[np.argsort(pairs.image_of[kept], kind="stable")]
        images, counts = np.unique(pairs.image_of[kept], return_counts=True)
        captions = iter([pairs.captions[i] for i in kept])
        write_split(folder, split, [pairs.image_ids[k] for k in images],
                    [list(itertools.islice(captions, count)) for count in counts])
        if rows is not None:
            write_lines(folder / f"{split}_rows.txt", (f"{row} {place}" for row, place
                                                       in rows[kept]))
        if length:
            result[split] = counts.tolist()
    for name in ("image_name.txt", SOURCE, *(
            f"{split}_{what}.txt" for split in SPLITS if split not in splits
            for what in ("ids", "caps", "rows"))):
        if (source / name).exists():
            with atomic_write(folder / name, "wb") as f:
                f.write((source / name).read_bytes())
    os.symlink(os.path.realpath(Path(dataset_root) / "images"), Path(target) / "images")
    return result
