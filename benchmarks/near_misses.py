"""How judge and training do where wrong captions are near misses of the right ones.

    python benchmarks/near_misses.py [--seeds 3]

The demo's pre-trained models judge its target domain (find_noise.py), with random and with similar
captions exchanged, and are fine-tuned on it with similar ones. Runs that are finished are reused.
"""

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from demo import METHODS, spread
from utils.cleaning.text import markdown
from utils.errors import command

RATIOS, KINDS = (0.2, 0.4), ("random", "similar")
JUDGES = {"initial loss (the paper's)": ("--recipe", "paper"),
          "+ neighbours": ("--judge_rounds", 0),
          "judge (2 rounds, rate searched)": ()}
SAID = {"AUC": r"AUC ([\d.]+)", "AP": r"average precision ([\d.]+)",
        "share": r"Estimated noise share: ([\d.]+)%"}


class NearMisses(demo.Demo):
    """The judges' and the methods' runs, below the folders of the demo's seeds."""

    def run(self):
        self.make([*((self.judge, seed, name, kind, ratio) for seed in self.seeds
                     for name in JUDGES for kind in reversed(KINDS) for ratio in RATIOS),
                   *((self.finetune, seed, name, ratio) for seed in self.seeds
                     for name in METHODS for ratio in RATIOS)])

    def judge(self, seed, name, kind, ratio):
        """Rank the pairs of the target."""
        folder, target = self.judged(seed, name, kind, ratio), self.folder(seed)
        options = ("--dataset", "f30k", "--dataset_root", target / "target", "--vision_model",
                   target / "pretrained" / "best.pt", "--seed", seed, "--device", "cpu",
                   "--num_workers", 0, "--batch_size", demo.BATCH, "--noise_kind", kind,
                   "--noise_ratio", ratio, "--worst", 1, "--out", folder, *JUDGES[name])
        self.once(folder, [("find_noise.py", *options)])
        self.bar.update()

    def finetune(self, seed, name, ratio):
        """Fine-tune and test as the demo does."""
        folder, run, method = self.folder(seed), self.trained(name, ratio), METHODS[name]
        train = demo.training(method.script, seed, folder, "target", run,
                              folder / "pretrained" / "best.pt", method.epochs, demo.LR)
        self.execute(folder / run, f"seed {seed}, {ratio:.0%} near misses, {name}", "last", [
            (*train, "--noise_kind", "similar", "--noise_ratio", ratio, *method.options),
            demo.testing(method.script, seed, folder, f"{run}/epoch{method.epochs}.pt",
                         f"{run}/last")])

    def judged(self, seed, name, kind, ratio):
        """Folder of a judge's run."""
        return self.folder(seed) / "near_misses" / f"{[*JUDGES].index(name)}_{kind}_{ratio}"

    @staticmethod
    def trained(name, ratio):
        """Folder of a method's run, below that of its seed."""
        return f"near_misses/{METHODS[name].folder}_{ratio}"

    def said(self, seed, name, kind, ratio, what):
        """A number of `SAID` that a judge printed."""
        text = (self.judged(seed, name, kind, ratio) / "output.txt").read_text()
        return float(re.search(SAID[what], text)[1])

    def score(self, seed, name, ratio):
        """Mean R@1 after the last epoch."""
        return demo.read_scores(self.folder(seed) / self.trained(name, ratio) / "last")["mean_R1"]


def report(found):
    """Both tables as text."""
    columns = [(kind, ratio) for kind in KINDS for ratio in RATIOS]
    judges = markdown(["against the injected noise", *(f"{kind}, {ratio:.0%}"
                                                       for kind, ratio in columns)], [
        [f"{what}: {name}", *(spread([found.said(seed, name, kind, ratio, what)
                                      for seed in found.seeds], 1 if what == "share" else 3)
                              for kind, ratio in columns)]
        for what in SAID for name in JUDGES])
    scores = markdown(["mean R@1, near misses", *(f"{ratio:.0%}" for ratio in RATIOS)], [
        [name, *(spread([found.score(seed, name, ratio) for seed in found.seeds])
                 for ratio in RATIOS)] for name in METHODS])
    return f"{judges}\n\n{scores}\n"


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="demo", help="folder of the demo, whose models are reused")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()

    start, found = time.perf_counter(), NearMisses(**vars(args))
    found.run()
    tables = report(found)
    (found.out / "near_misses.md").write_text(tables)
    print(f"\n{tables}\n{time.perf_counter() - start:.0f} s; wrote {found.out}/near_misses.md")


if __name__ == "__main__":
    main()
