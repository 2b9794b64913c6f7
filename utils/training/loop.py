"""The training loop: what happens around a step, in the order in which it happens."""

import math
import time
from contextlib import nullcontext

import torch

from utils.distributed import is_main, leave_processes
from utils.method.optimizer import replays, set_rate, trains_batch_norm
from utils.progress import progress
from utils.reading.images import check_images
from utils.scoring.retrieval import evaluate
from utils.training import checkpoints
from utils.training.history import History
from utils.training.interruptions import end_interrupted, interruptions
from utils.training.replay import Replay

WARMUP = 500  # steps, of runs that are long enough


def fit(run, model, dev, optimizers, loader, step, kept=()):
    """Train `model` for the steps that remain.

    dev: the `Pairs` that choose the best epoch. optimizers: name in the checkpoint -> optimiser,
    all on one schedule. step(batch) makes one optimiser step on a `Batch` and returns its numbers:
    scalar tensors by name, `batch_loss` and `grad_norm` among them, and under "w" the weights (B,)
    of its pairs if it has any. kept: tensors by name that the step changes in place; checkpoints
    hold them.

    SIGTERM, SIGINT and SIGHUP save a checkpoint after the step at hand and exit with status
    `INTERRUPTED`. Raises InputError when a loss or gradient is not finite, or a checkpoint cannot
    be written.
    """
    args, pairs, epoch_steps = run.args, loader.dataset.pairs, len(loader)
    started = time.monotonic()
    schedule = Schedule(args, run.recipe, epoch_steps, len(loader.sampler.chosen))
    history = History(run, pairs, epoch_steps)
    state = checkpoints.TrainingState(run, model, optimizers, history, loader, dev, dict(kept))
    state.restore()
    if replays(args) and not trains_batch_norm(model, args, run.recipe):
        step = Replay(step, run.log)
    check_images(args, pairs.images, dev.images)
    run.begin()
    state.restore_best()
    run.write_options("options.json")
    announce(run, loader, schedule, state)

    history.open(state.step)
    with interruptions(run.device) as interrupted:
        if state.step == 0:
            history.initial = score(run, model, dev)
        # A run that stopped after the last step of an epoch comes back to score it
        resumed_at_end = state.step > 0 and state.batch == 0
        first_epoch = state.epoch - 1 if resumed_at_end else state.epoch
        first_batch = epoch_steps if resumed_at_end else state.batch
        for epoch in range(first_epoch, args.epochs):
            loader.sampler.epoch, loader.sampler.first = epoch, first_batch
            model.train(trains_batch_norm(model, args, run.recipe))
            history.start_epoch(epoch, resumed=first_batch > 0)
            bar = progress(loader, lines=False, desc=f"epoch {epoch + 1}/{args.epochs}",
                           initial=first_batch, unit="pair", unit_scale=args.batch_size)
            for index, batch in enumerate(history.timed(bar), first_batch):
                rate = schedule(epoch, index)
                for optimizer in optimizers.values():
                    set_rate(optimizer, rate)
                batch = batch.to(run.device)
                numbers = step(batch)
                state.advance()
                history.require_finite()  # the numbers of the step before: a GPU is not waited for
                history.add(state.step, rate, batch, numbers)

                leaving = interrupted()
                due = args.save_every and state.step % args.save_every == 0
                if (leaving or due) and state.batch:
                    state.save(f"step{state.step}.pt")
                    if leaving:
                        end_interrupted(run, f"step {state.step}")

            # The checkpoint is whole before the score of its epoch is told
            if first_batch < epoch_steps:
                state.save(f"epoch{epoch + 1}.pt")
                if interrupted(now=True):
                    end_interrupted(run, f"epoch {epoch + 1}")
            scores = score(run, model, dev)
            if is_main():
                history.record(state.step, schedule(epoch, epoch_steps - 1), scores)
                if history.best()[0] == epoch + 1:
                    state.link_best(epoch + 1)
            first_batch = 0
    if is_main():
        for path in run.folder.glob("step*.pt"):
            path.unlink()
        history.conclude(time.monotonic() - started)
    history.close()
    leave_processes()


def score(run, model, dev):
    """Dev scores of `model`, which runs without torch.compile, as these shapes hardly repeat."""
    compiled = run.args.compile
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        return evaluate(model, dev, run.args, run.precision)


def announce(run, loader, schedule, state):
    """Log what will be trained, and how."""
    args, steps = run.args, len(loader)
    if schedule.warmup >= args.epochs * steps:
        run.log(f"warning: the warm-up of {schedule.warmup} steps is not shorter than the training "
                f"of {args.epochs * steps}: the learning rate rises to {schedule.peak:.3g} and "
                "never falls; give a shorter --warmup")
    if state.epoch >= args.epochs:
        run.log(f"{run.resume} has done {state.epoch} epochs already: nothing left of --epochs "
                f"{args.epochs}")
    else:
        n, k = len(loader.dataset.pairs), len(loader.sampler.chosen)
        pairs = f"{n} pairs" if k == n else f"{k} of {n} pairs ({k / n:.1%})"
        run.log(f"training: {pairs}, batch size {args.batch_size}, {steps} steps an epoch, epochs "
                f"{state.epoch + 1} to {args.epochs}, {args.epochs * steps} steps in all, lr up to "
                f"{schedule.peak:.3g} after {schedule.warmup} steps of warm-up, {args.precision} "
                f"on {run.device}")


# ---- the learning rate: linear warm-up, then a cosine to zero ----------------------------------


def warmup_cosine(t, base, warmup, total):
    """Learning rate at time `t` (0-based): base (t+1)/warmup while t < warmup, afterwards half a
    cosine from `base` at t = warmup to 0 at t = total."""
    if t < warmup:
        return base * (t + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup)))


class Schedule:
    """The learning rate of each optimiser step under a recipe.

    `paper`: t counts optimiser steps, the total is epochs x steps an epoch. `released`: t is
    epoch x captions + batch index and the total is epochs x captions, so that the rate hardly moves
    within an epoch and falls like a staircase between them. The warm-up is `--warmup`, or else
    `WARMUP` steps, of which only `released` takes more than a tenth of all. `peak`: the highest
    rate of the run.
    """

    def __init__(self, args, recipe, steps_per_epoch, num_pairs):
        self.base, self.warmup, steps = args.lr, args.warmup, args.epochs * steps_per_epoch
        if self.warmup is None:
            self.warmup = min(WARMUP, round(steps / 10)) if recipe.schedule_per_step else WARMUP
        self.stride = steps_per_epoch if recipe.schedule_per_step else num_pairs
        self.total = args.epochs * self.stride
        self.peak = self.base * min(1, steps / max(1, self.warmup))

    def __call__(self, epoch, step):
        """Learning rate of batch `step` of `epoch`, both 0-based."""
        return warmup_cosine(epoch * self.stride + step, self.base, self.warmup, self.total)
