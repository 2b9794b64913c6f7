"""How judges and training do where wrong captions are near misses of the right ones.

    python benchmarks/near_misses.py [--seeds 3]

The demo's pre-trained models judge its target domain (find_noise.py), with random and with similar
captions exchanged, and are fine-tuned on it with similar ones. Runs that are finished are reused.
"""

import re
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from demo import METHODS, RATIOS, spread
from utils.cleaning.text import markdown
from utils.errors import command

KINDS = ("random", "similar")
NOISE = [("random", 0.0), *((kind, ratio) for kind in KINDS for ratio in RATIOS[1:])]
TRAINED = (0.2, 0.4)  # of similar captions
JUDGES = {"initial loss (the paper's)": ("--recipe", "paper"),
          "+ neighbours": ("--judge_rounds", 0),
          "judge, rate searched (as it comes)": (),
          "judge, rate searched, 16 steps": ("--judge_steps", 16),
          "judge, 1e-4": ("--judge_lr", 1e-4),
          "judge, 3e-4": ("--judge_lr", 3e-4),
          "judge, 1e-3": ("--judge_lr", 1e-3),
          "judge, 3e-4, 16 steps": demo.JUDGE}
SAID = {"AUC": r"AUC ([\d.]+)", "AP": r"average precision ([\d.]+)",
        "share, %": r"Estimated noise share: ([\d.]+)%"}
RATE = r"round 1 of .* steps at ([\de.-]+)"


class NearMisses(demo.Demo):
    """The judges' and the methods' runs, below the folders of the demo's seeds."""

    name = "near_misses"

    def run(self):
        self.make([*((self.judge, seed, name, *noise) for seed in self.seeds
                     for name in JUDGES for noise in NOISE),
                   *((self.finetune, seed, name, ratio) for seed in self.seeds
                     for name in METHODS for ratio in TRAINED)])

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
        self.train(seed, f"{ratio:.0%} near misses, {name}", self.trained(name, ratio),
                   METHODS[name], ("--noise_kind", "similar", "--noise_ratio", ratio))

    def judged(self, seed, name, kind, ratio):
        """Folder of a judge's run."""
        return self.folder(seed) / "near_misses" / f"{[*JUDGES].index(name)}_{kind}_{ratio}"

    @staticmethod
    def trained(name, ratio):
        """Folder of a method's run, below that of its seed."""
        return f"near_misses/{METHODS[name].folder}_{ratio}"

    def said(self, name, kind, ratio, pattern):
        """The number that the judge of each seed printed, of those that did."""
        texts = [(self.judged(seed, name, kind, ratio) / "output.txt").read_text()
                 for seed in self.seeds]
        return [float(match[1]) for match in (re.search(pattern, text) for text in texts) if match]

    def seconds(self, name):
        """CPU seconds of a judge's run, mean over noise and seeds."""
        return mean(demo.read_seconds(self.judged(seed, name, *noise))
                    for seed in self.seeds for noise in NOISE)

    def report(self):
        """The tables as text."""
        percent = ["0%", *(f"{kind}, {ratio:.0%}" for kind, ratio in NOISE[1:])]
        tables = [markdown([what, *percent], [
            [name, *(spread(values, 1 if "%" in what else 3) if values else "–"
                     for values in (self.said(name, *noise, pattern) for noise in NOISE))]
            for name in JUDGES]) for what, pattern in SAID.items()]
        tables += [markdown(["rate of each seed", *percent, "CPU seconds, mean"], [
            [name, *(", ".join(f"{rate:g}" for rate in self.said(name, *noise, RATE))
                     for noise in NOISE), f"{self.seconds(name):.0f}"] for name in JUDGES])]
        tables += [markdown(["mean R@1, near misses", *(f"{ratio:.0%}" for ratio in TRAINED)], [
            [name, *(spread([self.score(seed, self.trained(name, ratio)) for seed in self.seeds])
                     for ratio in TRAINED)] for name in METHODS])]
        return "\n\n".join(tables) + "\n"


@command
def main():
    demo.make(NearMisses, __doc__)


if __name__ == "__main__":
    main()
