"""Judge the training pairs and build the memory bank: for each image and caption, a clean pair that
resembles it.

    python get_memorybank.py --dataset coco --dataset_root PATH --noise_ratio 0.4
    python get_memorybank.py --dataset coco --dataset_root PATH --noise_ratio 0.4 --judge_rounds 2

utils.method.building says how. Banks of different judges lie beside each other.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import command  # isort: skip

from data import training_pairs
from params import parse_args
from utils.distributed import is_main
from utils.files import require_writable
from utils.method.building import build_bank
from utils.method.memorybank import UNWRITABLE, bank_name, bank_path, save_bank
from utils.method.released_bank import save_released
from utils.reading.layout import BANK_FOLDERS
from utils.training.run import Run


@command
def main(argv=None):
    args = parse_args("memorybank", argv)
    run = Run(args)
    model, preprocess = (None, None) if args.judge_features else run.load_model()
    pairs = training_pairs(args, preprocess, run.log)
    released = args.format == "released"
    if is_main():
        ours, theirs = BANK_FOLDERS
        folder = bank_path(args.dataset_root, folder=theirs if released else ours)
        require_writable(folder, UNWRITABLE)
    bank = build_bank(model, pairs, args, run.precision, run.log)
    if not is_main():
        return
    if released:
        paths = save_released(bank, pairs, folder, args.noise_ratio)
    else:
        paths = [folder / bank_name(model, pairs, args)]
        save_bank(bank, pairs, paths[0])
    run.log(f"wrote {' and '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
