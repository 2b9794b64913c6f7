"""What a run writes about itself: log lines, log.jsonl, weights.npz, TensorBoard."""

import json
import math
import time

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from utils.distributed import Later, is_main
from utils.errors import InputError
from utils.files import atomic_write
from utils.report.pair_weights import write_weights


class History:
    """Takes in the numbers of each step, gives those of an epoch, and writes both."""

    def __init__(self, run, pairs, epoch_steps):
        self.run, self.pairs, self.epoch_steps = run, pairs, epoch_steps
        self.folder, self.display = run.folder, run.args.display
        self.weights = np.full((run.args.epochs, len(pairs)), np.nan, np.float32)
        self.lines, self.sums, self.steps, self.writer = [], {}, 0, None
        self.drawn, self.recent = [], None

    def state(self):
        """Everything that a resumed run needs to go on as if it had not stopped."""
        self._collect()
        return {"lines": self.lines, "steps": self.steps, "weights": torch.from_numpy(self.weights),
                "sums": {k: torch.as_tensor(v).cpu() for k, v in self.sums.items()}}

    def load(self, state):
        """Take up a `state`."""
        self.lines, self.steps = list(state["lines"]), int(state["steps"])
        self.sums = {k: v.to(self.run.device) for k, v in state["sums"].items()}
        old = state["weights"].numpy()
        if old.shape[1] == len(self.pairs):
            self.weights = np.concatenate([old, self.weights[len(old) :]])

    def open(self, done):
        """Begin to write, after `done` steps in all."""
        if is_main():
            self.writer = SummaryWriter(self.folder, purge_step=done + 1 if done else None)

    def start_epoch(self, epoch, resumed):
        """Begin an epoch (from 0), or go on within it if `resumed`."""
        if not resumed:
            self.sums, self.steps = {}, 0
        self.epoch, self.drawn = epoch, []
        self.recent = None  # numbers of the step before, not looked at yet
        self.clock = self.waiting_since = time.perf_counter()
        self.since, self.waited = 0, 0.0

    def data_arrived(self):
        """Tell that the next batch is there."""
        self.waited += time.perf_counter() - self.waiting_since

    def add(self, step, rate, batch, numbers):
        """Take in the numbers of a step. They are looked at one step later, so that a GPU is never
        waited for."""
        indices = batch.indices.clone()  # a worker's would hold a file descriptor for so long
        w = numbers.pop("w", None)
        if w is not None:
            self.drawn.append((indices, w))
            numbers = {**numbers, "w": w.mean(), "w<1": (w < 1).float().mean()}
        if self.run.precision.scaler.is_enabled():  # which skips a step with infinite gradients
            norm = numbers["grad_norm"]
            numbers |= {"skipped": (~norm.isfinite()).float(),
                        "grad_norm": norm.nan_to_num(0, 0, 0)}
        numbers = {name: value.detach() for name, value in numbers.items()}
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.check()
        self.recent = step, indices, list(numbers), Later(torch.stack(
            [value.float() for value in numbers.values()]))
        self.steps, self.since = self.steps + 1, self.since + len(indices)
        if step % self.display == 0 or step % self.epoch_steps == 0:
            self._show(step, rate, batch, numbers)
        self.waiting_since = time.perf_counter()

    def check(self):
        """Raise InputError if the step before was not finite."""
        if self.recent is None:
            return
        step, indices, names, values = self.recent
        numbers = dict(zip(names, values.get().tolist(), strict=True))
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            ids = ", ".join(f"{i} ({self.pairs.image_ids[self.pairs.image_of[i]]})"
                            for i in indices.tolist())
            raise InputError(f"step {step} is not finite: {parts}; lower --lr or use --precision "
                             "fp32; checkpoints before it are intact; pairs of the batch (and "
                             f"their image ids): {ids}")

    def _show(self, step, rate, batch, numbers):
        seconds = time.perf_counter() - self.clock
        scalars = {name: value.item() for name, value in numbers.items()}
        parts = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
        self.run.log(f"epoch {self.epoch + 1}, step {self.steps}: {parts}, lr {rate:.3g}, "
                     f"{self.since / seconds:.0f} pairs/s")
        scalars |= {"lr": rate, "pairs_per_second": self.since / seconds,
                    "data_wait_share": self.waited / seconds,
                    "distinct_images": batch.images.total / len(batch.indices),
                    "distinct_captions": batch.texts.total / len(batch.indices)}
        self._scalars("train", scalars, step)
        self.clock, self.since, self.waited = time.perf_counter(), 0, 0.0

    def _scalars(self, group, scalars, step):
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def _collect(self):
        """Move the weights drawn so far to their places in `weights`."""
        if self.drawn:
            columns = zip(*self.drawn, strict=True)
            indices, w = (torch.cat([x.cpu() for x in column]) for column in columns)
            self.weights[self.epoch, indices.numpy()] = w.float().numpy()
            self.drawn = []

    def epoch_means(self):
        """Means over the epoch's steps, by name; of `skipped` (amp_fp16) the number of steps."""
        return {name: total.item() / (1 if name == "skipped" else self.steps)
                for name, total in self.sums.items()}

    def record(self, record, done):
        """Write the record of an epoch, which ended after `done` steps in all, to log.jsonl and
        TensorBoard, and the weights so far."""
        self._collect()
        self.lines.append(json.dumps(record))
        if not is_main():
            return
        with atomic_write(self.folder / "log.jsonl") as f:
            f.writelines(f"{line}\n" for line in self.lines)
        w = self.weights[record["epoch"] - 1]
        if np.isfinite(w).any():
            write_weights(self.folder / "weights.npz", self.weights, self.pairs)
            from utils.report.diagnostics import show_weights  # seconds to import

            show_weights(self.writer, done, w, self.pairs)
        self._scalars("dev", record["dev"], done)
        self.writer.flush()

    def close(self):
        """Finish writing."""
        if self.writer:
            self.writer.close()
