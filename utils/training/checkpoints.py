"""Training checkpoints: a training state beside the weights, whole or absent, newest first.

`epoch{N}.pt` after each epoch and `step{S}.pt` in between hold `epoch` (epochs done), `step`
(optimiser steps done), `name`, `state_dict`, the optimisers, the gradient scaler, `args` (options),
`data` (a hash of the training pairs and memory entries), `best_score`, `best_epoch` and `history`
(see utils.training.loop). The order of the pairs depends on seed and epoch alone and nothing else is
random, so that there is no random state to keep. They are read by clip.read_checkpoint, which runs
no code of theirs.
"""

import contextlib
import os
import zipfile
from pathlib import Path

import torch

from utils.errors import InputError
from utils.files import atomic_write

STEP_FILES_KEPT = 2  # the newest may turn out broken after a crash of the machine
MEANING = ("dataset", "noise_ratio", "num_anns", "context_length", "batch_size", "recipe", "seed",
           "weighting", "memory_loss_weight")  # options that make it another run
STATE = {"epoch": int, "step": int, "args": dict, "data": str, "best_score": float,
         "best_epoch": int, "scaler": dict, "history": dict}
TEMPORARY = tuple(f".{name}" for name in ("epoch", "step", "best.pt", "log.jsonl", "weights.npz",
                                          "options", "eval_test.json", "can_write"))


def save(path, checkpoint):
    """Write a checkpoint. Raises InputError when it cannot be written; an older one stays as is."""
    try:
        with atomic_write(path, "wb") as f:
            torch.save(checkpoint, f)
    except RuntimeError as error:  # torch's word for a failed write
        raise InputError(f"cannot write {path}: is the disk full? Older checkpoints are intact "
                         f"({str(error).splitlines()[0]})") from error


def hard_link(source, target):
    """Give the finished file `source` a second name, replacing what was there; a copy where the
    file system has no links."""
    temporary = target.with_name(f".{target.name}.link")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # it stays where both were the same file already
    except OSError:
        with atomic_write(target, "wb") as f:
            f.write(source.read_bytes())


def _by_age(folder, *patterns):
    paths = [path for pattern in patterns for path in Path(folder).glob(pattern)]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest(folder, log):
    """Path of the newest intact epoch or step checkpoint of an experiment, None without any.
    Files whose checksums do not fit are passed over with a warning."""
    for path in _by_age(folder, "epoch*.pt", "step*.pt"):
        if intact(path):
            return path
        log(f"warning: {path} is damaged; taking the one before")
    return None


def intact(path):
    """Whether the checksums of all parts of a checkpoint of ours fit, which torch does not look
    at."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises almost anything on a broken archive
        return False


def training_state(checkpoint, path):
    """The training state in the content of the checkpoint `path`, without the weights; {} if it has
    none, as those of the authors. Raises InputError when it is incomplete or damaged."""
    if "history" not in checkpoint:
        return {}
    for key, kind in STATE.items():
        if not isinstance(checkpoint.get(key), kind):
            raise broken_state(path, f"'{key}' is no {kind.__name__}")
    if checkpoint["step"] < 0:
        raise broken_state(path, "'step' is negative")
    if not intact(path):
        raise InputError(f"{path} is damaged: its checksums do not fit; take an older checkpoint, "
                         "as --resume auto does")
    return {k: v for k, v in checkpoint.items() if k != "state_dict"}


def broken_state(path, reason):
    """The InputError for a checkpoint whose training state is unusable."""
    reason = " ".join(f"{reason or type(reason).__name__}".split())[:200]
    return InputError(f"{path} holds no usable training state ({reason}); take another checkpoint, "
                      "or start from its weights with --vision_model")


def load_optimizer(optimizer, saved):
    """Take up AdamW's moments from a state dict; rates and decays stay those of this run. Raises
    anything when they do not fit the parameters."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            if any(moments[k].shape != parameter.shape for k in ("exp_avg", "exp_avg_sq")):
                raise ValueError("AdamW's moments have other shapes than the parameters")
            moments["step"].item()


def prune(folder, keep):
    """Delete what is no longer needed: all but the two newest step files, and, with `keep` > 0, all
    but the `keep` newest checkpoints in all. best.pt stays."""
    old = _by_age(folder, "step*.pt")[STEP_FILES_KEPT:]
    if keep:
        old += [p for p in _by_age(folder, "epoch*.pt", "step*.pt")[keep:] if p not in old]
    for path in old:
        path.unlink(missing_ok=True)


def clean(folder):
    """Delete the unfinished files of a run that was killed while it wrote."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)


def plain(args):
    """Options as numbers, strings and None, as they are stored."""
    return {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(args).items()}


def compare_options(saved, args, force, log):
    """List the options that changed since a checkpoint was written, in one line. Raises InputError
    when one of them makes it another run, unless `force` is given."""
    now = plain(args)
    ignored = {"resume", "force_resume", "eval", "device", "vision_model"}
    changed = {k: f"--{k} {saved[k]} -> {now[k]}" for k in saved
               if k in now and k not in ignored and str(saved[k]) != str(now[k])}
    if not changed:
        return
    log("options changed since the checkpoint: " + ", ".join(changed.values()))
    severe = [changed[k] for k in MEANING if k in changed]
    if severe and not force:
        raise InputError(f"{args.resume} belongs to another run: {', '.join(severe)}; start from "
                         "its weights with --vision_model instead, or insist with --force_resume")
