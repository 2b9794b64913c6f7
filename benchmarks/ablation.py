"""Measures what each part of the method brings, and what simpler methods do, on the demo's data.

    python benchmarks/ablation.py [--seeds 3] [--only robust passes]

Every row fine-tunes the demo's pre-trained models at each noise ratio. The learning rate of a row
is the one of a grid, the same for all rows, with the best dev score on seed 0 at 40 % noise.
Finished runs are reused.
"""

import functools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver
from benchmarks.demo import METHODS, NPC_COMPUTE, PASSES, RATIOS
from benchmarks.driver import Method, spread, table
from utils.errors import InputError, command
from utils.reading.layout import split_folder

RATES = (1e-4, 3e-4, 1e-3)
GRID_SEED, GRID_RATIO = 0, 0.4
JUDGE = ("--judge_rounds", "2")
BEST = "robust"


# ---- hooks of a command's process ----------------------------------------------------------------


def oracle():
    """The judge knows the truth."""
    from utils.method import building

    judge_pairs = building.judge_pairs

    def told(model, pairs, *more):
        verdict, *rest = judge_pairs(model, pairs, *more)
        right = np.ones(len(pairs), bool) if pairs.wrong is None else ~pairs.wrong
        return verdict._replace(clean=right, posterior=right.astype(float)), *rest

    building.judge_pairs = told


def prepare(source, data, hook):
    """The hook of a row, after which a command has a data folder of its own with the images and
    captions of another: each run makes its own bank, whose time is part of the run's."""
    if not data.exists():
        shutil.copytree(split_folder(source), split_folder(data))
        os.symlink(os.path.realpath(source / "images"), data / "images")
    if hook:
        hook()


def passes(count):
    return METHODS["robust"]._replace(folder=f"robust_{count}", epochs=count)


ON_CLEAN = ("--train_on", "clean")
ROWS = {
    "CLIP": METHODS["CLIP"],
    "CLIP, NPC's compute": METHODS["CLIP, NPC's compute"],
    f"CLIP on the paper's clean set, {NPC_COMPUTE} passes":
        Method("clip_clean_long", "main_CLIP.py", NPC_COMPUTE, ON_CLEAN),
    f"CLIP on the paper's clean set, {PASSES} passes":
        Method("clip_clean", "main_CLIP.py", PASSES, ON_CLEAN),
    BEST: METHODS["robust"],
    "robust, 5 passes": passes(5),
    "robust, 9 passes": passes(9),
    "robust, 17 passes": passes(17),
    f"CLIP on the truly right pairs, {PASSES} passes":
        Method("oracle_pairs", "main_CLIP.py", PASSES, ON_CLEAN, oracle),
    "CLIP, judge's posterior as weight, NPC's compute":
        Method("judge_weights", epochs=NPC_COMPUTE, options=(
            "--weighting", "gmm", "--memory_loss_weight", "0", *JUDGE)),
    "NPC": METHODS["NPC"],
    "NPC, w = 1": Method("npc_ones", options=("--weighting", "none")),
    "NPC, w = 1, random memory":
        Method("npc_random", options=("--weighting", "none", "--memory", "random")),
    "NPC, w = judge's posterior, random memory":
        Method("npc_judge", options=("--weighting", "gmm", "--memory", "random", *JUDGE)),
}


class Ablation:
    """The runs of chosen rows, at their best rates, below the folders of the demo's seeds."""

    def __init__(self, args):
        if unknown := [word for word in args.only if not any(word in row for row in ROWS)]:
            raise InputError(f"--only {unknown[0]}: no row has this word; rows are {[*ROWS]}")
        self.rows = [row for row in ROWS if not args.only or any(w in row for w in args.only)]
        self.folders = [args.out / f"seed{seed}" for seed in range(args.seeds)]
        self.ratios, self.jobs, self.rates = args.noise, args.jobs, {}

    def run(self):
        """Choose the rates and make all runs."""
        driver.run_jobs([driver.pretraining(folder, seed)
                         for seed, folder in enumerate(self.folders)], self.jobs)
        driver.run_jobs([self.job(GRID_SEED, row, rate, GRID_RATIO)
                         for row in self.rows for rate in RATES], self.jobs)
        self.rates = {row: max(RATES, key=functools.partial(self.dev, row)) for row in self.rows}
        driver.run_jobs([self.job(seed, row, self.rates[row], ratio)
                         for seed in range(len(self.folders)) for ratio in self.ratios
                         for row in self.rows], self.jobs)

    def job(self, seed, row, rate, ratio):
        """The run of a row."""
        folder, run = self.folders[seed], self.run_of(row, rate, ratio)
        data = f"{run}/data"
        return driver.fine_tuning(
            folder, seed, f"{ratio:.0%} noise, lr {rate:g}, {row}", run, ROWS[row],
            ("--noise_ratio", ratio), rate, data,
            functools.partial(prepare, folder / driver.DRAWN, folder / data, ROWS[row].hook))

    @staticmethod
    def run_of(row, rate, ratio):
        """Folder of a run, below that of its seed."""
        return f"ablation/{ROWS[row].folder}_{rate:g}_{ratio}"

    def found(self, row, ratio):
        """Folders of a row's runs at its chosen rate, one for each seed."""
        return [folder / self.run_of(row, self.rates[row], ratio) for folder in self.folders]

    def dev(self, row, rate):
        """Dev score after the last epoch, by which the rate is chosen."""
        log = self.folders[GRID_SEED] / self.run_of(row, rate, GRID_RATIO) / "log.jsonl"
        return json.loads(log.read_text().splitlines()[-1])["dev"]["mean_R1"]

    def scores(self, row, ratio):
        """Mean R@1 of a row after the last epoch (seeds,)."""
        return np.array([driver.read_scores(run / "last")["mean_R1"]
                         for run in self.found(row, ratio)])

    def seconds(self, row):
        """CPU seconds of a run of a row, mean over noise and seeds."""
        return mean(driver.read_seconds(run) for ratio in self.ratios
                    for run in self.found(row, ratio))

    def report(self):
        """The tables as text."""
        percent = [f"{ratio:.0%}" for ratio in self.ratios]
        parts = [table(["mean R@1, last epoch", *percent, "lr", "seconds"], [
            [row, *(spread(self.scores(row, ratio)) for ratio in self.ratios),
             f"{self.rates[row]:g}", f"{self.seconds(row):.0f}"]
            for row in self.rows])]
        if BEST in self.rows:
            parts.append(table([f"{BEST}, less", *percent], [
                [row, *(spread(self.scores(BEST, ratio) - self.scores(row, ratio))
                        for ratio in self.ratios)] for row in self.rows if row != BEST]))
        return "\n\n".join(parts) + "\n"


@command
def main():
    parser = driver.options_of(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="rows whose name has one of these words")
    parser.add_argument("--noise", nargs="+", type=float, default=RATIOS, help="noise ratios")
    args, start = parser.parse_args(), time.perf_counter()
    ablation = Ablation(args)
    ablation.run()
    name = "_".join(["ablation", *args.only]).replace(" ", "_") + ".md"
    driver.write_report(args.out / name, ablation.report(), start)


if __name__ == "__main__":
    main()
