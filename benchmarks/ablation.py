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
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from data import training_pairs
from demo import NPC_COMPUTE, PASSES, spread
from utils.cleaning.text import markdown
from utils.errors import command
from utils.method.memorybank import bank_path
from utils.reading.layout import split_folder
from utils.scoring.diagnostics import noise_measures
from utils.training.pair_weights import mean_weights, read_weights

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


class Row(NamedTuple):
    """How a row trains. lr_factor: its learning rate over that of the grid; interpolated: the test
    is of the average with the initial model, as interpolate.py finds it."""

    folder: str
    script: str = "main_NPC.py"
    epochs: int = 3
    options: tuple = ()
    hook: object = None
    lr_factor: float = 1.0
    interpolated: bool = False


ROWS = {
    "CLIP": Row("clip", "main_CLIP.py"),
    "CLIP as the authors train it: lr x 2.5, not clipped":
        Row("clip_authors", "main_CLIP.py", options=("--clip_grad", 0), lr_factor=2.5),
    "CLIP, NPC's compute": Row("clip_long", "main_CLIP.py", NPC_COMPUTE),
    f"CLIP on the paper's clean set, {PASSES} passes":
        Row("clip_clean", "main_CLIP.py", PASSES, ("--train_on", "clean")),
    BEST: Row("robust", epochs=PASSES, options=demo.METHODS["robust"].options),
    f"CLIP on the truly right pairs, {PASSES} passes":
        Row("oracle_pairs", "main_CLIP.py", PASSES, ("--train_on", "clean"), oracle_pairs),
    "CLIP, mixture's posterior as weight, NPC's compute":
        Row("mixture_weights", epochs=NPC_COMPUTE, options=("--weighting", "gmm", *NO_MEMORY)),
    "CLIP, judge's posterior as weight, NPC's compute":
        Row("judge_weights", epochs=NPC_COMPUTE,
            options=("--weighting", "gmm", *NO_MEMORY, *JUDGE)),
    f"CLIP, pairs drawn by the judge's posterior, {PASSES} passes":
        Row("judge_draws", "main_CLIP.py", PASSES, ("--train_on", "clean", *JUDGE),
            draw_by_posterior),
    "NPC": Row("npc"),
    "NPC, released recipe":
        Row("npc_released", options=("--recipe", "released", "--warmup", 4)),  # the others'
    "NPC, w = 1": Row("npc_ones", options=("--weighting", "none")),
    "NPC, w = 1, random memory":
        Row("npc_random", options=("--weighting", "none", "--memory", "random")),
    "NPC, w = 1, memory of truly right pairs":
        Row("oracle_memory", options=("--weighting", "none"), hook=oracle_pairs),
    "NPC, w = mixture's posterior": Row("npc_mixture", options=("--weighting", "gmm")),
    "NPC, w = judge's posterior, random memory":
        Row("npc_judge", options=("--weighting", "gmm", "--memory", "random", *JUDGE)),
    "NPC, w = 1 for truly right pairs, else 0":
        Row("oracle_weights", options=("--weighting", "gmm"), hook=oracle_weights),
    "NPC, w of One-Step Anti-noise": Row("npc_osa", options=("--weighting", "osa")),
}
ROWS |= {f"{name}, interpolated": row._replace(folder=f"{row.folder}_interpolated",
                                               interpolated=True)
         for name, row in ROWS.items() if row.folder in ("clip_long", "npc", "robust")}
OF_WEIGHTS = ("NPC", "NPC, released recipe", "NPC, w of One-Step Anti-noise")


class Ablation(demo.Demo):
    """The runs of all rows, below the folders of the demo's seeds."""

    rates = {}  # of each row, once it is chosen

    def run(self):
        trained = [row for row in ROWS if not ROWS[row].interpolated]
        self.make([(self.train, GRID_SEED, row, rate, GRID_RATIO)
                   for row in trained for rate in RATES])
        for row in trained:
            self.rates[row] = max(RATES, key=lambda rate, row=row: self.dev(row, rate))
        self.rates |= {f"{row}, interpolated": rate for row, rate in self.rates.items()}
        self.make([(self.train, seed, row, self.rates[row], ratio)
                   for seed in self.seeds for ratio in demo.RATIOS for row in ROWS])

    def train(self, seed, name, rate, ratio):
        """Fine-tune and test the pre-trained model of `seed` as a row says."""
        row, folder, run = ROWS[name], self.folder(seed), self.run_of(name, rate, ratio)
        initial, last = folder / "pretrained" / "best.pt", f"{run}/epoch{row.epochs}.pt"
        data = f"{run}/data"
        train = demo.training(row.script, seed, folder, data, run, initial, row.epochs,
                              rate * row.lr_factor)
        commands = [(*train, "--noise_ratio", ratio, *row.options)]
        if row.interpolated:
            commands += [("interpolate.py", "--resume", folder / last, "--initial", initial,
                          "--dataset", "f30k", "--dataset_root", folder / data, "--device",
                          "cpu", "--num_workers", 0)]
            last = f"{run}/interpolated.pt"
        commands += [demo.testing(row.script, seed, folder, last, f"{run}/last")]
        self.execute(folder / run, f"seed {seed}, {ratio:.0%} noise, lr {rate:g}, {name}", "last",
                     commands, functools.partial(prepare, folder / "target", folder / data,
                                                 row.hook))

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

    def score(self, seed, name, ratio):
        """Mean R@1 after the last epoch."""
        return demo.read_scores(self.found(seed, name, ratio) / "last")["mean_R1"]

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


def report(ablation):
    """The tables as text."""
    seeds, noisy = ablation.seeds, [ratio for ratio in demo.RATIOS if ratio]
    percent = [f"{ratio:.0%}" for ratio in demo.RATIOS]
    rows = []
    for row in ROWS:
        seconds = mean(demo.read_seconds(ablation.found(seed, row, ratio))
                       for seed in seeds for ratio in demo.RATIOS)
        rows.append([row, *(spread([ablation.score(seed, row, ratio) for seed in seeds])
                            for ratio in demo.RATIOS),
                     f"{ablation.rates[row] * ROWS[row].lr_factor:g}", f"{seconds:.0f}"])
    scores = markdown(["mean R@1, last epoch", *percent, "lr", "seconds"], rows)
    paired = markdown([f"{BEST.split(',')[0]}, less", *percent], [
        [row, *(spread([ablation.score(seed, BEST, ratio) - ablation.score(seed, row, ratio)
                        for seed in seeds]) for ratio in demo.RATIOS)]
        for row in ROWS if row != BEST])
    rows = []
    for name, measure, which in [
            *((f"loss: {name}", ablation.of_loss, row) for name, row in JUDGES.items()),
            *((f"w: {row}", ablation.of_w, row) for row in OF_WEIGHTS)]:
        found = {ratio: [measure(seed, which, ratio) for seed in seeds] for ratio in noisy}
        rows.append([name, *(spread([m[key] for m in found[ratio]], 3)
                             for key in ("auc", "average_precision") for ratio in noisy)])
    auc = markdown(["against the injected noise", *(f"{key}, {share}" for key in ("AUC", "AP")
                                                    for share in percent[1:])], rows)
    sets = markdown(["strict clean set, %", *percent], [
        [f"{what}: {name}", *(spread([ablation.clean_set(seed, row, ratio)[k] for seed in seeds])
                              for ratio in demo.RATIOS)]
        for name, row in JUDGES.items()
        for k, what in enumerate(("precision", "recall", "estimated share of wrong pairs"))])
    return f"{scores}\n\n{paired}\n\n{auc}\n\n{sets}\n"


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="demo", help="folder of the demo, whose models are reused")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()

    start, ablation = time.perf_counter(), Ablation(**vars(args))
    ablation.run()
    tables = report(ablation)
    (ablation.out / "ablation.md").write_text(tables)
    (ablation.out / "ablation.json").write_text(json.dumps(
        {row: {seed: [ablation.score(seed, row, ratio) for ratio in demo.RATIOS]
               for seed in ablation.seeds} for row in ROWS}, indent=1))
    print(f"\n{tables}\n{time.perf_counter() - start:.0f} s; wrote ablation.md and ablation.json "
          f"to {ablation.out}")


if __name__ == "__main__":
    main()
