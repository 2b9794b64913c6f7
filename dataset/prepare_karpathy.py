"""Make the split files of MSCOCO or Flickr30K from Karpathy's dataset_coco.json or
dataset_flickr30k.json (both in his caption_datasets.zip).

`restval` joins the training split and `val` is written as dev; every image has its first five
captions. MSCOCO's ids are COCO's own; Flickr30K's are line numbers of image_name.txt.

    python dataset/prepare_karpathy.py --json dataset_coco.json --root dataset/MSCOCO
    python dataset/prepare_karpathy.py --json dataset_flickr30k.json --root dataset/Flickr30K
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.common import (
    Parser,
    check_layout,
    clean,
    few,
    inner_name,
    read_text,
    report,
    write_layout,
)
from utils.errors import InputError, command
from utils.reading.layout import SPLITS, image_names

CAPTIONS = 5
SPLIT_OF = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
DATASET_OF = {"coco": "coco", "flickr30k": "f30k"}  # the JSON's name for it: ours


def read_json(path, dataset):
    """Images (list of dict) of Karpathy's JSON and the data set, "coco" or "f30k".

    dataset: what --dataset said, or None to take it from the file. Raises InputError when the file
    is not such a JSON or is of another data set.
    """
    try:
        content = json.loads(read_text(path, "--json"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); is the download whole?") from None
    if not (isinstance(content, dict) and isinstance(content.get("images"), list)):
        raise InputError(f"{path} has no list 'images'; expected Karpathy's dataset_coco.json or "
                         "dataset_flickr30k.json")
    if not content["images"]:
        raise InputError(f"{path}: the list 'images' is empty; is the download whole?")
    named = content.get("dataset")
    inferred = DATASET_OF.get(named) if isinstance(named, str) else None
    if dataset and inferred and dataset != inferred:
        raise InputError(f"--dataset {dataset}, but {path} says that it is {named!r}; leave out "
                         "--dataset or give the other file")
    if not (dataset or inferred):
        raise InputError(f"{path} says that its dataset is {named!r}; give --dataset coco or f30k")
    return content["images"], dataset or inferred


def read_images(path, images, dataset):
    """Per image its id or name, split and captions: list of (int | str, str, list of CAPTIONS str).

    Images of f30k come in the order of their imgid, others in that of the file. Raises InputError
    on an incomplete entry, an empty caption, too few captions, or an image that occurs twice.
    """
    result, short, seen = [], [], set()
    number = "cocoid" if dataset == "coco" else "imgid"
    for i, image in enumerate(tqdm(images, desc="reading", disable=None)):
        where = f"{path}, image {i + 1}"
        try:
            key, name, split = image[number], image["filename"], image["split"]
            raw = [sentence["raw"] for sentence in image["sentences"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: incomplete entry ({error}); expected {number}, filename, "
                             "split and sentences with raw") from None
        where += f" ({name})"
        if not (type(key) is int and key >= 0 and isinstance(name, str)
                and all(isinstance(caption, str) for caption in raw)):
            raise InputError(f"{where}: {number} must be a number, filename and raw must be text")
        if not (isinstance(split, str) and split in SPLIT_OF):
            raise InputError(f"{where}: unknown split {split!r}; expected one of "
                             f"{', '.join(SPLIT_OF)}")
        if dataset == "f30k":
            name = inner_name(name, where)
        if seen & {key, name}:
            raise InputError(f"{where}: {number} {key} or its filename occurs twice; take the "
                             "original file")
        seen |= {key, name}
        captions = [clean(caption) for caption in raw[:CAPTIONS]]
        if not all(captions):
            raise InputError(f"{where}: caption {captions.index('') + 1} is empty; correct it or "
                             "take the original file")
        if len(captions) < CAPTIONS:
            short.append(name)
        result.append((key, name, SPLIT_OF[split], captions))
    if short:
        raise InputError(f"{path}: {len(short)} images have fewer than {CAPTIONS} captions "
                         f"({few(short)}); for such data use dataset/prepare_pairs.py")
    if dataset == "f30k":
        result.sort()
    return [(key if dataset == "coco" else name, split, captions)
            for key, name, split, captions in result]


@command
def main(argv=None):
    """Command line of the module. Raises SystemExit with status 2 on bad input."""
    parser = Parser(__doc__)
    parser.add_argument("--json", type=Path, required=True,
                        help="Karpathy's dataset_coco.json or dataset_flickr30k.json (no default)")
    parser.add_argument("--root", type=Path, required=True,
                        help="folder of the data set; annotations/scan_split/ is written in it and "
                             "images/ belongs in it (no default)")
    parser.add_argument("--dataset", choices=("coco", "f30k"),
                        help="how images are named (default: what the JSON says it is); needed "
                             "only for a JSON without the key 'dataset'")
    args = parser.parse_args(argv)

    entries, dataset = read_json(args.json, args.dataset)
    images = read_images(args.json, entries, dataset)
    names = [key for key, _, _ in images] if dataset == "f30k" else None
    splits = {split: ([], []) for split in SPLITS}
    for line, (key, split, captions) in enumerate(images):
        splits[split][0].append(key if dataset == "coco" else line)
        splits[split][1].append(captions)
    for split in SPLITS:
        if not splits[split][0]:
            raise InputError(f"{args.json} has no images of the {split} split; take the original "
                             "file")
    check_layout(args.root, splits, names)
    write_layout(args.root, splits, names)

    cut = sum(len(image["sentences"]) - CAPTIONS for image in entries)
    report(args.root, splits, {})
    print(f"{cut} captions beyond the first {CAPTIONS} of an image were left out")
    ids = [str(i) for split in SPLITS for i in splits[split][0]]
    missing = [name for name in image_names(args.root, dataset, ids)
               if not (args.root / "images" / name).is_file()]
    if missing:
        print(f"warning: {len(missing)} of {len(ids)} images are not in {args.root / 'images'} yet "
              f"({few(missing)})")
    else:
        print(f"all {len(ids)} images are in {args.root / 'images'}")


if __name__ == "__main__":
    main()
