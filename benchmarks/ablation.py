"""What each part of the method brings, on the demo's data: one table over all noise ratios.

    python benchmarks/ablation.py [--seeds 3]

Every row fine-tunes the demo's pre-trained model as the demo does. Runs of the demo are reused.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from construct_noise import SUFFIX
from data import first_seen, wrong_pairs
from demo import spread
from find_noise import write_subset
from utils.errors import command
from utils.method.memorybank import bank_path
from utils.reading.layout import find_by_ratio, read_captions, read_ids, split_folder
from utils.report.diagnostics import noise_measures
from utils.report.pair_weights import mean_weights, read_weights
from utils.report.tables import markdown

WEIGHTS_ONLY = ("--memory_loss_weight", "0")
ROWS = {  # in the order of the table; those without options are the demo's
    demo.ZERO_SHOT: None,
    "CLIP": None,
    "CLIP, tuned": None,
    "NPC": None,
    "NPC, released recipe": ("npc_released", ("--recipe", "released")),
    "weights w only": ("w_only", WEIGHTS_ONLY),
    "NPC, all w = 1": None,
    "mixture posterior as weight": ("gmm_only", ("--weighting", "gmm", *WEIGHTS_ONLY)),
    "One-Step Anti-noise weight": ("osa_only", ("--weighting", "osa", *WEIGHTS_ONLY)),
    "mixture posterior + memory": ("gmm", ("--weighting", "gmm")),
    "One-Step Anti-noise + memory": ("osa", ("--weighting", "osa")),
    "strict clean set only": ("strict", ()),
    "oracle: truly right pairs only": ("oracle", ()),
}
SUBSETS = ("strict", "oracle")


class Ablation(demo.Demo):
    """The demo's runs and those of the other rows."""

    def subset(self, seed, kind, ratio):
        """The data set of the pairs in the strict clean set, or of the truly right ones, beside the
        target; returns (its name, number of pairs)."""
        pairs, bank, wrong = self.truth(seed, ratio)
        keep = bank["clean"] if kind == "strict" else ~wrong
        name = f"{kind}_{ratio}_data"
        if not (self.folder(seed) / name).exists():
            write_subset(pairs, keep, self.folder(seed) / "target", self.folder(seed) / name)
        return name, int(keep.sum())

    def truth(self, seed, ratio):
        """(pairs, bank's arrays, which pairs are wrong) of the target at a noise ratio."""
        root = self.folder(seed) / "target"
        clean = read_captions(split_folder(root) / "train_caps.txt")
        path = find_by_ratio(split_folder(root), SUFFIX, ratio) if ratio else None
        captions = read_captions(path) if path else clean
        ids, image_of = first_seen(read_ids(root, "train", len(clean), 5, "train_caps.txt"))
        pairs = argparse.Namespace(image_ids=ids, image_of=image_of, captions=captions)
        with np.load(bank_path(root, ratio), allow_pickle=False) as bank:
            return pairs, dict(bank), wrong_pairs(clean, captions, image_of)

    def finetune_row(self, seed, row, ratio):
        """Fine-tune and test the pre-trained model of `seed` as a row says that the demo lacks."""
        name, options = ROWS[row]
        folder, run = self.folder(seed), f"{name}_{ratio}"
        initial = folder / "pretrained" / "best.pt"
        script, data, images, epochs = "main_NPC.py", "target", demo.TARGET, 3
        if name in SUBSETS:  # as many steps as the others, on fewer pairs
            script = "main_CLIP.py"
            data, n = self.subset(seed, name, ratio)
            images = n / 5
            epochs = round(3 * (5 * demo.TARGET // demo.BATCH) / (n // demo.BATCH))
            lines = [len(read_captions(split_folder(folder / data) / f"train_{what}.txt"))
                     for what in ("ids", "caps")]
            options = ("--num_anns", lines[1] // lines[0])
        else:
            options = ("--noise_ratio", ratio, *options)
        train = demo.training(script, seed, folder, data, run, initial, images, epochs, 3e-4)
        self.execute(folder / run, f"seed {seed}, {ratio:.0%} noise, {row}", "last", [
            (*train, *options),
            demo.testing(script, seed, folder, f"{run}/epoch{epochs}.pt", f"{run}/last")])

    def run_of(self, row, ratio):
        """Folder of a row's run, below that of its seed."""
        return f"{ROWS[row][0]}_{ratio}" if ROWS[row] else demo.run_name(row, ratio)

    def score(self, seed, row, ratio):
        """Mean R@1 after the last epoch."""
        run = row if row == demo.ZERO_SHOT else f"{self.run_of(row, ratio)}/last"
        return demo.read_scores(self.folder(seed) / run)["mean_R1"]

    def measures(self, seed, row, ratio):
        """`noise_measures` of a row's weights, of the initial model's losses for row None."""
        _, bank, wrong = self.truth(seed, ratio)
        if row is None:
            return noise_measures(bank["loss"], wrong)
        run = self.folder(seed) / self.run_of(row, ratio)
        w = mean_weights(read_weights(run / "weights.npz"))
        drawn = np.isfinite(w)
        return noise_measures(-w[drawn], wrong[drawn])

    def clean_set(self, seed, ratio):
        """Precision, recall and share of the strict clean set, in percent."""
        _, bank, wrong = self.truth(seed, ratio)
        hits = (bank["clean"] & ~wrong).sum()
        return [100 * hits / bank["clean"].sum(), 100 * hits / (~wrong).sum(),
                100 * bank["clean"].mean()]


def report(ablation):
    """The three tables."""
    seeds, noisy = ablation.seeds, [ratio for ratio in demo.RATIOS if ratio]
    percent = [f"{ratio:.0%}" for ratio in demo.RATIOS]
    scores = markdown(["mean R@1, last epoch", *percent], [
        [row, *(spread([ablation.score(seed, row, ratio) for seed in seeds])
                for ratio in demo.RATIOS)] for row in ROWS])
    rows = []
    for row in (None, "NPC", "NPC, released recipe", "weights w only",
                "mixture posterior as weight", "One-Step Anti-noise weight"):
        found = {ratio: [ablation.measures(seed, row, ratio) for seed in seeds] for ratio in noisy}
        optimum = mean(m["optimum"] for m in found[noisy[-1]])
        rows.append([row or "initial model's loss",
                     *(spread([m["auc"] for m in found[ratio]], 3) for ratio in noisy),
                     spread([m["mean_noise_rank"] for m in found[noisy[-1]]], 0),
                     f"{optimum:.0f}"])
    auc = markdown(["AUC against the injected noise", *percent[1:],
                    f"mean noise rank at {percent[-1]}", "its optimum"], rows)
    clean = {ratio: [ablation.clean_set(seed, ratio) for seed in seeds] for ratio in demo.RATIOS}
    sets = markdown(["strict clean set, %", *percent], [
        [name, *(spread([values[k] for values in clean[ratio]]) for ratio in demo.RATIOS)]
        for k, name in enumerate(("precision", "recall", "share of all pairs"))])
    return f"{scores}\n\n{auc}\n\n{sets}\n"


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="demo", help="folder of the demo, whose runs are reused")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()

    start, ablation = time.perf_counter(), Ablation(**vars(args))
    ablation.run()
    extra = [row for row in ROWS if ROWS[row]]
    ablation.total += len(ablation.seeds) * len(extra) * len(demo.RATIOS)
    with demo.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(ablation.finetune_row, seed, row, ratio)
                for seed in ablation.seeds for row in extra for ratio in demo.RATIOS]
        for job in jobs:
            job.result()
    tables = report(ablation)
    (ablation.out / "ablation.md").write_text(tables)
    (ablation.out / "ablation.json").write_text(json.dumps(
        {row: {seed: [ablation.score(seed, row, ratio) for ratio in demo.RATIOS]
               for seed in ablation.seeds} for row in ROWS}, indent=1))
    print(f"\n{tables}\n{time.perf_counter() - start:.0f} s; wrote ablation.md and ablation.json "
          f"to {ablation.out}")


if __name__ == "__main__":
    main()
