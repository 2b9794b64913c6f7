"""Reproduce a table of the paper: train, test, and set the scores beside the published ones.

    python benchmarks/reproduce.py --dataset f30k --dataset_root dataset/Flickr30K

makes one run after the other, each from a file of configs/, and tests its best epoch and its last.
Runs that are finished are skipped, and one that was stopped goes on where it was. Options that are
not listed here go to every run. For the job array of a cluster, --print lists the commands:

    python benchmarks/reproduce.py --dataset f30k --dataset_root DIR --print > jobs.txt
    sed -n "${SLURM_ARRAY_TASK_ID}p" jobs.txt | bash
    python benchmarks/reproduce.py --dataset f30k --dataset_root DIR --table
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT.resolve()))

from benchmarks import table
from params import Parser, parse_args, positive_int, ratio
from utils.errors import InputError, command
from utils.reading.layout import ratio_name, read_captions, split_folder
from utils.reading.noise import SEED

METHODS = tuple(sorted(path.stem for path in (ROOT / "configs").glob("*.args")))
NOISE = {"coco": (0.0, 0.2, 0.4, 0.5, 0.6), "f30k": (0.0, 0.2, 0.4, 0.6), "cc": (0.0,)}
LAST = "last"  # subfolder of a run with the scores of its last epoch
MEASURED = 60  # seconds of steps after which a method's speed is known
STEPS_OF_EPOCH = re.compile(r"training: .* (\d+) steps an epoch")
STEP_DONE = re.compile(r"epoch (\d+), step (\d+): ")


class Job(NamedTuple):
    """A run: its method, its folder, its epochs, and the steps of one if it takes all pairs;
    train: the words of its command; tests: {folder: words} of the two that score it."""

    method: str
    folder: Path
    epochs: int
    epoch_steps: int
    train: list
    tests: dict

    @property
    def trained(self):
        """Whether its last epoch has been scored on dev."""
        log = self.folder / "log.jsonl"
        return log.exists() and len(log.read_text(encoding="utf-8").splitlines()) >= self.epochs

    @property
    def finished(self):
        return self.trained and all((folder / "eval_test.json").exists() for folder in self.tests)

    def commands(self):
        """The commands that are left, as lists of words."""
        tests = [words for folder, words in self.tests.items()
                 if not (self.trained and (folder / "eval_test.json").exists())]
        return tests if self.trained else [self.train, *tests]


def make_job(args, more, method, noise, seed, captions):
    """The `Job` of a method, a noise ratio and a seed; `more` are options of every run."""
    script = "clip" if method.startswith("clip") else "npc"
    name = f"{args.dataset}_{method}_{ratio_name(noise)}_seed{seed}"
    folder = args.out / name
    data = ["--dataset", args.dataset, "--dataset_root", args.dataset_root, "--noise_ratio",
            ratio_name(noise), "--seed", str(seed), "--checkpoint_path", str(args.out)]
    words = [str(ROOT / f"main_{script.upper()}.py"), f"@{ROOT / 'configs' / method}.args", *data,
             *more]
    options = parse_args(script, words[1:])

    def test(checkpoint, experiments):
        return [*words, "--experiments", experiments, "--eval", "--resume", str(checkpoint)]

    return Job(method, folder, options.epochs, captions // options.batch_size,
               [*words, "--experiments", name, "--resume", "auto"],
               {folder: test(folder / "best.pt", name),
                folder / LAST: test(folder / f"epoch{options.epochs}.pt", f"{name}/{LAST}")})


# ---- running ------------------------------------------------------------------------------------


class Progress:
    """One bar over the steps of all jobs. How long a step takes is known of a method after
    `MEASURED` seconds of its steps; others are taken to be as slow as the slowest known one."""

    def __init__(self, jobs):
        self.left = list(jobs)
        self.steps = {job.folder: job.epochs * job.epoch_steps for job in jobs}
        self.pace, self.rest = {}, None  # seconds of a step, by method; how long the rest takes
        self.bar = tqdm(total=sum(self.steps.values()), dynamic_ncols=True, disable=None,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps{postfix}")

    def start(self, job):
        self.job, self.done, self.epoch_steps, self.mark = job, 0, job.epoch_steps, None

    def line(self, text):
        """Take in a line that the run prints."""
        if match := STEPS_OF_EPOCH.search(text):
            self.epoch_steps = int(match[1])  # of the pairs that the judge has chosen
            self.steps[self.job.folder] = self.job.epochs * self.epoch_steps
            self.bar.total = sum(self.steps.values())
        if match := STEP_DONE.search(text):
            self._reach((int(match[1]) - 1) * self.epoch_steps + int(match[2]))

    def _reach(self, done, finished=False):
        now, method = time.monotonic(), self.job.method
        news = method not in self.pace
        if self.mark is None:  # the first line of a run, or of one that goes on
            self.mark = done, now
        elif done > self.mark[0] and (finished or now - self.mark[1] >= MEASURED):
            self.pace[method] = (now - self.mark[1]) / (done - self.mark[0])
        self.bar.update(done - self.done)
        self.done = done
        if self.pace:
            slowest = max(self.pace.values())
            seconds = sum((self.steps[job.folder] - done * (job is self.job))
                          * self.pace.get(job.method, slowest) for job in self.left)
            self.rest = (f"{seconds / 3600:.1f} hours" if seconds >= 3600 else
                         f"{seconds / 60:.0f} min")
            self.bar.set_postfix_str(f"{self.rest} left")
        if news and method in self.pace:
            self.bar.write(f"{method} takes {self.pace[method]:.3g} s a step: {self.rest} are left")

    def finish(self):
        """The run at hand is through."""
        self._reach(self.steps[self.job.folder], finished=True)
        self.left.remove(self.job)


def run_all(jobs, out):
    """Make the runs one after the other. A signal is passed on to the one at hand, which saves its
    state; then this ends with the same status. Raises InputError when one fails."""
    from utils.training.interruptions import INTERRUPTED, SIGNALS  # with torch

    progress, children, stopped = Progress(jobs), [], []

    def stop(number, _):
        stopped.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        progress.start(job)
        for words in job.commands():
            progress.bar.write("$ python " + shlex.join(words))
            printed = []
            with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.STDOUT, start_new_session=True) as child:
                children[:] = [child]
                if stopped:  # just then
                    child.send_signal(signal.SIGTERM)
                for text in child.stdout:
                    printed = [*printed[-20:], text.rstrip()]
                    progress.line(text)
            if stopped:
                progress.bar.close()
                print(f"stopped; the same command goes on with {job.folder}")
                sys.exit(INTERRUPTED)
            if child.returncode:
                progress.bar.close()
                print("\n".join(printed[:-1]), file=sys.stderr)
                raise InputError(f"{job.folder} failed: "
                                 f"{(printed or ['no word'])[-1].removeprefix('error: ')}")
        progress.finish()
    progress.bar.close()


# ---- the table ----------------------------------------------------------------------------------


def make_table(jobs, args):
    """Write and print the tables of the runs that are finished: `best.pt` and the last epoch."""
    runs = []
    for job in jobs:
        if job.finished:
            best, last = (table.read_run(folder) for folder in job.tests)
            runs += [best, last._replace(name=f"{last.name}, last epoch")]
    print(f"{len(runs) // 2} of {len(jobs)} runs are finished")
    if runs:
        table.write_tables(runs, args.out / f"table_{args.dataset}", published=True)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dataset", choices=NOISE, required=True, help="whose table")
    parser.add_argument("--dataset_root", required=True, metavar="DIR",
                        help="folder of the data set (docs/reproduce.md)")
    parser.add_argument("--methods", nargs="+", choices=METHODS,
                        default=["npc_released", "clip_released"], help="files of configs/")
    parser.add_argument("--noise", nargs="+", type=ratio, default=None, metavar="RATIO",
                        help="noise ratios; without it those of the published table")
    parser.add_argument("--seeds", type=positive_int, default=1,
                        help=f"repetitions, from --seed {SEED} on, each with noise, bank and order "
                             "of its own")
    parser.add_argument("--out", type=Path, default=Path("logs/reproduce"), metavar="DIR",
                        help="folder of all runs and of the table")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true",
                      help="print the commands of the runs that are left, a line each, and stop")
    what.add_argument("--table", action="store_true",
                      help="make the table of the runs that are finished, and stop")
    args, more = parser.parse_known_args(argv)
    for option in ("--seed", "--noise_ratio", "--experiments", "--checkpoint_path"):
        if option in more:
            parser.error(f"{option} is set for each run; give --seeds, --noise or --out")

    captions = len(read_captions(split_folder(args.dataset_root) / "train_caps.txt"))
    jobs = [make_job(args, more, method, noise, seed, captions)
            for seed in range(SEED, SEED + args.seeds)
            for noise in (args.noise or NOISE[args.dataset]) for method in args.methods]
    left = [job for job in jobs if not job.finished]
    if args.print:
        for job in left:
            print(" && ".join(f"python {shlex.join(words)}" for words in job.commands()))
        return
    if left and not args.table:
        steps = sum(job.epochs * job.epoch_steps for job in left)
        print(f"{len(left)} of {len(jobs)} runs are left, {steps} steps at most; how long they "
              "take is said once each method has run for a minute (docs/speed.md)")
        run_all(left, args.out)
    make_table(jobs, args)


if __name__ == "__main__":
    main()
