"""Make the split files of MSCOCO or Flickr30K from Karpathy's dataset_coco.json or
dataset_flickr30k.json (both in his caption_datasets.zip).

`restval` joins the training split, and `val` is written as dev. The first five captions of an image
are kept. MSCOCO's ids are COCO's own; Flickr30K's are line numbers of image_name.txt.

    python dataset/prepare_karpathy.py --json dataset_coco.json --root dataset/MSCOCO
    python dataset/prepare_karpathy.py --json dataset_flickr30k.json --root dataset/Flickr30K
"""

import sys

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from utils.errors import command  # isort: skip

import json

from dataset.common import SPLIT_OF, as_path, inner_name, print_sizes, write_splits
from params import Parser
from utils.cleaning.captions import one_line
from utils.files import new_folder, parsing
from utils.reading.layout import SPLITS, few, image_names, split_folder

CAPTIONS = 5
DATASET_OF = {"coco": "coco", "flickr30k": "f30k"}  # the JSON's name for it: ours


def read_json(path):
    """("coco" or "f30k", images) of Karpathy's JSON. images: a list of (id, split, list of CAPTIONS
    str, number of captions left out). For f30k an id is a file name, and images are in the order of
    their imgid.

    Raises InputError when the file is no such JSON or an image has fewer than CAPTIONS captions.
    """
    with parsing(path, "Karpathy's dataset_coco.json or dataset_flickr30k.json", "take the "
                 "original, or for other data dataset/prepare_pairs.py --split_column split with "
                 "what jq '[.images[] | {image: .filename, caption: [.sentences[].raw], split}]' "
                 "makes of it"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict) or content.get("dataset") not in DATASET_OF:
            raise ValueError("its 'dataset' is neither coco nor flickr30k")
        dataset = DATASET_OF[content["dataset"]]
        images = content["images"]
        if dataset == "f30k":
            images.sort(key=lambda image: image["imgid"])
        result = []
        for image in images:
            key = int(image["cocoid"]) if dataset == "coco" else inner_name(image["filename"])
            captions = [one_line(sentence["raw"]) for sentence in image["sentences"]]
            kept = captions[:CAPTIONS]
            if len(kept) < CAPTIONS or not all(kept):
                raise ValueError(f"{image['filename']} has an empty caption or fewer than "
                                 f"{CAPTIONS}")
            result.append((key, SPLIT_OF[image["split"]], kept, len(captions) - CAPTIONS))
        return dataset, result


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--json", type=as_path, required=True,
                        help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    parser.add_argument("--root", type=as_path, required=True,
                        help="folder of the data set; annotations/scan_split/ is written in it and "
                             "images/ belongs in it")
    args = parser.parse_args(argv)

    dataset, images = read_json(args.json)
    names = [key for key, *_ in images] if dataset == "f30k" else None
    splits = {split: ([], []) for split in SPLITS}
    for line, (key, split, captions, _) in enumerate(images):
        splits[split][0].append(key if dataset == "coco" else line)
        splits[split][1].append(captions)
    files = names or image_names(args.root, dataset, [str(key) for key, *_ in images])
    with new_folder("--root", split_folder(args.root)) as folder:
        write_splits(folder, splits, names)
    print_sizes(args.root, splits)
    print(f"{sum(over for *_, over in images)} captions beyond the first {CAPTIONS} of an image "
          "were left out")
    missing = [name for name in files if not (args.root / "images" / name).is_file()]
    if missing:
        print(f"warning: {len(missing)} of {len(files)} images are not in {args.root / 'images'} "
              f"yet ({few(missing)})")


if __name__ == "__main__":
    main()
