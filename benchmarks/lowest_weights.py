"""Draw what TensorBoard shows after each epoch: the pairs to which NPC gave least weight.

    python benchmarks/lowest_weights.py demo/seed0/npc_0.6 --out benchmarks/lowest_weights.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clip
from data import training_pairs
from utils.errors import command
from utils.files import atomic_write, parsing
from utils.scoring.diagnostics import LOWEST, pairs_figure
from utils.training.history import read_weights


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of main_NPC.py")
    parser.add_argument("--out", default="lowest_weights.png", help="PNG to write")
    options = parser.parse_args(argv)
    path = options.run / "options.json"
    with parsing(path, "the options of a run", "give the folder of a run of main_NPC.py"):
        args = argparse.Namespace(**json.loads(path.read_text(encoding="utf-8")))
        args.data_on = "workers"  # ten images are read
        size = clip.architecture(args.vision_model)["image_resolution"]
    pairs = training_pairs(args, clip.Preprocess(size))
    w = read_weights(options.run / "weights.npz", pairs)
    w = w[np.isfinite(w).any(axis=1)][-1]  # the last epoch that is there
    lowest = np.argsort(w, kind="stable")[:LOWEST]  # pairs that were not drawn sort last
    with atomic_write(options.out, "wb") as f:
        pairs_figure(pairs, lowest, w[lowest]).savefig(f, format="png", dpi=100)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
