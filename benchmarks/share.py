"""How right the judge's estimate of the share of wrong pairs is, on drawings.

    python benchmarks/share.py --sizes 200 1000 5000 --seeds 3

Prints the mean error of the estimate and its deviation over the seeds of the noise, in percentage
points, by percentile of the mismatches; the standard error that is said; the AUC of the pairs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main_CLIP
from data import training_pairs
from dataset.make_scenes import make_scenes
from params import parse_args
from utils.method.judge import auc_against_mismatches, judge_pairs, wrong_share_by
from utils.training.run import Run

PERCENTILES, RATIOS = (50, 70, 80, 90, 95), (0, 0.2, 0.4, 0.6)
JUDGES = {"good": ("--epochs", "2", "--lr", "1e-3"), "weak": ("--epochs", "1", "--lr", "3e-4"),
          "blind": None}  # how each is trained on drawings of another look


def measure(common, ratio, seed):
    """Errors of the share by percentile, the error that is said, the AUC of one judging: (7,)."""
    args = parse_args("find_noise", [*common, "--judge_lr", "3e-4", "--noise_ratio", str(ratio),
                                     "--seed", str(seed)])
    run = Run(args)
    run.log = lambda _: None
    model, preprocess = run.load_model()
    pairs = training_pairs(args, preprocess, run.log)
    verdict, _ = judge_pairs(model, pairs, args, run.precision, run.log)
    truth = 0 if pairs.wrong is None else pairs.wrong.mean()
    shares = [wrong_share_by(verdict.score, verdict.mismatches, p)[0] for p in PERCENTILES]
    return *np.subtract(shares, truth), verdict.share_error, auc_against_mismatches(verdict)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--seeds", type=int, default=3)
    options, data = parser.parse_args(), ["--dataset", "f30k", "--num_workers", "0"]
    print("| judge, pairs, wrong |", *(f"P{p} |" for p in PERCENTILES), "said | AUC |")
    with tempfile.TemporaryDirectory() as place:
        for size, domain in ((5000, "source"), *((size, "target") for size in options.sizes)):
            make_scenes(f"{place}/{size}{domain}", domain, size // 5, 20, 20, 0)
        for judge, training in JUDGES.items():
            if training:
                main_CLIP.main([*data, "--dataset_root", f"{place}/5000source", "--vision_model",
                                "tiny", "--batch_size", "128", "--checkpoint_path", place,
                                "--experiments", judge, *training])
            model = f"{place}/{judge}/best.pt" if training else "tiny"
            for size in options.sizes:
                common = [*data, "--dataset_root", f"{place}/{size}target", "--vision_model", model]
                for ratio in RATIOS:
                    found = np.array([measure(common, ratio, s) for s in range(options.seeds)])
                    *errors, auc = zip(found.mean(axis=0), found.std(axis=0), strict=True)
                    print(f"| {judge}, {size}, {ratio:.0%} |",
                          *(f"{100 * mean:.1f} ± {100 * std:.1f} |" for mean, std in errors),
                          f"{auc[0]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
