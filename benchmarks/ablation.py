"""Measures what each part of the method brings, and what simpler methods do, on the demo's data.

    python benchmarks/ablation.py [--seeds 3] [--only robust passes] [--noise_kind similar]

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
from utils.errors import command
from utils.reading.layout import split_folder
from utils.reading.noise import KINDS

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


ON_CLEAN = ("--train_on", "clean")
ROWS = {
    "CLIP": METHODS["CLIP"],
    "CLIP, NPC's compute": METHODS["CLIP, NPC's compute"],
    f"CLIP on the paper's clean set, {NPC_COMPUTE} passes":
        Method("clip_clean_long", "main_CLIP.py", NPC_COMPUTE, ON_CLEAN),
    f"CLIP on the paper's clean set, {PASSES} passes":
        Method("clip_clean", "main_CLIP.py", PASSES, ON_CLEAN),
    BEST: METHODS["robust"],
    **{f"robust, {count} passes": METHODS["robust"]._replace(folder=f"robust_{count}", epochs=count)
       for count in (5, 9, 17)},
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


def job_of(folder, seed, row, kind, rate, ratio):
    """The run of a row, in a folder below that of its seed."""
    run = f"ablation/{ROWS[row].folder}_{rate:g}_{kind}_{ratio}"
    data = f"{run}/data"
    return driver.fine_tuning(
        folder, seed, f"{ratio:.0%} noise, lr {rate:g}, {row}", run, ROWS[row],
        ("--noise_ratio", ratio, "--noise_kind", kind), rate, data,
        functools.partial(prepare, folder / driver.DRAWN, folder / data, ROWS[row].hook))


def dev(job):
    """Dev score after the last epoch of a run."""
    return json.loads((job.folder / "log.jsonl").read_text().splitlines()[-1])["dev"]["mean_R1"]


def report(jobs, rates, ratios):
    """The tables as text. jobs: {(row, noise ratio): [the job of each seed]}."""
    scores = {key: np.array([driver.read_scores(job.scored)["mean_R1"] for job in own])
              for key, own in jobs.items()}
    seconds = {row: mean(driver.read_seconds(job.folder) for ratio in ratios
                         for job in jobs[row, ratio]) for row in rates}
    percent = [f"{ratio:.0%}" for ratio in ratios]
    parts = [table(["mean R@1, last epoch", *percent, "lr", "seconds"], [
        [row, *(spread(scores[row, ratio]) for ratio in ratios), f"{rate:g}",
         f"{seconds[row]:.0f}"] for row, rate in rates.items()])]
    if BEST in rates:
        parts.append(table([f"{BEST}, less", *percent], [
            [row, *(spread(scores[BEST, ratio] - scores[row, ratio]) for ratio in ratios)]
            for row in rates if row != BEST]))
    return "\n\n".join(parts) + "\n"


@command
def main():
    parser = driver.options_of(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD",
                        help="rows whose name has one of these words")
    parser.add_argument("--noise", nargs="+", type=float, default=RATIOS, help="noise ratios")
    parser.add_argument("--noise_kind", choices=KINDS, default=KINDS[0],
                        help="wrong captions: random ones, or near misses")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid")
    args, start = parser.parse_args(), time.perf_counter()
    rows = [row for row in ROWS if any(word in row for word in args.only)]
    folders = [args.out / f"seed{seed}" for seed in range(args.seeds)]
    driver.run_jobs([driver.pretraining(folder, seed) for seed, folder in enumerate(folders)],
                    args.jobs)
    grid = {row: {rate: job_of(folders[GRID_SEED], GRID_SEED, row, args.noise_kind, rate,
                               GRID_RATIO) for rate in args.rates} for row in rows}
    driver.run_jobs([job for own in grid.values() for job in own.values()], args.jobs)
    rates = {row: max(args.rates, key=lambda rate, row=row: dev(grid[row][rate])) for row in rows}
    jobs = {(row, ratio): [job_of(folder, seed, row, args.noise_kind, rates[row], ratio)
                           for seed, folder in enumerate(folders)]
            for row in rows for ratio in args.noise}
    driver.run_jobs(sum(jobs.values(), []), args.jobs)
    name = "_".join(["ablation", args.noise_kind, *filter(None, args.only)]).replace(" ", "_")
    driver.write_report(args.out / f"{name}.md", report(jobs, rates, args.noise), start)


if __name__ == "__main__":
    main()
