"""The training loop: schedule, progress, checkpoints and dev scores around a step."""

from contextlib import nullcontext

import torch
from tqdm import tqdm

from utils.distributed import is_main, leave_processes
from utils.method.optimizer import replays, set_rate
from utils.reading.images import check_images
from utils.scoring.retrieval import evaluate
from utils.training.history import History
from utils.training.interruptions import end_interrupted, interruptions
from utils.training.replay import Replay
from utils.training.saver import Saver, hash_of_data
from utils.training.schedule import Schedule


def fit(run, model, dev, optimizers, loader, step):
    """Train `model` for the steps that remain.

    dev: the `Pairs` that choose the best epoch. optimizers: name in the checkpoint -> optimiser,
    all on one schedule. step(batch) makes one optimiser step on a `Batch` and returns its numbers:
    scalar tensors by name, `batch_loss` and `grad_norm` among them, and under "w" the weights (B,)
    of its pairs if it has any.

    An epoch ends in this order: its checkpoint is copied and begins to be written; dev is scored;
    once the checkpoint is whole, while the next epoch trains, come its lines in log.txt, log.jsonl
    and TensorBoard, weights.npz and best.pt. SIGTERM, SIGINT and SIGHUP save a checkpoint after the
    step at hand and exit with status `INTERRUPTED`. Raises InputError when a loss or gradient is
    not finite, or a checkpoint cannot be written.
    """
    args, pairs, epoch_steps = run.args, loader.dataset.pairs, len(loader)
    schedule = Schedule(args, run.recipe, epoch_steps, len(loader.sampler.chosen))
    history = History(run, pairs, epoch_steps)
    saver = Saver(run, model, optimizers, history, hash_of_data(loader))
    done = saver.restore()
    first_epoch, first_batch = divmod(done, epoch_steps)
    if replays(args):
        step = Replay(step, run.log)
    check_images(args, pairs.images, dev.images)
    run.write_options("options.json")
    announce(run, loader, schedule, first_epoch)

    def score(epoch):
        """Score an epoch (from 1); what tells of it is written behind its checkpoint."""
        with as_it_is(args):
            scores = evaluate(model, dev, args, run.precision)
        record = {"epoch": epoch, **history.epoch_means(),
                  "lr": schedule(epoch - 1, epoch_steps - 1), "dev": scores}
        saver.then(history.record, record, history.w.cpu().numpy())
        saver.then(saver.scored, epoch, scores["mean_R1"])

    history.open(done)
    with interruptions(run.device) as interrupted, saver.thread:
        if done and not first_batch:  # a run may have ended before its last epoch was scored
            score(first_epoch)
        for epoch in range(first_epoch, args.epochs):
            loader.sampler.epoch, loader.sampler.first = epoch, first_batch
            model.train(run.recipe.batch_norm_trains and args.freeze != "image")
            history.start_epoch(epoch, resumed=first_batch > 0)
            bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", initial=first_batch, unit="pair",
                       unit_scale=args.batch_size, disable=None if is_main() else True)
            for index, batch in enumerate(history.timed(bar), first_batch):
                rate = schedule(epoch, index)
                for optimizer in optimizers.values():
                    set_rate(optimizer, rate)
                done = epoch * epoch_steps + index + 1
                batch = batch.to(run.device)
                history.add(done, rate, batch, step(batch))
                saver.check()
                leaving = interrupted()
                due = args.save_every and done % args.save_every == 0
                if (leaving or due) and index + 1 < epoch_steps:
                    saver.save(f"step{done}.pt", epoch, done)
                    if leaving:
                        end_interrupted(run, saver, f"step {done}")
            first_batch = 0
            saver.save(f"epoch{epoch + 1}.pt", epoch + 1, done)
            if interrupted(now=True):
                end_interrupted(run, saver, f"epoch {epoch + 1}")
            score(epoch + 1)
        saver.finish()
    history.close()
    leave_processes()


def announce(run, loader, schedule, first_epoch):
    """Tell what will be trained, and how."""
    args, steps = run.args, len(loader)
    if schedule.warmup >= args.epochs * steps:
        run.log(f"warning: the warm-up of {schedule.warmup} steps is not shorter than the training "
                f"of {args.epochs * steps}: the learning rate rises to {schedule.peak:.3g} and "
                "never falls; give a shorter --warmup")
    if first_epoch >= args.epochs:
        run.log(f"{args.resume} has done {first_epoch} epochs already: nothing left of --epochs "
                f"{args.epochs}")
    else:
        n, k = len(loader.dataset.pairs), len(loader.sampler.chosen)
        pairs = f"{n} pairs" if k == n else f"{k} of {n} pairs ({k / n:.1%})"
        run.log(f"training: {pairs}, batch size {args.batch_size}, {steps} steps an epoch, epochs "
                f"{first_epoch + 1} to {args.epochs}, lr up to {schedule.peak:.3g} after "
                f"{schedule.warmup} steps of warm-up, {args.precision} on {run.device}")


def as_it_is(args):
    """Context in which a compiled model runs uncompiled: on shapes that hardly ever repeat."""
    return torch.compiler.set_stance("force_eager") if args.compile else nullcontext()
