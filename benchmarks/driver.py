"""Runs commands of this repository, each in a process of its own, and reuses finished runs."""

import argparse
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import time
from multiprocessing import connection
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT.resolve()))

from params import positive_int
from utils.errors import InputError
from utils.files import atomic_write

# Commands are forked from a process that has imported what they need: this saves seconds each
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "main_NPC", "sklearn.mixture", "torch._dynamo"])
STOPPED = 75  # exit status after a signal, as of a training that saved a checkpoint
DRAWN = "drawings"  # folder of the set that models are fine-tuned on
TRAIN, TEST = 400, 300  # images in it
BATCH, LR = 128, 3e-4  # of the fine-tuning


class Job(NamedTuple):
    """A run: `commands`, each (script, *options), that fill `folder`.

    scored: the folder whose eval_test.json is shown at the end. hook(): called in the process of
    each command before it starts. resumed: the commands continue what they find and print to the
    terminal; else they start in an empty folder, print to output.txt and keep no checkpoint.
    """

    title: str
    folder: Path
    commands: list
    scored: Path | None = None
    hook: object = None
    resumed: bool = False

    @property
    def text(self):
        """The commands as a shell takes them, a line each."""
        return "".join(f"python {shlex.join(map(str, (ROOT / script, *options)))}\n"
                       for script, *options in self.commands)

    @property
    def finished(self):
        """Whether exactly these commands have finished."""
        done = self.folder / "commands.txt"
        return done.exists() and done.read_text() == self.text


class Method(NamedTuple):
    """How a pre-trained model is fine-tuned on drawings. The folders of its runs begin with
    `folder`. hook: see `Job`."""

    folder: str
    script: str = "main_NPC.py"
    epochs: int = 3
    options: tuple = ()
    hook: object = None


# ---- running -------------------------------------------------------------------------------------


def run_jobs(jobs, at_once=1):
    """Run `jobs`, `at_once` at a time, except those that are finished. The first that fails ends
    the others and raises InputError. A signal is passed on to the commands, so that a training
    saves its state, and ends the process with status `STOPPED`."""
    todo, running, stopped = list(jobs), {}, []

    def stop(number, _):
        for process in running:
            (process.kill if stopped else process.terminate)()  # a second signal ends them at once
        stopped.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, stop)
    with tqdm(total=len(jobs), unit="run", disable=None) as bar:
        try:
            while (todo or running) and not stopped:
                if todo and len(running) < at_once:
                    job = todo.pop(0)
                    steps = run_job(job)
                elif ended := connection.wait([p.sentinel for p in running], timeout=1):
                    process = next(p for p in running if p.sentinel == ended[0])
                    job, steps = running.pop(process)
                    if stopped:
                        break
                else:
                    continue
                process = next(steps)
                if isinstance(process, str):
                    scores = read_scores(job.scored) if job.scored else {}
                    said = [f"mean R@1 {scores['mean_R1']:.1f}"] if scores else []
                    bar.write(f"{job.title}: {', '.join([*said, process])}")
                    bar.update()
                else:
                    running[process] = job, steps
                    if stopped:  # while it started
                        process.terminate()
        finally:
            for process in () if stopped else running:
                process.terminate()
            for process in running:
                process.join()
    if stopped:
        sys.exit(STOPPED)


def run_job(job):
    """Yields the process of each command of a job when it has started, to be resumed when it has
    ended, and at last how long that took, as text. Raises InputError when a command fails.

    commands.txt in the job's folder has the commands, seconds.txt the CPU seconds of each.
    """
    start, log = time.perf_counter(), None if job.resumed else job.folder / "output.txt"
    if job.finished:
        yield "reused"
    if not job.resumed:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    for words, line in zip(job.commands, job.text.splitlines(), strict=True):
        if job.resumed:
            print(f"$ {line}", flush=True)
        process = PROCESSES.Process(target=run_script, args=(words, log, job.hook))
        process.start()
        yield process
        process.join()
        if process.exitcode:
            last = f"it ended with status {process.exitcode}"
            lines = ["", *log.read_text().splitlines()] if log else [""]
            if lines[-1].startswith("error: "):  # else it was killed, or has a bug
                last = lines[-1].removeprefix("error: ")
            raise InputError(f"{job.title}: {Path(words[0]).name}: {last}; all that it printed "
                             f"{f'is in {log}' if log else 'stands above'}")
    for checkpoint in () if job.resumed else job.folder.glob("*.pt"):
        checkpoint.unlink()  # it is tested, and takes tens of megabytes
    with atomic_write(job.folder / "commands.txt") as f:
        f.write(job.text)
    yield f"{time.perf_counter() - start:.0f} s"


def run_script(words, log, hook):
    """Do as `python SCRIPT OPTIONS` does, in a process of its own that signals of the terminal do
    not reach. With `log`, print to the end of that file and add the CPU seconds to seconds.txt
    beside it: other processes on the machine hardly change these."""
    os.setsid()
    if log:
        with open(log, "a") as output:
            os.dup2(output.fileno(), sys.stdout.fileno())
            os.dup2(output.fileno(), sys.stderr.fileno())
    sys.argv = [str(ROOT / words[0]), *map(str, words[1:])]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    if hook:
        hook()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if log:
            with open(log.with_name("seconds.txt"), "a") as seconds:
                print(f"{time.process_time():.2f}", file=seconds)


# ---- drawings, and the small model that is fine-tuned on them ------------------------------------


def pretraining(folder, seed, source=6000):
    """The `Job` that draws `source` images of one domain and, in `folder`/drawings, a set of
    another one, and that pre-trains a tiny CLIP, `folder`/pretrained/best.pt, on the first."""
    draw = "dataset/make_scenes.py", "--seed", seed
    return Job(f"seed {seed}, pre-training", folder, [
        (*draw, "--out", folder / "source", "--domain", "source", "--train", source),
        (*draw, "--out", folder / DRAWN, "--train", TRAIN, "--test", TEST),
        training("main_CLIP.py", seed, folder, "source", "pretrained", "tiny", 2, 1e-3),
        testing("main_CLIP.py", seed, folder, "pretrained/best.pt", "zero-shot"),
    ], folder / "zero-shot")


def fine_tuning(folder, seed, what, run, method, options, lr=LR, data=DRAWN, hook=None):
    """The `Job` that fine-tunes the model of `pretraining` in folder/run and tests it there after
    its last epoch. what: its title, after the seed."""
    train = training(method.script, seed, folder, data, run, folder / "pretrained" / "best.pt",
                     method.epochs, lr)
    test = testing(method.script, seed, folder, f"{run}/epoch{method.epochs}.pt", f"{run}/last")
    return Job(f"seed {seed}, {what}", folder / run,
               [(*train, *options, *method.options), test], folder / run / "last",
               hook or method.hook)


def training(script, seed, folder, data, run, model, epochs, lr):
    return command(script, seed, folder, data, run, "--vision_model", model, "--batch_size", BATCH,
                   "--epochs", epochs, "--lr", lr)


def testing(script, seed, folder, checkpoint, run):
    return command(script, seed, folder, DRAWN, run, "--eval", "--resume", folder / checkpoint)


def command(script, seed, folder, data, run, *more):
    """The words of a command that reads folder/data and writes to folder/run."""
    return (script, "--dataset", "f30k", "--dataset_root", folder / data, "--checkpoint_path",
            folder, "--experiments", run, "--seed", seed, "--device", "cpu", "--num_workers", 0,
            *more)


# ---- results -------------------------------------------------------------------------------------


def options_of(doc, seeds=3):
    """The parser of a benchmark on drawings; its runs take one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description=doc.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder of all runs and results")
    add("--seeds", type=positive_int, default=seeds, help="repetitions, each with data of its own")
    add("--jobs", type=positive_int, default=min(8, os.cpu_count() or 1), help="runs at a time")
    return parser


def read_scores(folder):
    """The content of an eval_test.json, of MSCOCO that of 5K."""
    scores = json.loads((folder / "eval_test.json").read_text())
    return scores.get("5K", scores)


def read_seconds(folder):
    """CPU seconds of all commands of a finished run."""
    return sum(map(float, (folder / "seconds.txt").read_text().split()))


def spread(values, digits=1):
    """Mean ± standard deviation over the seeds; the mean alone where there is one seed."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def table(head, rows, kind="pipe", left=1):
    """A table of text cells; columns after the first `left` are aligned to the right. kind:
    tabulate's name of the format, `pipe` for Markdown."""
    from tabulate import tabulate  # not needed to measure, nor by tests on a GPU

    return tabulate([list(row) for row in rows], head, tablefmt=kind, disable_numparse=True,
                    colalign=["left"] * left + ["right"] * (len(head) - left))


def save_figure(figure, path):
    """Write a matplotlib figure to path.png and, as vectors, to path.pdf."""
    for kind, settings in (("png", {"dpi": 150}), ("pdf", {"metadata": {"CreationDate": None}})):
        with atomic_write(Path(path).with_suffix(f".{kind}"), "wb") as f:
            figure.savefig(f, format=kind, **settings)


def write_report(path, text, start):
    """Print the report of a benchmark that began at `start` and write it to `path`."""
    with atomic_write(path) as f:
        f.write(text)
    print(f"\n{text}\n{time.perf_counter() - start:.0f} s; wrote {path}")
