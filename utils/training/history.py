"""What a run writes about itself: log lines, log.jsonl, weights.npz, TensorBoard."""

import json
import math
import time

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from utils.devices import HostCopy
from utils.distributed import is_main
from utils.errors import InputError
from utils.files import atomic_write
from utils.training.pair_weights import write_weights
from utils.training.tracking import start_wandb


class History:
    """Takes in the numbers of each step, gives those of an epoch, and writes both."""

    def __init__(self, run, pairs, epoch_steps):
        self.run, self.pairs, self.epoch_steps = run, pairs, epoch_steps
        self.w = torch.full((run.args.epochs, len(pairs)), torch.nan, device=run.device)
        self.lines, self.sums, self.steps = [], {}, 0  # sums over the epoch's steps, by name
        self.weighs = getattr(run.args, "weighting", "none") != "none"
        self.last = self.writer = None  # last: step, its pairs and its numbers, not looked at yet

    def state(self):
        """Everything that a resumed run needs to go on as if it had not stopped."""
        return {"lines": self.lines, "steps": self.steps, "weights": self.w, "sums": self.sums}

    def load(self, state):
        """Take up a `state`."""
        self.lines, self.steps = list(state["lines"]), int(state["steps"])
        self.sums = {name: total.to(self.run.device) for name, total in state["sums"].items()}
        w = state["weights"][: len(self.w)]
        if w.shape[1] == len(self.pairs):
            self.w[: len(w)] = w.to(self.run.device)

    def open(self, done):
        """Begin to write, after `done` steps in all."""
        if is_main():
            if self.run.args.wandb:
                start_wandb(self.run.args, self.run.folder)
            self.writer = SummaryWriter(self.run.folder, purge_step=done + 1 if done else None)

    def start_epoch(self, epoch, resumed):
        """Begin an epoch (from 0), or go on within it if `resumed`."""
        if not resumed:
            self.sums, self.steps = {}, 0
        self.epoch = epoch
        self._begin_line()

    def _begin_line(self):
        """Forget what the last line of the log told: numbers of its steps (k,), seconds waited."""
        self.recent, self.waited, self.clock = [], 0.0, time.perf_counter()

    def timed(self, batches):
        """The same batches; the seconds that each takes to come are counted."""
        since = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - since
            yield batch
            since = time.perf_counter()

    def add(self, step, rate, batch, numbers):
        """Take in the numbers of a step on a `Batch`, which lies on the device. They are checked
        one step later, so that a GPU is never waited for; w stays there until a checkpoint."""
        self.check()
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
        if step % self.run.args.display == 0 or step % self.epoch_steps == 0:
            self._show(step, rate, batch)

    def check(self):
        """Look at the numbers of the last step. Raises InputError if they are not finite."""
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

    def _show(self, step, rate, batch):
        """Means over the steps since the last line, in a line and in TensorBoard."""
        seconds = time.perf_counter() - self.clock
        speed = len(self.recent) * len(batch.indices) / seconds
        means = torch.stack(self.recent).mean(dim=0).tolist()
        scalars = dict(zip(self.sums, means, strict=True))
        parts = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
        self.run.log(f"epoch {self.epoch + 1}, step {self.steps}: {parts}, lr {rate:.3g}, "
                     f"{speed:.0f} pairs/s")
        scalars |= {"lr": rate, "pairs_per_second": speed, "data_wait_share": self.waited / seconds,
                    **{f"distinct_{what}_per_pair": len(distinct.rows.unique()) / len(batch.indices)
                       for what, distinct in (("images", batch.images),
                                              ("captions", batch.texts))}}
        self._scalars("train", scalars, step)
        self._begin_line()

    def _scalars(self, group, scalars, step):
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def epoch_means(self):
        """Means over the epoch's steps, by name; of `skipped` (amp_fp16) the number of steps."""
        return {name: total.item() / (1 if name == "skipped" else self.steps)
                for name, total in self.sums.items()}

    def record(self, record, weights):
        """Write the record of an epoch to the log, log.jsonl and TensorBoard, and the weights w so
        far, (epochs, n)."""
        epoch, scores = record["epoch"], record["dev"]
        done = epoch * self.epoch_steps
        self.run.log(f"epoch {epoch}: dev R@1 i2t {scores['i2t_R@1']:.2f}, t2i "
                     f"{scores['t2i_R@1']:.2f}, mean {scores['mean_R1']:.2f}, rsum "
                     f"{scores['rsum']:.2f}")
        self.lines.append(json.dumps(record))
        with atomic_write(self.run.folder / "log.jsonl") as f:
            f.writelines(f"{line}\n" for line in self.lines)
        w = weights[epoch - 1]
        if np.isfinite(w).any():
            write_weights(self.run.folder / "weights.npz", weights, self.pairs)
            from utils.scoring.diagnostics import show_weights  # seconds to import

            show_weights(self.writer, done, w, self.pairs)
        self._scalars("dev", scores, done)
        self.writer.flush()

    def close(self):
        """Finish writing."""
        if self.writer:
            self.writer.close()
