"""Put the MSCOCO 2014 images into one folder, under the names that training reads.

    DIR/images/train2014/COCO_train2014_000000000009.jpg  ->  DIR/images/COCO_2014_000000000009.jpg

train2014/ and val2014/ may lie in DIR/images/ or in DIR/, or their images directly in DIR/images/.
Files are moved and never overwritten. After an interruption, run the command again.

    python dataset/MSCOCO_rename.py --root dataset/MSCOCO --dry_run
    python dataset/MSCOCO_rename.py --root dataset/MSCOCO
"""

import sys

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from utils.errors import InputError, command  # isort: skip

import os
import re

from dataset.common import as_path
from params import Parser
from utils.progress import progress
from utils.reading.layout import few

FOLDERS = ("images/train2014", "images/val2014", "train2014", "val2014", "images")
ORIGINAL = re.compile(r"COCO_(?:train|val)2014_(\d{12})\.jpg")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", type=as_path, required=True,
                        help="folder of the data set, which has or gets images/")
    parser.add_argument("--dry_run", action="store_true",
                        help="print what would be moved, and move nothing")
    args = parser.parse_args(argv)

    images = args.root / "images"
    moves = [(path, images / f"COCO_2014_{match[1]}.jpg") for part in FOLDERS
             for path in sorted((args.root / part).glob("*.jpg"))
             if (match := ORIGINAL.fullmatch(path.name))]
    if not moves and not any(images.glob("COCO_2014_*.jpg")):
        raise InputError(f"no COCO_train2014_*.jpg or COCO_val2014_*.jpg in {args.root}; unpack "
                         f"train2014.zip and val2014.zip in it, or in one of {', '.join(FOLDERS)}")
    moved, left = 0, []
    for source, target in progress(moves, desc="moving"):
        if os.path.lexists(target):
            left.append(source)
        elif args.dry_run:
            moved += 1
        else:
            images.mkdir(exist_ok=True)
            os.rename(source, target)
            moved += 1
    for source, target in moves[:3] if args.dry_run else ():
        print(f"{source} -> {target}")
    print(f"{'would move' if args.dry_run else 'moved'} {moved} images to {images}")
    if left:
        print(f"left {len(left)} images whose new name is taken ({few(left)})")


if __name__ == "__main__":
    main()
