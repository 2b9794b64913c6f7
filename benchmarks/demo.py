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

from tqdm import tqdm

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT.resolve()))  # of the processes below as well

from params import positive_int
from utils.cleaning.text import markdown
from utils.errors import command

# Each command is a process of its own, forked from one that has imported what they need: seconds
os.environ["OMP_NUM_THREADS"] = "1"  # of each, as several run at a time
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "main_NPC", "sklearn.mixture", "torch._dynamo"])
RATIOS = (0.0, 0.2, 0.4, 0.6)  # of noise
SOURCE, TARGET, TEST = 6000, 400, 300  # training images of both domains, test images of the target
BATCH = 128


class Method(NamedTuple):
    """How the pre-trained model is fine-tuned. style: of its line in the figure. Of the ablation
    alone, hook(): changes the process of each command; lr_factor: its learning rate over that of a
    grid; interpolated: the test is of the average with the initial model (interpolate.py)."""

    folder: str
    script: str = "main_NPC.py"
    epochs: int = 3
    options: tuple = ()
    style: str = ""
    hook: object = None
    lr_factor: float = 1.0
    interpolated: bool = False


LR = 3e-4
NPC_COMPUTE = 8  # epochs of plain CLIP that cost as much time as three of NPC
PASSES = 5  # over the chosen pairs: without noise these and the judge take as long as well
JUDGE = ("--judge_lr", str(LR), "--judge_steps", "16")  # a search would take as long as NPC does
METHODS = {
    "CLIP": Method("clip", "main_CLIP.py", style="C0o-"),
    "CLIP, NPC's compute": Method("clip_long", "main_CLIP.py", NPC_COMPUTE, style="C0s--"),
    "NPC": Method("npc", style="C1o-"),
    "robust": Method("robust", epochs=PASSES, options=("--recipe", "robust", *JUDGE),
                     style="C2o-"),
}
ZERO_SHOT = "zero-shot"
NOTE = f"""\
Each fine-tunes the zero-shot model on 5 captions of {TARGET} images at lr {LR:g}: NPC and CLIP \
for {METHODS['NPC'].epochs} epochs, CLIP at NPC's compute for {NPC_COMPUTE}, robust (plain CLIP on \
the pairs that a better judge finds clean) for {PASSES} passes over these. Seconds \
are the CPU time of a whole run, its test included, on one thread."""
OWN_DATA = """\
For image-caption pairs of your own (a table with image paths and captions):
  python dataset/prepare_pairs.py --pairs pairs.csv --images photos/ --root dataset/mine
  python find_noise.py --dataset_root dataset/mine --out logs/noise
  python main_NPC.py --recipe robust --dataset_root dataset/mine --experiments mine"""


class Demo:
    """All runs of the demo, in the folder `out`, at most `jobs` at a time, and its report."""

    name = "results"  # of the file that the report is kept in

    def __init__(self, out, seeds, jobs):
        self.out, self.seeds, self.jobs = Path(out), range(seeds), jobs
        self.bar = None

    def run(self):
        """Make every run that is not finished yet; the first one that fails ends it."""
        self.make([(self.finetune, seed, name, ratio)
                   for seed in self.seeds for ratio in RATIOS for name in METHODS])

    def make(self, runs):
        """Call the functions of `runs`, (function, seed, ...), once the model of the seed is
        there."""
        with (ThreadPoolExecutor(self.jobs) as pool,
              tqdm(total=len(self.seeds) + len(runs), unit="run", disable=None) as self.bar):
            models = [pool.submit(self.pretrain, seed) for seed in self.seeds]
            futures = [pool.submit(self.after, models[seed], function, seed, *more)
                       for function, seed, *more in runs]
            try:
                for future in as_completed(models + futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def after(self, model, function, *args):
        """Call function(*args) when the future `model` is done."""
        model.result()
        function(*args)

    def pretrain(self, seed):
        """Draw both domains, train a tiny model on the source, test it on the target."""
        folder = self.folder(seed)
        draw = "dataset/make_scenes.py", "--seed", seed
        self.execute(folder, f"seed {seed}, pre-training", ZERO_SHOT, [
            (*draw, "--out", folder / "source", "--domain", "source", "--train", SOURCE),
            (*draw, "--out", folder / "target", "--train", TARGET, "--test", TEST),
            training("main_CLIP.py", seed, folder, "source", "pretrained", "tiny", 2, 1e-3),
            testing("main_CLIP.py", seed, folder, "pretrained/best.pt", ZERO_SHOT),
        ])

    def finetune(self, seed, name, ratio):
        """Fine-tune and test with a method."""
        self.train(seed, f"{ratio:.0%} noise, {name}", run_name(name, ratio), METHODS[name],
                   ("--noise_ratio", ratio))

    def train(self, seed, what, run, method, options, lr=LR, data="target", hook=None):
        """Fine-tune the pre-trained model of `seed` in the folder `run`, below that of the seed,
        and test it there after its last epoch."""
        folder = self.folder(seed)
        initial, last = folder / "pretrained" / "best.pt", f"{run}/epoch{method.epochs}.pt"
        commands = [(*training(method.script, seed, folder, data, run, initial, method.epochs, lr),
                     *options, *method.options)]
        if method.interpolated:
            commands += [("interpolate.py", "--resume", folder / last, "--initial", initial,
                          "--dataset", "f30k", "--dataset_root", folder / data, "--device", "cpu",
                          "--num_workers", 0)]
            last = f"{run}/interpolated.pt"
        commands += [testing(method.script, seed, folder, last, f"{run}/last")]
        self.execute(folder / run, f"seed {seed}, {what}", "last", commands, hook)

    def execute(self, folder, what, tested, commands, hook=None):
        """Run `commands` as `once` does, and show the score in folder/tested."""
        how = self.once(folder, commands, hook)
        tqdm.write(f"{what}: mean R@1 {read_scores(folder / tested)['mean_R1']:.1f} ({how})")
        self.bar.update()

    @staticmethod
    def once(folder, commands, hook=None):
        """Run `commands`, unless exactly these are finished; says how long it took.

        commands.txt and output.txt in `folder` hold the commands and what they print, seconds.txt
        the CPU time of each; checkpoints in it are deleted after. `hook`: see `run_script`.
        """
        start, done = time.perf_counter(), folder / "commands.txt"
        lines = "".join(f"python {ROOT / script} {shlex.join(map(str, options))}\n"
                        for script, *options in commands)
        reused = done.exists() and done.read_text() == lines
        if not reused:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for script, *options in commands:
                call(script, options, folder / "output.txt", hook)
            for checkpoint in folder.glob("*.pt"):  # tested, and tens of megabytes each
                checkpoint.unlink()
            done.write_text(lines)
        return "reused" if reused else f"{time.perf_counter() - start:.0f} s"

    def results(self):
        """{method: [[scores of each noise ratio] of each seed]}, and the run's `seconds`."""

        def scores(seed, name, ratio):
            folder = self.folder(seed)
            if name == ZERO_SHOT:
                return read_scores(folder / ZERO_SHOT)
            folder = folder / run_name(name, ratio)
            return {**read_scores(folder / "last"), "seconds": read_seconds(folder)}

        return {name: [[scores(seed, name, ratio) for ratio in RATIOS] for seed in self.seeds]
                for name in (ZERO_SHOT, *METHODS)}

    def report(self):
        """The table as text."""
        return f"{table(self.results())}\n{NOTE}\n"

    def score(self, seed, run):
        """Mean R@1 of a run after its last epoch."""
        return read_scores(self.folder(seed) / run / "last")["mean_R1"]

    def folder(self, seed):
        return self.out / f"seed{seed}"


def training(script, seed, folder, domain, run, model, epochs, lr):
    """The command that trains `model`."""
    return (*common(script, seed, folder, domain, run), "--vision_model", model, "--batch_size",
            BATCH, "--epochs", epochs, "--lr", lr)


def testing(script, seed, folder, checkpoint, run):
    """The command that tests a checkpoint on the target domain."""
    return *common(script, seed, folder, "target", run), "--eval", "--resume", folder / checkpoint


def common(script, seed, folder, domain, run):
    return (script, "--dataset", "f30k", "--dataset_root", folder / domain, "--checkpoint_path",
            folder, "--experiments", run, "--seed", seed, "--device", "cpu", "--num_workers", 0)


def run_name(name, ratio):
    return f"{METHODS[name].folder}_{ratio}"


def call(script, options, log, hook=None):
    """Run a script of this repository on one thread; end with its last line if it fails."""
    process = PROCESSES.Process(target=run_script, args=(script, options, log, hook))
    process.start()
    process.join()
    if process.exitcode:
        last = ["", *log.read_text().split("\n")[:-1]][-1]
        if not last.startswith("error: "):  # it was killed, or has a bug
            last = f"it ended with status {process.exitcode}"
        sys.exit(f"error: {script}: {last.removeprefix('error: ')}\nall that it printed: {log}")


def run_script(script, options, log, hook):
    """In a process of its own, do as `python script options` does, after hook() if there is one,
    print to the end of log, and add a line with its CPU seconds to seconds.txt beside it: other
    processes on the machine hardly change these."""
    with open(log, "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.argv = [str(ROOT / script), *map(str, options)]
    if hook:
        hook()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        with open(log.with_name("seconds.txt"), "a") as seconds:
            print(f"{time.process_time():.2f}", file=seconds)


def read_scores(folder):
    return json.loads((folder / "eval_test.json").read_text())


def read_seconds(folder):
    """CPU seconds of all commands of a finished run."""
    return sum(map(float, (folder / "seconds.txt").read_text().split()))


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


def table(results):
    """A Markdown table of mean R@1 over noise ratios, of the variance, and of seconds."""
    seeds = len(results[ZERO_SHOT])
    over_seeds = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    rows = [[name, *map(spread, over_ratios(runs, "mean_R1")), spread(variances(runs)),
             "" if name == ZERO_SHOT else f"{mean(sum(over_ratios(runs, 'seconds'), [])):.0f}"]
            for name, runs in results.items()]
    head = ["noise", *(f"{ratio:.0%}" for ratio in RATIOS), "variance of i2t R@1", "seconds"]
    return (f"Mean R@1 on {TEST} test images after the last epoch{over_seeds}:\n\n"
            f"{markdown(head, rows)}\n")


def figure(results, path):
    """Image-to-text R@1 over the noise ratio, with its variance in the legend, as in the paper."""
    from matplotlib.figure import Figure  # which a --help does without

    fig = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes, percent = fig.subplots(), [100 * ratio for ratio in RATIOS]
    for k, (name, runs) in enumerate(results.items()):
        columns = over_ratios(runs, "i2t_R@1")
        beside = 0.8 * (k - (len(results) - 1) / 2)  # so that error bars do not hide each other
        axes.errorbar([x + beside for x in percent], list(map(mean, columns)), capsize=3,
                      yerr=list(map(stdev, columns)) if len(runs) > 1 else None,
                      fmt="k:" if name == ZERO_SHOT else METHODS[name].style,
                      label=f"{name} (variance {mean(variances(runs)):.1f})")
    seeds = len(results[ZERO_SHOT])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    axes.set(xlabel="wrong captions (%)", ylabel="i2t R@1 (%)", xticks=percent,
             title=f"i2t R@1 on {TEST} drawings after the last epoch, {over}")
    axes.title.set_fontsize("small")
    axes.legend(fontsize="small")
    fig.savefig(path, dpi=150)


def make(kind, doc, seeds=3):
    """Make all runs of `kind`, a class of `Demo`, as the command's options say; print its report
    and keep it. Returns the `Demo`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", default="demo", help="folder of all runs; the models in it are used again")
    add("--seeds", type=positive_int, default=seeds, help="repetitions, each with data of its own")
    add("--jobs", type=positive_int, default=min(8, os.cpu_count() or 1),
        help="runs at a time, a thread each")
    start, made = time.perf_counter(), kind(**vars(parser.parse_args()))
    made.run()
    text, path = made.report(), made.out / f"{kind.name}.md"
    path.write_text(text)
    print(f"\n{text}\n{time.perf_counter() - start:.0f} s; wrote {path}")
    return made


@command
def main():
    demo = make(Demo, __doc__, seeds=1)
    results = demo.results()
    (demo.out / "results.json").write_text(json.dumps({"noise": RATIOS, **results}, indent=1))
    figure(results, demo.out / "figure.png")
    print(f"The picture is {demo.out}/figure.png; the commands of a run are in its folder, as "
          f"{demo.out}/seed0/npc_0.6/commands.txt\n\n{OWN_DATA}")


if __name__ == "__main__":
    main()
