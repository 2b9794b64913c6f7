"""What each part of the method brings, and what simpler things do, on the demo's data.

    python benchmarks/ablation.py [--seeds 3]

Every row fine-tunes the demo's pre-trained models at each noise ratio, for about the time that
three epochs of NPC take where it says so. Its learning rate is that of a grid, the same for all
rows, with the best dev score on seed 0 at 40 % noise. Runs that are finished are reused.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from data import training_pairs
from demo import METHODS, NPC_COMPUTE, PASSES, Method, spread
from utils.cleaning.text import markdown
from utils.errors import command
from utils.method.memorybank import bank_path
from utils.reading.layout import split_folder
from utils.scoring.diagnostics import noise_measures
from utils.training.history import mean_weights, read_weights

RATES = (1e-4, 3e-4, 1e-3)
GRID_SEED, GRID_RATIO = 0, 0.4
JUDGE = ("--judge_rounds", "2", *demo.JUDGE)
NO_MEMORY = ("--memory_loss_weight", "0")
BEST = f"CLIP on the judge's clean set, {PASSES} passes (robust)"
JUDGES = {"initial model, mixture (paper)": "NPC", "better judge": BEST}  # and a row of each


# ---- controls that no option offers; each changes the process that runs a command ---------------


def oracle(*fields):
    """The judge knows the truth, in these fields of its verdict."""
    from utils.method import building

    judge_pairs = building.judge_pairs

    def told(model, pairs, *more):
        verdict, features, info = judge_pairs(model, pairs, *more)
        right = np.ones(len(pairs), bool) if pairs.wrong is None else ~pairs.wrong
        truth = {"clean": right, "posterior": right.astype(float)}
        return verdict._replace(**{name: truth[name] for name in fields}), features, info

    building.judge_pairs = told


def oracle_pairs():
    oracle("clean", "posterior")


def oracle_weights():
    oracle("posterior")


def draw_by_posterior():
    """--train_on clean draws any pair, with the posterior as probability; an epoch has as many
    pairs as are right by its sum."""
    from utils.method import batches, memorybank

    class Sampler(batches.EpochSampler):
        probability = right = None

        def __len__(self):
            return super().__len__() if self.right is None else self.right // self.batch_size

        def __iter__(self):
            if self.probability is None:  # a round of the judge
                yield from super().__iter__()
                return
            rng = np.random.default_rng([self.seed, self.epoch])
            for _ in range(len(self)):
                yield rng.choice(self.chosen, self.batch_size, False, self.probability).tolist()

    def all_pairs(bank):
        Sampler.right = int(bank.posterior.sum(dtype=float))
        Sampler.probability = bank.posterior.astype(float) / bank.posterior.sum(dtype=float)
        return np.arange(len(bank.posterior))

    batches.EpochSampler, memorybank.clean_pairs = Sampler, all_pairs


def prepare(source, data, hook):
    """Before a command: the row's hook, and a data folder of its own with images and captions of
    another, as each run makes its own bank; its time is part of the run's."""
    if not data.exists():
        shutil.copytree(split_folder(source), split_folder(data))
        os.symlink(os.path.realpath(source / "images"), data / "images")
    if hook:
        hook()


ROWS = {
    "CLIP": METHODS["CLIP"],
    "CLIP as the authors train it: lr x 2.5, not clipped":
        Method("clip_authors", "main_CLIP.py", options=("--clip_grad", 0), lr_factor=2.5),
    "CLIP, NPC's compute": METHODS["CLIP, NPC's compute"],
    f"CLIP on the paper's clean set, {PASSES} passes":
        Method("clip_clean", "main_CLIP.py", PASSES, ("--train_on", "clean")),
    f"CLIP on the paper's clean set, {NPC_COMPUTE} passes":
        Method("clip_clean_long", "main_CLIP.py", NPC_COMPUTE, ("--train_on", "clean")),
    BEST: METHODS["robust"],
    f"CLIP on the judge's clean set, {NPC_COMPUTE} passes":
        METHODS["robust"]._replace(folder="robust_long", epochs=NPC_COMPUTE),
    f"CLIP on the truly right pairs, {PASSES} passes":
        Method("oracle_pairs", "main_CLIP.py", PASSES, ("--train_on", "clean"), hook=oracle_pairs),
    "CLIP, mixture's posterior as weight, NPC's compute":
        Method("mixture_weights", epochs=NPC_COMPUTE, options=("--weighting", "gmm", *NO_MEMORY)),
    "CLIP, judge's posterior as weight, NPC's compute":
        Method("judge_weights", epochs=NPC_COMPUTE,
               options=("--weighting", "gmm", *NO_MEMORY, *JUDGE)),
    f"CLIP, pairs drawn by the judge's posterior, {PASSES} passes":
        Method("judge_draws", "main_CLIP.py", PASSES, ("--train_on", "clean", *JUDGE),
               hook=draw_by_posterior),
    "NPC": METHODS["NPC"],
    "NPC, released recipe":
        Method("npc_released", options=("--recipe", "released", "--warmup", 4)),  # the others'
    "NPC, w = 1": Method("npc_ones", options=("--weighting", "none")),
    "NPC, w = 1, random memory":
        Method("npc_random", options=("--weighting", "none", "--memory", "random")),
    "NPC, w = 1, memory of truly right pairs":
        Method("oracle_memory", options=("--weighting", "none"), hook=oracle_pairs),
    "NPC, w = mixture's posterior": Method("npc_mixture", options=("--weighting", "gmm")),
    "NPC, w = judge's posterior, random memory":
        Method("npc_judge", options=("--weighting", "gmm", "--memory", "random", *JUDGE)),
    "NPC, w = 1 for truly right pairs, else 0":
        Method("oracle_weights", options=("--weighting", "gmm"), hook=oracle_weights),
    "NPC, w of One-Step Anti-noise": Method("npc_osa", options=("--weighting", "osa")),
}
ROWS |= {f"{name}, interpolated": row._replace(folder=f"{row.folder}_interpolated",
                                               interpolated=True)
         for name, row in ROWS.items() if row.folder in ("clip_long", "npc", "robust")}
OF_WEIGHTS = ("NPC", "NPC, released recipe", "NPC, w of One-Step Anti-noise")


class Ablation(demo.Demo):
    """The runs of all rows, below the folders of the demo's seeds."""

    name = "ablation"
    rates = {}  # of each row, once it is chosen

    def run(self):
        trained = [row for row in ROWS if not ROWS[row].interpolated]
        self.make([(self.finetune, GRID_SEED, row, rate, GRID_RATIO)
                   for row in trained for rate in RATES])
        for row in trained:
            self.rates[row] = max(RATES, key=lambda rate, row=row: self.dev(row, rate))
        self.rates |= {f"{row}, interpolated": rate for row, rate in self.rates.items()}
        self.make([(self.finetune, seed, row, self.rates[row], ratio)
                   for seed in self.seeds for ratio in demo.RATIOS for row in ROWS])

    def finetune(self, seed, name, rate, ratio):
        """Fine-tune and test as a row says."""
        row, folder, run = ROWS[name], self.folder(seed), self.run_of(name, rate, ratio)
        data = f"{run}/data"
        self.train(seed, f"{ratio:.0%} noise, lr {rate:g}, {name}", run, row,
                   ("--noise_ratio", ratio), rate * row.lr_factor, data,
                   functools.partial(prepare, folder / "target", folder / data, row.hook))

    @staticmethod
    def run_of(name, rate, ratio):
        """Folder of a run, below that of its seed."""
        return f"ablation/{ROWS[name].folder}_{rate:g}_{ratio}"

    def found(self, seed, name, ratio):
        """Folder of a row's run at its chosen rate."""
        return self.folder(seed) / self.run_of(name, self.rates[name], ratio)

    def dev(self, name, rate):
        """Dev score after the last epoch, by which the rate is chosen."""
        folder = self.folder(GRID_SEED) / self.run_of(name, rate, GRID_RATIO)
        return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["dev"]["mean_R1"]

    def scores(self, name, ratio):
        """Mean R@1 of a row after the last epoch (seeds,)."""
        run = self.run_of(name, self.rates[name], ratio)
        return np.array([self.score(seed, run) for seed in self.seeds])

    def seconds(self, name):
        """CPU seconds of a run of a row, mean over noise and seeds."""
        return mean(demo.read_seconds(self.found(seed, name, ratio))
                    for seed in self.seeds for ratio in demo.RATIOS)

    def truth(self, seed, name, ratio):
        """(arrays of a row's bank, which pairs are wrong (n,) bool) of the target."""
        options = json.loads((self.found(seed, name, ratio) / "options.json").read_text())
        args = argparse.Namespace(**options)
        pairs = training_pairs(args, None, lambda _: None)
        with np.load(bank_path(args.dataset_root, args.bank), allow_pickle=False) as bank:
            return dict(bank), pairs.wrong if ratio else np.zeros(len(pairs), bool)

    def of_loss(self, seed, name, ratio):
        """`noise_measures` of the losses of a row's judge."""
        bank, wrong = self.truth(seed, name, ratio)
        return noise_measures(bank["loss"], wrong)

    def of_w(self, seed, name, ratio):
        """`noise_measures` of the weights w of a row."""
        w = mean_weights(read_weights(self.found(seed, name, ratio) / "weights.npz"))
        drawn = np.isfinite(w)
        return noise_measures(-w[drawn], self.truth(seed, name, ratio)[1][drawn])

    def clean_set(self, seed, name, ratio):
        """Precision, recall and estimated share of wrong pairs of a row's judge, in percent."""
        bank, wrong = self.truth(seed, name, ratio)
        hits = (bank["clean"] & ~wrong).sum()
        info = json.loads(bank["info"].tobytes())
        return [100 * hits / bank["clean"].sum(), 100 * hits / (~wrong).sum(),
                100 * info["wrong_share"]]

    def report(self):
        """The tables as text."""
        ratios, noisy = demo.RATIOS, [ratio for ratio in demo.RATIOS if ratio]
        percent = [f"{ratio:.0%}" for ratio in ratios]
        scores = markdown(["mean R@1, last epoch", *percent, "lr", "seconds"], [
            [row, *(spread(self.scores(row, ratio)) for ratio in ratios),
             f"{self.rates[row] * ROWS[row].lr_factor:g}", f"{self.seconds(row):.0f}"]
            for row in ROWS])
        paired = markdown([f"{BEST.split(',')[0]}, less", *percent], [
            [row, *(spread(self.scores(BEST, ratio) - self.scores(row, ratio))
                    for ratio in ratios)] for row in ROWS if row != BEST])
        rows = []
        for name, measure, which in [
                *((f"loss: {name}", self.of_loss, row) for name, row in JUDGES.items()),
                *((f"w: {row}", self.of_w, row) for row in OF_WEIGHTS)]:
            found = {ratio: [measure(seed, which, ratio) for seed in self.seeds]
                     for ratio in noisy}
            rows.append([name, *(spread([m[key] for m in found[ratio]], 3)
                                 for key in ("auc", "average_precision") for ratio in noisy)])
        auc = markdown(["against the injected noise",
                        *(f"{key}, {share}" for key in ("AUC", "AP") for share in percent[1:])],
                       rows)
        sets = markdown(["strict clean set, %", *percent], [
            [f"{what}: {name}", *(spread([self.clean_set(seed, row, ratio)[k]
                                          for seed in self.seeds]) for ratio in ratios)]
            for name, row in JUDGES.items()
            for k, what in enumerate(("precision", "recall", "estimated share of wrong pairs"))])
        return f"{scores}\n\n{paired}\n\n{auc}\n\n{sets}\n"


@command
def main():
    demo.make(Ablation, __doc__)


if __name__ == "__main__":
    main()
