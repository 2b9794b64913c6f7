"""The training loop: schedule, progress, log, weights, dev scores and checkpoints around a step."""

import json
import math
import time

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data import retrieval_split
from utils.errors import InputError
from utils.files import atomic_write
from utils.retrieval import evaluate
from utils.schedule import Schedule


def adamw(model, args):
    """AdamW over all parameters of `model`, decayed alike, as CLIP's fine-tuners do."""
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(args.beta1, args.beta2),
                             eps=args.eps, weight_decay=args.weight_decay, fused=True)


@torch.no_grad()
def limit_logit_scale(model, recipe):
    """Keep the learned log temperature at or below the recipe's limit."""
    if math.isfinite(recipe.max_logit_scale):
        model.logit_scale.clamp_(max=recipe.max_logit_scale)


def fit(run, model, preprocess, optimizers, loader, step):
    """Train `model` for the epochs that remain.

    optimizers: name in the checkpoint -> optimiser, all on one schedule. step(batch) makes one
    optimiser step on a `Step` and returns its numbers: scalar tensors by name, `loss` among them,
    and under "w" the weights (B,) of its pairs if it has any. After each epoch: dev scores,
    checkpoint, log.jsonl, weights.npz, TensorBoard. Raises InputError when a loss is not finite.
    """
    args = run.args
    num_pairs = len(loader.dataset.pairs)
    dev = retrieval_split(args, "dev", preprocess, run.log)
    schedule = Schedule(args, run.recipe, len(loader), num_pairs)
    first = run.restore(optimizers)
    history = History(run, num_pairs, first)
    if first >= args.epochs:
        raise InputError(f"{args.resume} has done {first} epochs already; --epochs {args.epochs} "
                         "leaves nothing to train")
    if schedule.warmup >= args.epochs * len(loader):
        run.log(f"warning: --warmup {args.warmup} is not shorter than the training of "
                f"{args.epochs * len(loader)} steps: the learning rate never falls")
    run.log(f"training: {num_pairs} pairs, batch size {args.batch_size}, {len(loader)} steps an "
            f"epoch, epochs {first + 1} to {args.epochs}, {args.precision} on {run.device}")

    for epoch in range(first, args.epochs):
        loader.sampler.epoch = epoch
        model.train(run.recipe.batch_norm_trains)
        history.start_epoch(epoch)
        with tqdm(total=len(loader) * args.batch_size, unit="pair", unit_scale=True,
                  desc=f"epoch {epoch + 1}/{args.epochs}", disable=None) as bar:
            for index, batch in enumerate(loader):
                rate = schedule(epoch, index)
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                numbers = step(batch.to(run.device))
                history.add(epoch * len(loader) + index, rate, batch.pairs, numbers)
                bar.update(args.batch_size)
        means = history.finish_epoch()
        scores = evaluate(model, dev, args, run.precision)
        run.log(f"epoch {epoch + 1}: dev R@1 i2t {scores['i2t_R@1']:.2f}, t2i "
                f"{scores['t2i_R@1']:.2f}, mean {scores['mean_R1']:.2f}, rsum {scores['rsum']:.2f}")
        run.save_checkpoint(epoch + 1, model, optimizers, scores)
        history.save_epoch({"epoch": epoch + 1, **means, "lr": rate, "dev": scores})
    history.writer.close()


class History:
    """What a run writes about itself: log lines, log.jsonl, weights.npz, TensorBoard."""

    def __init__(self, run, num_pairs, epochs_done):
        self.run, self.folder, self.display = run, run.folder, run.args.display
        self.writer = SummaryWriter(run.folder)
        self.weights = np.full((run.args.epochs, num_pairs), np.nan, np.float32)
        self.lines = []
        if epochs_done:
            self._reload(epochs_done)

    def _reload(self, epochs_done):
        """Keep what the epochs before a continued one have written."""
        log, weights = self.folder / "log.jsonl", self.folder / "weights.npz"
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines()
            self.lines = [line for line in lines if json.loads(line)["epoch"] <= epochs_done]
        if weights.exists():
            with np.load(weights, allow_pickle=False) as data:
                old = data["w"][:epochs_done]
            if old.shape[1] == self.weights.shape[1]:
                self.weights[: len(old)] = old

    def start_epoch(self, epoch):
        self.epoch, self.sums, self.steps, self.drawn = epoch, {}, 0, []
        self.recent = None  # numbers of the step before, not looked at yet
        self.clock, self.since = time.perf_counter(), 0

    def add(self, step, rate, pairs, numbers):
        """Take in the numbers of a step. They are looked at one step later, so that a GPU is never
        waited for."""
        w = numbers.pop("w", None)
        if w is not None:
            self.drawn.append((pairs, w))
            numbers = {**numbers, "w": w.mean(), "w<1": (w < 1).float().mean()}
        numbers = {name: value.detach() for name, value in numbers.items()}
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self._check()
        self.recent = (step, pairs, numbers)
        self.steps, self.since = self.steps + 1, self.since + len(pairs)
        if self.steps % self.display == 0:
            self._show(step, rate, numbers)

    def _check(self):
        if self.recent is None:
            return
        step, pairs, numbers = self.recent
        if not math.isfinite(numbers["loss"]):
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in numbers.items())
            ids = ", ".join(map(str, pairs[:8].tolist())) + (", ..." if len(pairs) > 8 else "")
            raise InputError(f"the loss of step {step + 1} is not finite ({parts}; pairs {ids}); "
                             "lower --lr or use --precision fp32; checkpoints before it are intact")

    def _show(self, step, rate, numbers):
        speed = self.since / (time.perf_counter() - self.clock)
        parts = ", ".join(f"{name} {value.item():.4f}" for name, value in numbers.items())
        self.run.log(f"epoch {self.epoch + 1}, step {self.steps}: {parts}, lr {rate:.3g}, "
                     f"{speed:.0f} pairs/s")
        for name, value in numbers.items():
            self.writer.add_scalar(f"train/{name}", value.item(), step)
        self.writer.add_scalar("train/lr", rate, step)
        self.writer.add_scalar("train/pairs_per_second", speed, step)
        self.clock, self.since = time.perf_counter(), 0

    def finish_epoch(self):
        """Means over the epoch's steps, by name; fills the epoch's row of the weights."""
        self._check()
        if self.drawn:
            columns = zip(*self.drawn, strict=True)
            pairs, w = (torch.cat([x.cpu() for x in column]) for column in columns)
            self.weights[self.epoch, pairs.numpy()] = w.float().numpy()
            self.writer.add_histogram("w", w.float(), self.epoch + 1)
        return {name: total.item() / self.steps for name, total in self.sums.items()}

    def save_epoch(self, record):
        """Write one epoch's record to log.jsonl and TensorBoard, and the weights so far."""
        self.lines.append(json.dumps(record))
        with atomic_write(self.folder / "log.jsonl") as f:
            f.writelines(f"{line}\n" for line in self.lines)
        if self.drawn:
            with atomic_write(self.folder / "weights.npz", "wb") as f:
                np.savez_compressed(f, w=self.weights)
        for name, value in record["dev"].items():
            self.writer.add_scalar(f"dev/{name}", value, record["epoch"])
        self.writer.flush()
