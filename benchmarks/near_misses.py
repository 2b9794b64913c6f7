"""Measures judges where wrong captions are random, and where they are near misses.

    python benchmarks/near_misses.py [--seeds 3]

The demo's pre-trained models judge its drawings (find_noise.py), where random captions and where
similar ones are exchanged. Finished runs are reused.
"""

import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver
from benchmarks.demo import RATIOS
from benchmarks.driver import Job, spread, table
from utils.errors import command

JUDGES = {"initial loss (the paper's)": ("--recipe", "paper"),
          "+ neighbours": ("--judge_rounds", 0),
          "the judge": ("--judge_lr", driver.LR)}  # the rate of the fine-tuning
SAID = {"AUC": (r"AUC ([\d.]+)", 3), "average precision": (r"average precision ([\d.]+)", 3),
        "estimated share of wrong pairs, %": (r"noise share: ([\d.]+) ?%", 1),
        "its standard error, %": (r"noise share: .*?standard error ([\d.]+)", 1)}


def judged(folder, name, kind, ratio):
    """Folder of a judge's run."""
    return folder / "near_misses" / f"{[*JUDGES].index(name)}_{kind}_{ratio}"


def judging(folder, seed, name, kind, ratio):
    """The `Job` that ranks the pairs of the drawings."""
    out = judged(folder, name, kind, ratio)
    options = ("--dataset", "f30k", "--dataset_root", folder / driver.DRAWN, "--vision_model",
               folder / "pretrained" / "best.pt", "--seed", seed, "--device", "cpu",
               "--num_workers", 0, "--batch_size", driver.BATCH, "--noise_kind", kind,
               "--noise_ratio", ratio, "--worst", 1, "--out", out, *JUDGES[name])
    return Job(f"seed {seed}, {ratio:.0%} {kind}, {name}", out, [("find_noise.py", *options)])


def report(folders, noise):
    """The tables as text. noise: [(kind, ratio)]."""

    def said(name, kind, ratio, pattern):
        """The numbers that the judge printed, of each seed; none where it prints no such number."""
        texts = [(judged(folder, name, kind, ratio) / "output.txt").read_text()
                 for folder in folders]
        return [float(match[1]) for match in (re.search(pattern, text) for text in texts) if match]

    columns = [f"{kind}, {ratio:.0%}" if ratio else "0%" for kind, ratio in noise]
    tables = [table([what, *columns], [
        [name, *(spread(values, digits) if values else "–"
                 for values in (said(name, *column, pattern) for column in noise))]
        for name in JUDGES]) for what, (pattern, digits) in SAID.items()]
    return "\n\n".join(tables) + "\n"


@command
def main():
    parser = driver.options_of(__doc__)
    parser.add_argument("--noise", nargs="+", type=float, default=RATIOS, help="noise ratios")
    args, start = parser.parse_args(), time.perf_counter()
    folders = [args.out / f"seed{seed}" for seed in range(args.seeds)]
    noise = [(kind, ratio) for kind in ("random", "similar") for ratio in args.noise
             if ratio or kind == "random"]
    driver.run_jobs([driver.pretraining(folder, seed) for seed, folder in enumerate(folders)],
                    args.jobs)
    driver.run_jobs([judging(folder, seed, name, *column) for seed, folder in enumerate(folders)
                     for name in JUDGES for column in noise], args.jobs)
    driver.write_report(args.out / "near_misses.md", report(folders, noise), start)


if __name__ == "__main__":
    main()
