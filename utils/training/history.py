"""What a run says about itself: lines of log.txt, log.jsonl, weights.npz, TensorBoard."""

import datetime
import json
import math
import shlex
import sys
import time

import numpy as np
import torch

from utils.distributed import HostCopy, is_main
from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.method.pairs import fingerprint
from utils.progress import SECONDS

POINTS = 20  # steps between two points of a curve


class History:
    """Takes the numbers of each step, gives those of an epoch, and writes both."""

    def __init__(self, run, pairs, epoch_steps):
        self.run, self.pairs = run, pairs
        self.epoch_steps, self.total = epoch_steps, run.args.epochs * epoch_steps
        self.w = torch.full((run.args.epochs, len(pairs)), torch.nan, device=run.device)
        self.lines, self.ignored = [], 0  # of log.jsonl, and how many of them count for no best.pt
        self.initial = None  # dev scores of the initial model
        self.sums, self.steps = {}, 0  # over the epoch's steps, by name
        self.weighs = getattr(run.args, "weighting", "none") != "none"
        self.last = self.writer = None  # last: step, its pairs and its numbers, not checked yet
        self.told, self.spoke = [], time.monotonic()  # lines of an earlier log.jsonl; last log line

    def state(self):
        """Everything that a resumed run needs to go on as if it had not stopped."""
        return {"lines": self.lines, "ignored": self.ignored, "initial": self.initial,
                "steps": self.steps, "weights": self.w, "sums": self.sums}

    def load(self, state):
        """Continue from a `state`."""
        self.lines, self.steps = list(state["lines"]), int(state["steps"])
        self.ignored, self.initial = int(state["ignored"]), state["initial"]
        self.sums = {name: total.to(self.run.device) for name, total in state["sums"].items()}
        w = state["weights"][: len(self.w)]
        if w.shape[1] == len(self.pairs):
            self.w[: len(w)] = w.to(self.run.device)

    def open(self, done):
        """Begin to write, after `done` steps in all."""
        if is_main():
            if self.run.args.wandb:
                _start_wandb(self.run)
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self.writer = SummaryWriter(self.run.folder, purge_step=done + 1 if done else None)
            path = self.run.folder / "log.jsonl"
            self.told = path.read_text("utf-8").splitlines() if path.exists() else []

    def start_epoch(self, epoch, resumed):
        """Begin an epoch (from 0), or go on within it if `resumed`."""
        if not resumed:
            self.sums, self.steps = {}, 0
        self.epoch = epoch
        self._reset_means()

    def _reset_means(self):
        """Reset the running means: numbers of steps (k,) since the last point, seconds waited."""
        self.recent, self.waited, self.clock = [], 0.0, time.perf_counter()

    def timed(self, batches):
        """The same batches; the seconds that each takes to come are counted."""
        since = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - since
            yield batch
            since = time.perf_counter()

    # ---- a step ----

    def add(self, step, rate, batch, numbers):
        """Add the numbers of a step on a `Batch`, which lies on the device. They are checked one
        step later (`require_finite`); w stays on the device until a checkpoint."""
        w = numbers.pop("w", None)
        if w is not None:
            self.w[self.epoch][batch.indices] = w.float()
            if self.weighs:
                numbers |= {"w": w.mean(), "w<1": (w < 1).float().mean()}
        if self.run.precision.scaler.is_enabled():  # which skips a step with infinite gradients
            norm = numbers["grad_norm"]
            numbers |= {"skipped": ~norm.isfinite(), "grad_norm": norm.nan_to_num(0, 0, 0)}
        numbers = {name: value.detach().float() for name, value in numbers.items()}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in numbers.items()}
        self.steps += 1
        self.recent.append(torch.stack([*numbers.values()]))
        self.last = step, batch.indices, HostCopy(self.recent[-1])
        if step % (self.run.args.display or POINTS) == 0 or self.steps == self.epoch_steps:
            self._point(step, rate, batch)

    def require_finite(self):
        """Raise InputError if the numbers of the last step added are not finite."""
        if self.last is None:
            return
        (step, indices, values), self.last = self.last, None
        numbers = dict(zip(self.sums, values.get().tolist(), strict=True))
        if not all(map(math.isfinite, numbers.values())):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            ids = ", ".join(f"{i} ({self.pairs.image_ids[self.pairs.image_of[i]]})"
                            for i in indices.tolist())
            raise InputError(f"step {step} is not finite: {parts}; lower --lr or use --precision "
                             "fp32; checkpoints before it are intact; pairs of the batch (and "
                             f"their image ids): {ids}")

    def _point(self, step, rate, batch):
        """Write the means over the steps since the last point to TensorBoard and, unless a line was
        written just before, to the log."""
        seconds = time.perf_counter() - self.clock
        speed = len(self.recent) * len(batch.indices) / seconds
        scalars = dict(zip(self.sums, torch.stack(self.recent).mean(dim=0).tolist(), strict=True))
        if self.run.args.display or time.monotonic() - self.spoke > SECONDS:
            parts = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
            left = (self.total - step) * seconds / len(self.recent)
            self._log(f"epoch {self.epoch + 1}, step {self.steps} of {self.epoch_steps}: {parts}, "
                      f"lr {rate:.3g}, {speed:.0f} pairs/s, {duration(left)} left")
        scalars |= {"lr": rate, "pairs_per_second": speed, "data_wait_share": self.waited / seconds,
                    **{f"distinct_{what}_per_pair": len(distinct.rows.unique()) / len(batch.indices)
                       for what, distinct in (("images", batch.images),
                                              ("captions", batch.texts))}}
        self._scalars("train", scalars, step)
        self._reset_means()

    def _log(self, message):
        self.run.log(message)
        self.spoke = time.monotonic()

    def _scalars(self, group, scalars, step):
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    # ---- an epoch ----

    def record(self, done, rate, scores):
        """Write an epoch, after `done` steps in all, with the rate of its last step and its dev
        scores, to the log, log.jsonl, weights.npz and TensorBoard."""
        epoch, weights = self.epoch + 1, self.w.cpu().numpy()
        means = {name: total.item() / (1 if name == "skipped" else self.steps)  # amp_fp16's: steps
                 for name, total in self.sums.items()}
        line = json.dumps({"epoch": epoch, **means, "lr": rate, "dev": scores})
        self.lines.append(line)
        self._log(f"epoch {epoch}: dev {summary(scores)}, rsum {scores['rsum']:.2f}; batch_loss "
                  f"{means['batch_loss']:.4f}")
        if self.best()[0] == epoch:
            self.run.log(f"best so far: epoch {epoch}, dev mean R@1 {scores['mean_R1']:.2f}, in "
                         f"{self.run.folder / 'best.pt'}")
        w = weights[epoch - 1]
        if np.isfinite(w).any():
            write_weights(self.run.folder / "weights.npz", weights, self.pairs)
        if line not in self.told:  # a run that resumes here has its points already
            if np.isfinite(w).any():
                from utils.scoring.diagnostics import show_weights  # seconds to import

                show_weights(self.writer, done, w, self.pairs)
            self._scalars("dev", scores, done)
            self.writer.flush()
        with atomic_write(self.run.folder / "log.jsonl") as f:
            f.writelines(f"{line}\n" for line in self.lines)

    def best(self):
        """(epoch, dev scores) of the best epoch by mean R@1, the later one of equals, as in the
        released code; None before the first."""
        records = [json.loads(line) for line in self.lines[self.ignored :]]
        return max(((record["epoch"], record["dev"]) for record in records), default=None,
                   key=lambda found: (found[1]["mean_R1"], found[0]))

    def ignore_scores(self):
        """Choose best.pt among the epochs that are still to come."""
        self.ignored = len(self.lines)

    def conclude(self, seconds):
        """Log what the run made, in how many seconds, and how to score it."""
        epoch, scores = self.best()
        before = f"; initial model: {summary(self.initial)}" if self.initial else ""
        best = self.run.folder / "best.pt"
        self.run.log(
            f"finished in {duration(seconds)}: {best} is epoch {epoch}, dev {summary(scores)}"
            f"{before}\nscore it on test with:\n"
            f"  python {sys.argv[0]} --eval --resume {shlex.quote(str(best))}")

    def close(self):
        """Finish writing."""
        if self.writer:
            self.writer.close()


def summary(scores):
    """R@1 both ways and their mean, as text."""
    return (f"R@1 i2t {scores['i2t_R@1']:.2f}, t2i {scores['t2i_R@1']:.2f}, mean "
            f"{scores['mean_R1']:.2f}")


def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _start_wandb(run):
    """Start a run of Weights & Biases in the project `--wandb`, which copies the curves of
    TensorBoard. Raises InputError where wandb refuses, for instance without a login."""
    import wandb  # optional

    try:
        wandb.init(project=run.args.wandb, name=run.folder.name, dir=run.folder,
                   config=run.options(), sync_tensorboard=True)
    except wandb.Error as error:
        raise InputError(f"--wandb {run.args.wandb}: {' '.join(str(error).split())} "
                         "(WANDB_MODE=offline works without a login)") from error


# ---- weights.npz --------------------------------------------------------------------------------


def write_weights(path, w, pairs):
    """Write the weights w (epochs, pairs) float32 that NPC gave the pairs, NaN where a pair was not
    drawn, and the hash of `pairs`."""
    with atomic_write(path, "wb") as f:
        np.savez_compressed(f, w=w, pairs=fingerprint(pairs))


def mean_weights(path, pairs):
    """Mean (n,) float64 over the epochs of the weights in a file, NaN for a pair that was never
    drawn. Raises InputError when the file is absent or broken, holds no weight at all or an
    infinite one, or belongs to other pairs than `pairs`."""
    advice = "main_NPC.py writes a weights.npz to the folder of its run"
    with parsing(path, "a file of weights", advice), np.load(path, allow_pickle=False) as data:
        w = data["w"].astype(np.float64)
        belongs_to = str(data["pairs"]) if "pairs" in data else None
        if w.ndim != 2 or np.isnan(w).all() or np.isinf(w).any():
            raise ValueError("no weights, or infinite weights")
    if w.shape[1] != len(pairs) or belongs_to not in (None, fingerprint(pairs)):
        raise InputError(f"{path} holds weights of {w.shape[1]} pairs with other captions than the "
                         f"{len(pairs)} of {pairs.source}; give --dataset_root and --noise_ratio "
                         "of that run")
    drawn = ~np.isnan(w)
    total, count = np.where(drawn, w, 0).sum(axis=0), drawn.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
