"""How right the judge's estimate of the share of wrong pairs is, on drawings.

    python benchmarks/share.py --sizes 200 1000 5000 --seeds 3

For each judge, number of pairs and share of wrong captions: mean error of the estimate and its
standard deviation over the noise's seeds, in percentage points, for several percentiles of the
mismatches; the standard error that the judge states; the AUC of the pairs against the mismatches.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main_CLIP
from data import training_pairs
from dataset import make_scenes
from params import parse_args
from utils.method.judge import auc_against_mismatches, wrong_share_by
from utils.method.rounds import judge_pairs
from utils.training.run import Run

PERCENTILES, RATIOS = (50, 70, 80, 90, 95), (0, 0.2, 0.4, 0.6)
JUDGES = {"good": ("--epochs", "2", "--lr", "1e-3"), "weak": ("--epochs", "1", "--lr", "3e-4"),
          "blind": None}  # how each is trained on drawings of another look


def draw(folder, domain, pairs):
    """Make a data set of so many pairs in `folder`."""
    sys.argv = ["make_scenes.py", "--out", str(folder), "--domain", domain, "--train",
                str(pairs // 5), "--dev", "20", "--test", "20"]
    make_scenes.main()


def measure(root, model, ratio, seed):
    """Errors of the estimated share by percentile, stated error, AUC of one judging: (7,)."""
    args = parse_args("find_noise", ["--dataset", "f30k", "--dataset_root", str(root), "--seed",
                                     str(seed), "--noise_ratio", str(ratio), "--vision_model",
                                     str(model), "--judge_lr", "3e-4", "--num_workers", "0"])
    run = Run(args)
    run.log = lambda _: None
    model, preprocess = run.load_model()
    pairs = training_pairs(args, preprocess, run.log)
    verdict, _ = judge_pairs(model, pairs, args, run.precision, run.log)
    shares = [wrong_share_by(verdict.score, verdict.mismatches, p)[0] for p in PERCENTILES]
    truth = 0 if pairs.wrong is None else pairs.wrong.mean()
    return *np.subtract(shares, truth), verdict.share_error, auc_against_mismatches(verdict)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        place, models = Path(place), {}
        draw(place / "source", "source", 5000)
        for judge in options.judges:
            models[judge] = place / judge / "best.pt" if JUDGES[judge] else "tiny"
            if JUDGES[judge]:
                main_CLIP.main([
                    "--dataset", "f30k", "--dataset_root", str(place / "source"), "--vision_model",
                    "tiny", "--batch_size", "128", "--checkpoint_path", str(place),
                    "--experiments", judge, *JUDGES[judge]])
        columns = [*(f"P{p}" for p in PERCENTILES), "stated", "AUC"]
        print("\n| judge, pairs, wrong | " + " | ".join(columns) + " |\n" + "| --: " * 8 + "|")
        for size in options.sizes:
            draw(place / str(size), "target", size)
            for judge, model in models.items():
                for ratio in RATIOS:
                    found = np.array([measure(place / str(size), model, ratio, seed)
                                      for seed in range(options.seeds)])
                    errors = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in zip(
                        found.mean(axis=0), found.std(axis=0), strict=True)]
                    print(f"| {judge}, {size}, {ratio:.0%} |", " | ".join(errors[:-1]),
                          f"| {found.mean(axis=0)[-1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
