"""Shows on a CPU, in minutes, that NPC resists noisy captions where CLIP does not.

    python benchmarks/demo.py [--seeds 3]

A small version of the paper's experiments: a tiny CLIP learns from clean drawings of one domain,
then the repository's scripts fine-tune it on another domain, where a share of the captions is
wrong. Results are tables, a figure like the paper's and all scores as JSON. Finished runs are
reused; after a change of the code, delete the folder (`make clean`).
"""

import json
import sys
import time
from pathlib import Path
from statistics import mean, pvariance, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver
from benchmarks.driver import LR, TEST, TRAIN, Method, spread
from utils.errors import command

RATIOS = (0.0, 0.2, 0.4, 0.6)  # of noise
NPC_COMPUTE = 8  # epochs of plain CLIP that cost as much time as three of NPC
PASSES = 13  # over the chosen pairs, the default of --recipe robust
METHODS = {
    "CLIP": Method("clip", "main_CLIP.py"),
    "CLIP, NPC's compute": Method("clip_long", "main_CLIP.py", NPC_COMPUTE),
    "NPC": Method("npc"),
    "robust": Method("robust", epochs=PASSES, options=("--recipe", "robust")),
}
ZERO_SHOT = "zero-shot"
STYLES = {ZERO_SHOT: "k:", "CLIP": "C0o-", "CLIP, NPC's compute": "C0s--", "NPC": "C1o-",
          "robust": "C2o-"}
NOTE = f"""\
Each method fine-tunes the zero-shot model on 5 captions of {TRAIN} images at lr {LR:g}. NPC and \
CLIP take {METHODS['NPC'].epochs} epochs. CLIP at NPC's compute takes {NPC_COMPUTE}. robust is \
plain CLIP on the pairs that a better judge finds clean, {PASSES} passes over these pairs. Seconds \
are the CPU time of a whole run, its test included, on one thread.
"""
OWN_DATA = """\
For image-caption pairs of your own (a table with image paths and captions):
  python dataset/prepare_pairs.py --pairs pairs.csv --images photos/ --root dataset/mine
  python find_noise.py --dataset_root dataset/mine --out logs/noise
  python main_NPC.py --recipe robust --dataset_root dataset/mine --experiments mine"""


def results(folders):
    """{method: [[scores of each noise ratio] of each seed]}; `seconds` is among the scores."""

    def scores(folder, name, ratio):
        if name == ZERO_SHOT:
            return driver.read_scores(folder / ZERO_SHOT)
        run = folder / f"{METHODS[name].folder}_{ratio}"
        return {**driver.read_scores(run / "last"), "seconds": driver.read_seconds(run)}

    return {name: [[scores(folder, name, ratio) for ratio in RATIOS] for folder in folders]
            for name in (ZERO_SHOT, *METHODS)}


def over_ratios(seeds, key):
    """[[score of each seed] of each noise ratio]."""
    return [[scores[key] for scores in column] for column in zip(*seeds, strict=True)]


def variances(seeds):
    """Of each seed, the variance of image-to-text R@1 over the noise ratios."""
    return [pvariance(scores["i2t_R@1"] for scores in ratios) for ratios in seeds]


def report(found):
    """A Markdown table of mean R@1 over noise ratios, of the variance, and of seconds."""
    seeds = len(found[ZERO_SHOT])
    over_seeds = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    rows = [[name, *map(spread, over_ratios(runs, "mean_R1")), spread(variances(runs)),
             "" if name == ZERO_SHOT else f"{mean(sum(over_ratios(runs, 'seconds'), [])):.0f}"]
            for name, runs in found.items()]
    head = ["noise", *(f"{ratio:.0%}" for ratio in RATIOS), "variance of i2t R@1", "seconds"]
    return (f"Mean R@1 on {TEST} test images after the last epoch{over_seeds}:\n\n"
            f"{driver.table(head, rows)}\n\n{NOTE}")


def figure(found):
    """Image-to-text R@1 over the noise ratio, with its variance in the legend, as in the paper."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes, percent = fig.subplots(), [100 * ratio for ratio in RATIOS]
    for k, (name, runs) in enumerate(found.items()):
        columns = over_ratios(runs, "i2t_R@1")
        beside = 0.8 * (k - (len(found) - 1) / 2)  # so that error bars do not hide each other
        axes.errorbar([x + beside for x in percent], list(map(mean, columns)), capsize=3,
                      yerr=list(map(stdev, columns)) if len(runs) > 1 else None, fmt=STYLES[name],
                      label=f"{name} (variance {mean(variances(runs)):.1f})")
    seeds = len(found[ZERO_SHOT])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    axes.set(xlabel="wrong captions (%)", ylabel="i2t R@1 (%)", xticks=percent)
    axes.set_title(f"i2t R@1 on {TEST} drawings after the last epoch, {over}", fontsize="small")
    fig.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return fig


@command
def main():
    args, start = driver.options_of(__doc__, seeds=1).parse_args(), time.perf_counter()
    folders = [args.out / f"seed{seed}" for seed in range(args.seeds)]
    driver.run_jobs([driver.pretraining(folder, seed) for seed, folder in enumerate(folders)],
                    args.jobs)
    driver.run_jobs([
        driver.fine_tuning(folder, seed, f"{ratio:.0%} noise, {name}", f"{method.folder}_{ratio}",
                           method, ("--noise_ratio", ratio))
        for seed, folder in enumerate(folders) for ratio in RATIOS
        for name, method in METHODS.items()], args.jobs)
    found = results(folders)
    (args.out / "results.json").write_text(json.dumps({"noise": RATIOS, **found}, indent=1))
    driver.save_figure(figure(found), args.out / "figure")
    driver.write_report(args.out / "results.md", report(found), start)
    print(f"{args.out}/figure.png is the picture, figure.pdf its vector form; the commands of a "
          f"run are in its folder, as {args.out}/seed0/npc_0.6/commands.txt\n\n{OWN_DATA}")


if __name__ == "__main__":
    main()
