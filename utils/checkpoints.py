"""Training checkpoints: a training state beside the weights, whole or absent, newest first.

`epoch{N}.pt` after each epoch and `step{S}.pt` in between hold `epoch` (epochs done), `step`
(optimiser steps done), `name`, `state_dict`, the optimisers, the gradient scaler, `args` (options),
`data` (fingerprint of the training pairs), `best_score` and `history` (see utils.training). The
order of the pairs depends on seed and epoch alone and nothing else is random, so that there is no
random state to keep. They are read by clip.read_checkpoint, which runs no code of theirs.
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
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    return path
        except (OSError, zipfile.BadZipFile):
            pass
        log(f"warning: {path} is damaged; taking the one before")
    return None


def prune(folder, keep):
    """Delete what is no longer needed: all but the two newest step files, and, with `keep` > 0, all
    but the `keep` newest checkpoints in all. best.pt stays."""
    old = _by_age(folder, "step*.pt")[STEP_FILES_KEPT:]
    if keep:
        old += [p for p in _by_age(folder, "epoch*.pt", "step*.pt")[keep:] if p not in old]
    for path in old:
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
               if k in now and k not in ignored and saved[k] != now[k]}
    if not changed:
        return
    log("options changed since the checkpoint: " + ", ".join(changed.values()))
    severe = [changed[k] for k in MEANING if k in changed]
    if severe and not force:
        raise InputError(f"{args.resume} belongs to another run: {', '.join(severe)}; start from "
                         "its weights with --vision_model instead, or insist with --force_resume")
