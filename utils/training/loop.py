"""The training loop: schedule, progress, log, weights, dev scores and checkpoints around a step."""

import errno
import hashlib
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data import explain_deaths
from utils import checkpoints
from utils.distributed import Later, anyone, is_main, stop, world
from utils.errors import InputError
from utils.files import atomic_write
from utils.method.memorybank import fingerprint
from utils.report.retrieval import evaluate
from utils.training.schedule import Schedule

INTERRUPTED = 75  # exit status after SIGTERM or SIGINT, when a checkpoint to resume from was saved


def adamw(model, args):
    """AdamW over all parameters of `model`, decayed alike, as CLIP's fine-tuners do.

    With half weights it is the unfused one, whose every operation rounds to half, as released. The
    fused kernel computes in fp32 and rounds what it stores, so that a second moment still counts in
    its own step if it underflows. Raises InputError when eps is zero in half.
    """
    half = any(p.dtype == torch.float16 for p in model.parameters())
    if half and not torch.tensor(args.eps).half():
        raise InputError(f"--eps {args.eps:g} is zero in half precision, where second moments are "
                         "too; use 1e-6, or another --precision")
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(args.beta1, args.beta2),
                             eps=args.eps, weight_decay=args.weight_decay, fused=not half)


def prepare_towers(model, args):
    """Apply --grad_checkpointing and --compile to a model, in place."""
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:  # A' takes a gradient through the graph before A does: it must be retained
        if hasattr(torch._functorch.config, "donated_buffer"):
            torch._functorch.config.donated_buffer = False
        model.visual.compile(dynamic=True)
        model.transformer.compile(dynamic=True)


@torch.no_grad()
def limit_logit_scale(model, recipe):
    """Keep the learned log temperature at or below the recipe's limit."""
    if math.isfinite(recipe.max_logit_scale):
        model.logit_scale.clamp_(max=recipe.max_logit_scale)


def fit(run, model, dev, optimizers, loader, step):
    """Train `model` for the steps that remain.

    dev: the `Pairs` that choose the best epoch. optimizers: name in the checkpoint -> optimiser,
    all on one schedule. step(batch) makes one optimiser step on a `Step` and returns its numbers:
    scalar tensors by name, `loss` and `grad_norm` among them, and under "w" the weights (B,) of its
    pairs if it has any. After each epoch: dev scores, checkpoint, log.jsonl, weights.npz,
    TensorBoard. SIGTERM and SIGINT save a checkpoint after the step at hand and exit with status
    `INTERRUPTED`. Raises InputError when a loss or gradient is not finite.
    """
    args, pairs = run.args, loader.dataset.pairs
    schedule = Schedule(args, run.recipe, len(loader), len(pairs))
    history = History(run, pairs, len(loader))
    saver = Saver(run, model, optimizers, history, identity(loader.dataset))
    first_epoch, first_batch = divmod(saver.restore(), len(loader))
    if first_epoch >= args.epochs:
        run.log(f"{args.resume} has done {first_epoch} epochs already: nothing left of --epochs "
                f"{args.epochs}")
        return
    if schedule.warmup >= args.epochs * len(loader):
        run.log(f"warning: --warmup {args.warmup} is not shorter than the training of "
                f"{args.epochs * len(loader)} steps: the learning rate never falls")
    run.write_options("options.json")
    run.log(f"training: {len(pairs)} pairs, batch size {args.batch_size}, {len(loader)} steps an "
            f"epoch, epochs {first_epoch + 1} to {args.epochs}, {args.precision} on {run.device}")

    with (interruptions(run.device) as interrupted, explain_deaths(pairs.images),
          explain_full_disk(run.folder)):
        for epoch in range(first_epoch, args.epochs):
            loader.sampler.epoch, loader.sampler.first = epoch, first_batch
            model.train(run.recipe.batch_norm_trains)
            done = epoch * len(loader) + first_batch
            history.start_epoch(epoch, done, resumed=first_batch > 0)
            for index, batch in enumerate(progress(loader, args, epoch, first_batch), first_batch):
                history.data_arrived()
                rate = schedule(epoch, index)
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                done = epoch * len(loader) + index + 1
                history.add(done, rate, batch, step(batch.to(run.device)))
                leaving = interrupted()
                due = args.save_every and done % args.save_every == 0
                if (leaving or due) and index + 1 < len(loader):
                    saver.save(f"step{done}.pt", epoch, done)
                    if leaving:
                        leave(run, f"step {done}")
            first_batch = 0

            record = history.finish_epoch()
            scores = evaluate(model, dev, args, run.precision)
            run.log(f"epoch {epoch + 1}: dev R@1 i2t {scores['i2t_R@1']:.2f}, t2i "
                    f"{scores['t2i_R@1']:.2f}, mean {scores['mean_R1']:.2f}, rsum "
                    f"{scores['rsum']:.2f}")
            history.record({"epoch": epoch + 1, **record, "lr": rate, "dev": scores}, done)
            saver.save(f"epoch{epoch + 1}.pt", epoch + 1, done, scores["mean_R1"])
            if interrupted(now=True) and epoch + 1 < args.epochs:
                leave(run, f"epoch {epoch + 1}")
    history.close()
    stop()


def identity(dataset):
    """What a run is trained on, as a hash (hex): the pairs of a `StepDataset` and, if it has any,
    their memory entries."""
    digest = hashlib.sha256(fingerprint(dataset.pairs).encode())
    if dataset.bank is not None:
        digest.update(dataset.bank.image_entry.tobytes() + dataset.bank.caption_entry.tobytes())
    return digest.hexdigest()


@contextmanager
def interruptions(device):
    """SIGTERM and SIGINT no longer end the process: the function given tells whether one came. With
    several processes it asks all of them, so that all leave at the same step, and its answer is
    that of its call before, for which no GPU has to be waited for, unless `now`."""
    arrived = []
    answer = Later(torch.zeros(()))

    def interrupted(now=False):
        nonlocal answer
        if world() == 1:
            return bool(arrived)
        previous, answer = answer, Later(anyone(bool(arrived), device))
        return bool((answer if now else previous).get())

    before = {number: signal.signal(number, lambda number, _: arrived.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(run, where):
    """End the process after an interruption, once the main process has saved."""
    run.log(f"interrupted after {where}; a checkpoint is saved, --resume auto continues")
    stop()
    sys.exit(INTERRUPTED)


@contextmanager
def explain_full_disk(folder):
    """Turn the error of a log file that does not fit on the disk into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"cannot write to {folder}: {error.strerror}; older checkpoints are "
                         "intact, --resume auto continues once there is room") from error


def progress(loader, args, epoch, first):
    """The batches of an epoch, behind a bar of pairs."""
    bar = tqdm(total=len(loader) * args.batch_size, initial=first * args.batch_size, unit="pair",
               unit_scale=True, desc=f"epoch {epoch + 1}/{args.epochs}",
               disable=None if is_main() else True)
    with bar:
        for batch in loader:
            yield batch
            bar.update(args.batch_size)


class Saver:
    """Writes and restores the checkpoints of a run; see utils.training.checkpoints for what they hold."""

    def __init__(self, run, model, optimizers, history, data):
        self.run, self.model, self.optimizers, self.history = run, model, optimizers, history
        self.data, self.best, self.best_epoch = data, 0.0, 0
        if is_main():
            checkpoints.clean(run.folder)

    def restore(self):
        """Take up the state of the checkpoint that the run continues; returns the steps done."""
        state, args = self.run.state, self.run.args
        if not state:
            if any(self.run.folder.glob("epoch*.pt")):
                self.run.log(f"warning: {self.run.folder} holds the checkpoints of an earlier run, "
                             "which this one replaces as it goes; --experiments NAME keeps both")
            return 0
        if {name for name in state if name.endswith("optimizer")} != set(self.optimizers):
            raise InputError(f"{args.resume} was trained by another script; start from its weights "
                             "with --vision_model instead")
        if state["data"] != self.data and not args.force_resume:
            raise InputError(f"{args.resume} was trained on other pairs or memory entries than "
                             "--dataset_root has now; start from its weights with --vision_model, "
                             "or insist with --force_resume")
        try:
            for name, optimizer in self.optimizers.items():
                checkpoints.load_optimizer(optimizer, state[name])
            if state["scaler"]:
                self.run.precision.scaler.load_state_dict(state["scaler"])
            self.history.load(state["history"])
        except Exception as error:  # a crafted file can provoke anything
            raise checkpoints.broken_state(args.resume, error) from error
        self._take_up_best(state)
        self.run.state = {}  # frees the memory
        return state["step"]

    def _take_up_best(self, state):
        """Make best.pt what it was when the checkpoint was saved: a run that was killed just then
        may not have come to it. Without that epoch's file best.pt stays, if there is one."""
        self.best, self.best_epoch = state["best_score"], state["best_epoch"]
        if not is_main():
            return
        best, target = (Path(self.run.args.resume).with_name(f"epoch{self.best_epoch}.pt"),
                        self.run.folder / "best.pt")
        if best.is_file():
            checkpoints.hard_link(best, target)
        elif not target.is_file():
            self.best = 0.0

    def save(self, name, epoch, step, score=None):
        """Write a checkpoint after `step` steps and `epoch` epochs; `score`, the dev mean R@1 at an
        epoch's end, makes it also best.pt where none was better (ties go to the later epoch, as in
        the released code)."""
        self.history.check()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise InputError(f"after step {step} the weights are not finite; lower --lr or use "
                             "--precision fp32; checkpoints before it are intact")
        best = score is not None and score >= self.best
        if best:
            self.best, self.best_epoch = score, epoch
        if not is_main():
            return
        run = self.run
        path = run.folder / name
        checkpoints.save(path, {
            "epoch": epoch, "step": step, "name": run.args.name,
            "state_dict": {k: v.detach().cpu() for k, v in self.model.state_dict().items()},
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": run.precision.scaler.state_dict(), "args": checkpoints.plain(run.args),
            "data": self.data, "best_score": self.best, "best_epoch": self.best_epoch,
            "history": self.history.state(),
        })
        if best:
            checkpoints.hard_link(path, run.folder / "best.pt")
            run.log(f"best so far: {path}, dev mean R@1 {score:.2f}")
        checkpoints.prune(run.folder, run.args.keep_checkpoints)


class History:
    """What a run writes about itself: log lines, log.jsonl, weights.npz, TensorBoard."""

    def __init__(self, run, pairs, epoch_steps):
        self.run, self.pairs, self.epoch_steps = run, pairs, epoch_steps
        self.folder, self.display = run.folder, run.args.display
        self.weights = np.full((run.args.epochs, len(pairs)), np.nan, np.float32)
        self.lines, self.sums, self.steps, self.writer = [], {}, 0, None
        self.recent = None

    def state(self):
        """Everything that a resumed run needs to go on as if it had not stopped."""
        self._collect()
        return {"lines": self.lines, "steps": self.steps, "weights": torch.from_numpy(self.weights),
                "sums": {k: torch.as_tensor(v).cpu() for k, v in self.sums.items()}}

    def load(self, state):
        """Take up a `state`."""
        self.lines, self.steps = list(state["lines"]), int(state["steps"])
        self.sums = {k: v.to(self.run.device) for k, v in state["sums"].items()}
        old = state["weights"].numpy()[: len(self.weights)]
        if old.shape[1] == self.weights.shape[1]:
            self.weights[: len(old)] = old

    def start_epoch(self, epoch, done, resumed):
        """Begin an epoch (from 0), or go on within it if `resumed`, after `done` steps in all."""
        if self.writer is None and is_main():
            self.writer = SummaryWriter(self.folder, purge_step=done + 1 if done else None)
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
        pairs = batch.pairs.clone()  # one from a worker would hold a file descriptor for so long
        w = numbers.pop("w", None)
        if w is not None:
            self.drawn.append((pairs, w))
            numbers = {**numbers, "w": w.mean(), "w<1": (w < 1).float().mean()}
        if self.run.precision.scaler.is_enabled():  # which skips a step with infinite gradients
            norm = numbers["grad_norm"]
            numbers |= {"skipped": (~norm.isfinite()).float(),
                        "grad_norm": norm.nan_to_num(0, 0, 0)}
        numbers = {name: value.detach() for name, value in numbers.items()}
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.check()
        self.recent = step, pairs, list(numbers), Later(torch.stack(
            [value.float() for value in numbers.values()]))
        self.steps, self.since = self.steps + 1, self.since + len(batch.pairs)
        if step % self.display == 0 or step % self.epoch_steps == 0:
            self._show(step, rate, batch, numbers)
        self.waiting_since = time.perf_counter()

    def check(self):
        """Raise InputError if the step before was not finite."""
        if self.recent is None:
            return
        step, pairs, names, values = self.recent
        numbers = dict(zip(names, values.get().tolist(), strict=True))
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            ids = ", ".join(f"{i} ({self.pairs.image_ids[self.pairs.image_of[i]]})"
                            for i in pairs.tolist())
            raise InputError(f"step {step} is not finite: {parts}; lower --lr or use --precision "
                             "fp32; checkpoints before it are intact; pairs of the batch (and "
                             f"their image ids): {ids}")

    def _show(self, step, rate, batch, numbers):
        seconds = time.perf_counter() - self.clock
        parts = ", ".join(f"{name} {value.item():.4f}" for name, value in numbers.items())
        self.run.log(f"epoch {self.epoch + 1}, step {self.steps}: {parts}, lr {rate:.3g}, "
                     f"{self.since / seconds:.0f} pairs/s")
        if self.writer:
            scalars = {name: value.item() for name, value in numbers.items()}
            scalars |= {"lr": rate, "pairs_per_second": self.since / seconds,
                        "data_wait_share": self.waited / seconds,
                        "distinct_images": batch.images.total / len(batch.pairs),
                        "distinct_captions": batch.texts.total / len(batch.pairs)}
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, step)
        self.clock, self.since, self.waited = time.perf_counter(), 0, 0.0

    def _collect(self):
        """Move the weights drawn so far to their places in `weights`."""
        if self.drawn:
            columns = zip(*self.drawn, strict=True)
            pairs, w = (torch.cat([x.cpu() for x in column]) for column in columns)
            self.weights[self.epoch, pairs.numpy()] = w.float().numpy()
            self.drawn = []

    def finish_epoch(self):
        """Means over the epoch's steps, by name; of `skipped` (amp_fp16) the number of steps."""
        self.check()
        self._collect()
        return {name: total.item() / (1 if name == "skipped" else self.steps)
                for name, total in self.sums.items()}

    def record(self, record, done):
        """Write the record of an epoch, which ended after `done` steps in all, to log.jsonl and
        TensorBoard, and the weights so far."""
        self.lines.append(json.dumps(record))
        if not is_main():
            return
        with atomic_write(self.folder / "log.jsonl") as f:
            f.writelines(f"{line}\n" for line in self.lines)
        if np.isfinite(self.weights[self.epoch]).any():
            with atomic_write(self.folder / "weights.npz", "wb") as f:
                np.savez_compressed(f, w=self.weights)
            from utils.report.diagnostics import show_weights  # seconds to import, and only for weights

            show_weights(self.writer, done, self.weights[self.epoch], self.pairs)
        for name, value in record["dev"].items():
            self.writer.add_scalar(f"dev/{name}", value, done)
        self.writer.flush()

    def close(self):
        """Finish writing."""
        if self.writer:
            self.writer.close()
