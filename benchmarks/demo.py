"""See NPC resist noisy captions where CLIP does not, in minutes and on a CPU.

    python benchmarks/demo.py [--seeds 3]

A stand-in for the paper's experiments: a tiny CLIP learns from clean drawings of one domain, then
the repository's scripts fine-tune it on another domain, where a share of the captions is wrong.
Ends with tables, a figure like the paper's and all scores as JSON. A run that an earlier demo has
finished is reused; after a change of the code, delete the folder (`make clean`).
"""

import argparse
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, pvariance, stdev
from typing import NamedTuple

from matplotlib.figure import Figure

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT.resolve()))  # of the processes below as well

from utils.report.tables import markdown

# Each command is a process of its own, forked from one that has imported what they need: seconds
os.environ["OMP_NUM_THREADS"] = "1"  # of each, as several run at a time
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "main_NPC", "sklearn.mixture", "torch._dynamo"])
RATIOS = (0.0, 0.2, 0.4, 0.6)  # of noise
SOURCE, TARGET, TEST = 6000, 400, 300  # training images of both domains, test images of the target
BATCH = 128


class Method(NamedTuple):
    """How the pre-trained model is fine-tuned, and how the figure shows it."""

    script: str
    folder: str
    style: str
    epochs: int = 3
    lr: float = 3e-4
    options: tuple[str, ...] = ()


METHODS = {
    "CLIP": Method("main_CLIP.py", "clip", "C0o-"),
    "CLIP, tuned": Method("main_CLIP.py", "clip_tuned", "C0s--", epochs=15, lr=1e-4),
    "NPC": Method("main_NPC.py", "npc", "C1o-"),
    "NPC, all w = 1": Method(
        "main_NPC.py", "npc_unweighted", "C1s--", options=("--weighting", "none")
    ),
}
ZERO_SHOT = "zero-shot"
CHECKPOINTS = {  # those of a run that are tested
    "last": "after the last epoch",
    "best": "after the epoch that is best on the clean dev set, as in the paper",
}
NOTE = f"""\
Each fine-tunes the zero-shot model on 5 captions of {TARGET} images for {METHODS['NPC'].epochs} \
epochs, lr {METHODS['NPC'].lr:g}; the tuned CLIP for {METHODS['CLIP, tuned'].epochs} epochs, lr \
{METHODS['CLIP, tuned'].lr:g}, chosen in a small grid at 60 % noise. Without weights \
(w = 1), NPC is CLIP that also trains on the memory bank."""


class Demo:
    """All runs of the demo, in the folder `out`, at most `jobs` at a time."""

    def __init__(self, out, seeds, jobs):
        self.out, self.seeds, self.jobs = Path(out), range(seeds), jobs
        self.total, self.finished = seeds * (1 + len(METHODS) * len(RATIOS)), 0

    def run(self):
        """Make every run that is not finished yet; the first one that fails ends it."""
        with ThreadPoolExecutor(self.jobs) as pool:
            models = [pool.submit(self.pretrain, seed) for seed in self.seeds]
            runs = [
                pool.submit(self.finetune, seed, models[seed], name, ratio)
                for seed in self.seeds for ratio in RATIOS for name in METHODS
            ]
            try:
                for future in as_completed(models + runs):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                print("stopping; what is under way is finished first", flush=True)
                raise

    def pretrain(self, seed):
        """Draw both domains, train a tiny model on the source, test it on the target."""
        folder = self.folder(seed)
        draw = "dataset/make_scenes.py", "--seed", seed
        self.execute(folder, f"seed {seed}, pre-training", ZERO_SHOT, [
            (*draw, "--out", folder / "source", "--domain", "source", "--train", SOURCE),
            (*draw, "--out", folder / "target", "--train", TARGET, "--test", TEST),
            training("main_CLIP.py", seed, folder, "source", "pretrained", "tiny", SOURCE, 2, 1e-3),
            testing("main_CLIP.py", seed, folder, "pretrained/best.pt", ZERO_SHOT),
        ])

    def finetune(self, seed, model, name, ratio):
        """Fine-tune the pre-trained model of `seed` on the target, test it there."""
        model.result()
        folder, run, method = self.folder(seed), run_name(name, ratio), METHODS[name]
        initial = folder / "pretrained" / "best.pt"
        train = training(method.script, seed, folder, "target", run, initial, TARGET,
                         method.epochs, method.lr)
        files = {"last": f"epoch{method.epochs}.pt", "best": "best.pt"}
        self.execute(folder / run, f"seed {seed}, {ratio:.0%} noise, {name}", "last", [
            (*train, "--noise_ratio", ratio, *method.options),
            *(testing(method.script, seed, folder, f"{run}/{files[c]}", f"{run}/{c}")
              for c in CHECKPOINTS),
        ])

    def execute(self, folder, what, tested, commands):
        """Run `commands`, unless exactly these are finished, and show the score in folder/tested.

        What they print goes to output.txt in `folder`, which is emptied before; checkpoints in it
        are deleted after.
        """
        start, done = time.perf_counter(), folder / "commands.txt"
        lines = "".join(f"python {ROOT / script} {shlex.join(map(str, options))}\n"
                        for script, *options in commands)
        reused = done.exists() and done.read_text() == lines
        if not reused:
            print(f"\n{lines}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for script, *options in commands:
                call(script, options, folder / "output.txt")
            for checkpoint in folder.glob("*.pt"):  # tested, and tens of megabytes each
                checkpoint.unlink()
            done.write_text(lines)
        self.finished += 1
        score = read_scores(folder / tested)["mean_R1"]
        how = "reused" if reused else f"{time.perf_counter() - start:.0f} s"
        print(f"[{self.finished}/{self.total}] {what}: mean R@1 {score:.1f} ({how})", flush=True)

    def results(self, checkpoint):
        """{method: [[scores of each noise ratio] of each seed]}."""

        def scores(seed, name, ratio):
            run = ZERO_SHOT if name == ZERO_SHOT else f"{run_name(name, ratio)}/{checkpoint}"
            return read_scores(self.folder(seed) / run)

        return {name: [[scores(seed, name, ratio) for ratio in RATIOS] for seed in self.seeds]
                for name in (ZERO_SHOT, *METHODS)}

    def folder(self, seed):
        return self.out / f"seed{seed}"


def training(script, seed, folder, domain, run, model, images, epochs, lr):
    """The command that trains `model` on 5 captions of each image, with 10 % of warm-up."""
    warmup = round(0.1 * epochs * (5 * images // BATCH))
    return (*common(script, seed, folder, domain, run), "--vision_model", model, "--batch_size",
            BATCH, "--epochs", epochs, "--lr", lr, "--warmup", warmup)


def testing(script, seed, folder, checkpoint, run):
    """The command that tests a checkpoint on the target domain."""
    return *common(script, seed, folder, "target", run), "--eval", "--resume", folder / checkpoint


def common(script, seed, folder, domain, run):
    return (script, "--dataset", "f30k", "--dataset_root", folder / domain, "--checkpoint_path",
            folder, "--experiments", run, "--seed", seed, "--device", "cpu", "--num_workers", 0)


def run_name(name, ratio):
    return f"{METHODS[name].folder}_{ratio}"


def call(script, options, log):
    """Run a script of this repository on one thread; end with its last line if it fails."""
    process = PROCESSES.Process(target=run_script, args=(script, options, log))
    process.start()
    process.join()
    if process.exitcode:
        last = [f"status {process.exitcode}", *log.read_text().split("\n")[:-1]][-1]
        sys.exit(f"{script}: {last}\nall that it printed: {log}")


def run_script(script, options, log):
    """In a process of its own, do as `python script options` does, and print to the end of log."""
    with open(log, "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.argv = [str(ROOT / script), *map(str, options)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def read_scores(folder):
    return json.loads((folder / "eval_test.json").read_text())


def spread(values, digits=1):
    """Mean ± standard deviation over the seeds; without the latter where there is one."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def over_ratios(seeds, key):
    """[[score of each seed] of each noise ratio]."""
    return [[scores[key] for scores in column] for column in zip(*seeds, strict=True)]


def variances(seeds):
    """Of each seed, the variance of image-to-text R@1 over the noise ratios."""
    return [pvariance(scores["i2t_R@1"] for scores in ratios) for ratios in seeds]


def table(results, what):
    """A Markdown table of mean R@1 over noise ratios, and of the variance."""
    seeds = len(results[ZERO_SHOT])
    over_seeds = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    lines = markdown(
        ["noise", *(f"{ratio:.0%}" for ratio in RATIOS), "variance of i2t R@1"],
        [[name, *map(spread, over_ratios(runs, "mean_R1")), spread(variances(runs))]
         for name, runs in results.items()])
    return f"Mean R@1 on {TEST} test images {what}{over_seeds}:\n\n{lines}\n"


def figure(results, path):
    """R@1 over the noise ratio, with its variance in the legend, as in the paper."""
    fig = Figure(figsize=(6, 4.2), layout="constrained")
    axes, percent = fig.subplots(), [100 * ratio for ratio in RATIOS]
    for name, runs in results.items():
        columns = over_ratios(runs, "i2t_R@1")
        axes.errorbar(percent, list(map(mean, columns)), capsize=3,
                      yerr=list(map(stdev, columns)) if len(runs) > 1 else None,
                      fmt="k:" if name == ZERO_SHOT else METHODS[name].style,
                      label=f"{name} (variance {mean(variances(runs)):.1f})")
    axes.set(xlabel="noise ratio (%)", ylabel="image-to-text R@1 (%) after the last epoch",
             xticks=percent, ylim=(0, None))
    axes.legend()
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description="Compare CLIP and NPC on synthetic scenes with noisy captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="demo", help="folder of all that the demo makes")
    add("--seeds", type=int, default=1, help="repetitions, each with data of its own")
    add("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="runs at a time")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs start at 1")

    start, demo = time.perf_counter(), Demo(**vars(args))
    demo.run()
    results = {checkpoint: demo.results(checkpoint) for checkpoint in CHECKPOINTS}
    tables = "\n".join(table(results[c], what) for c, what in CHECKPOINTS.items()) + f"\n{NOTE}\n"
    (demo.out / "results.json").write_text(json.dumps({"noise": RATIOS, **results}, indent=1))
    (demo.out / "results.md").write_text(tables)
    figure(results["last"], demo.out / "figure.png")
    print(f"\n{tables}\n{time.perf_counter() - start:.0f} s; wrote results.md, results.json and "
          f"figure.png to {demo.out}")


if __name__ == "__main__":
    main()
