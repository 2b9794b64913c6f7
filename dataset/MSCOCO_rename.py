"""Put the MSCOCO 2014 images into one folder, under the names that the training reads.

    DIR/images/train2014/COCO_train2014_000000000009.jpg  ->  DIR/images/COCO_2014_000000000009.jpg

train2014/ and val2014/ may lie in DIR/images/ or in DIR/, or their images directly in DIR/images/.
Files are moved, never overwritten; a run that was stopped is simply run again.

    python dataset/MSCOCO_rename.py --root dataset/MSCOCO --dry_run
    python dataset/MSCOCO_rename.py --root dataset/MSCOCO
"""

import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.common import Parser, few, same_content
from utils.errors import InputError, command

FOLDERS = ("images/train2014", "images/val2014", "train2014", "val2014", "images")
ORIGINAL = re.compile(r"COCO_(?:train|val)2014_(\d{12})\.jpg")
RENAMED = re.compile(r"COCO_2014_\d{12}\.jpg")
IMAGES = 82783 + 40504  # train2014 and val2014


def find_moves(root):
    """Moves to make: a list of (source, target), sorted; and the names of files that are not ours.

    Raises InputError when no folder is there.
    """
    folders = [root / name for name in FOLDERS if (root / name).is_dir()]
    if not folders:
        raise InputError(f"--root {root} has none of the folders {', '.join(FOLDERS)}; unpack "
                         "train2014.zip and val2014.zip there")
    moves, foreign = [], []
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            if match := ORIGINAL.fullmatch(name):
                moves.append((folder / name, root / "images" / f"COCO_2014_{match[1]}.jpg"))
            elif (folder / name).is_file() and not RENAMED.fullmatch(name):
                foreign.append(folder / name)
    return moves, foreign


def plan(moves):
    """Split moves into those to make and sources whose content is at its target already.

    Raises InputError, before anything is moved, when two different images claim one target.
    """
    free, done, taken, claimed = [], [], [], {}
    for source, target in tqdm(moves, desc="checking", disable=None):
        holder = target if os.path.lexists(target) else claimed.get(target)
        if holder is None:
            claimed[target] = source
            free.append((source, target))
        elif holder.is_file() and same_content(source, holder):
            done.append(source)
        else:
            taken.append(f"{source} -> {target}")
    if taken:
        raise InputError(f"{len(taken)} images would overwrite another one: {few(taken)}; "
                         "nothing was moved; remove the wrong one of each")
    return free, done


@command
def main(argv=None):
    """Command line of the module. Raises SystemExit with status 2 on bad input."""
    parser = Parser(__doc__)
    parser.add_argument("--root", type=Path, required=True,
                        help="folder of the data set, which has or gets images/ (no default)")
    parser.add_argument("--dry_run", action="store_true",
                        help="say what would be moved and change nothing (default: move); use it "
                             "first when you are not sure of --root")
    args = parser.parse_args(argv)

    moves, foreign = find_moves(args.root)
    free, done = plan(moves)
    images = args.root / "images"
    before = sum(bool(RENAMED.fullmatch(path.name)) for path in images.glob("*.jpg"))
    if not moves and not before:
        raise InputError(f"no COCO_train2014_*.jpg or COCO_val2014_*.jpg in {args.root}; expected "
                         f"them in one of {', '.join(FOLDERS)}")
    try:
        if not args.dry_run:
            images.mkdir(exist_ok=True)
            for source, target in tqdm(free, desc="moving", disable=None):
                os.rename(source, target)
    except OSError as error:
        raise InputError(f"cannot move {error.filename} to {images}: {error.strerror}; both must "
                         "be on one disk and writable; then run again") from None

    for source, target in free[:3] if args.dry_run else ():
        print(f"{source} -> {target}")
    print(f"{'would move' if args.dry_run else 'moved'} {len(free)} images to {images}, "
          f"{before} were there")
    if done:
        print(f"left {len(done)} files whose content is there already ({few(done)})")
    if foreign:
        print(f"left {len(foreign)} other files ({few(foreign)})")
    if before + len(free) != IMAGES:
        print(f"note: {before + len(free)} images in all; train2014 and val2014 have {IMAGES}")


if __name__ == "__main__":
    main()
