"""Training checkpoints: the state of a run beside the weights, whole or absent.

`epoch{N}.pt` after each epoch and `step{S}.pt` in between hold `epoch` (epochs done), `step`
(optimiser steps done), `name`, `state_dict`, `config` (the model's), the optimisers, the gradient
scaler, `args` (options), `data` (a hash of what is trained on), `best_score` and `best_epoch`
(before this epoch was scored) and `history` (see utils.training.history). The order of the pairs
depends on seed and epoch alone and nothing else is random, so that there is no random state to
keep. They are read by clip.read_checkpoint, which runs no code of theirs.
"""

import math
import os
import shutil
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from utils.errors import InputError
from utils.files import UNFINISHED, atomic_write

STEP_FILES_KEPT = 2  # the newest may turn out broken after a crash of the machine
SAME_RUN = ("dataset", "noise_ratio", "noise_kind", "noise_seed", "num_anns", "context_length",
            "batch_size", "recipe", "seed", "weighting", "memory", "memory_loss_weight", "train_on",
            "freeze")  # options that make it another run
NEVER_COMPARED = ("resume", "force_resume", "eval", "device", "vision_model")


# ---- files --------------------------------------------------------------------------------------


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
    temporary = target.with_name(f".{target.name}{UNFINISHED}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays where both were the same file already


def intact(path):
    """Whether the checksums of all parts of a checkpoint fit, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises almost anything on a broken archive
        return False


def by_step(folder, kinds=("epoch", "step")):
    """[(steps, path)] of the checkpoints in a folder by the optimiser steps that their runs had
    made, most first. A damaged one counts as infinitely many."""
    return sorted(((step_of(path), path) for kind in kinds for path in folder.glob(f"{kind}*.pt")),
                  reverse=True)


def step_of(path, damaged=math.inf):
    """Optimiser steps that a checkpoint's run had made, or `damaged`."""
    if path.stem.removeprefix("step").isdigit():
        return int(path.stem.removeprefix("step"))
    try:  # of epoch{N}.pt the tensors, gigabytes, are left on disk
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # whatever a damaged file provokes
        return damaged


def newest(folder, log):
    """Path of the intact checkpoint of most steps in a folder, None without any."""
    for _, path in by_step(folder):
        if intact(path):
            return path
        log(f"warning: {path} is damaged; taking the one before")
    return None


def require_free(folder, resume, overwrite):
    """Raise InputError where a run, which continues the checkpoint `resume` or none, would write
    over the checkpoints of another one or over later ones."""
    there, what = [*folder.glob("best.pt"), *(path for _, path in by_step(folder))], "a run"
    if is_in(folder, resume):
        done, what = step_of(Path(resume), damaged=0), "later checkpoints"
        there = [path for step, path in by_step(folder) if step > done and intact(path)]
    elif overwrite:
        return
    if there:
        raise InputError(f"{folder} holds {what} already "
                         f"({', '.join(sorted(path.name for path in there))}): continue it with "
                         "--resume auto, replace it with --overwrite, or give this one a new "
                         "--experiments")


def is_in(folder, resume):
    """Whether the path of a checkpoint, or None, is that of a file in the folder."""
    return bool(resume) and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder)


def prune(folder, keep):
    """Delete all but the two step files and, with `keep` > 0, all but the `keep` checkpoints of
    most steps. best.pt and damaged ones stay."""
    paths = [path for step, path in by_step(folder, ("epoch", "step") if keep else ("step",))
             if step < math.inf]
    steps = [path for path in paths if path.name.startswith("step")]
    for path in {*steps[STEP_FILES_KEPT:], *(paths[keep:] if keep else ())}:
        path.unlink()


# ---- content ------------------------------------------------------------------------------------


def on_host(state):
    """A copy in host memory of nested dicts, lists and tuples with their tensors, which later
    changes do not reach. A GPU is waited for once."""
    copy = tree_map_only(  # from a GPU into pinned memory, behind the work at hand
        torch.Tensor, lambda x: x.detach().to("cpu", non_blocking=True, copy=True), state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def load_optimizer(optimizer, saved):
    """Take up AdamW's moments from a state dict; rates and decays stay those of this run. Raises
    anything when they do not fit the parameters."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name].view_as(parameter)


def stored_options(args):
    """Options as numbers, strings and None, as they are stored."""
    return {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(args).items()}


def compare_options(saved, args, log):
    """List the options that changed since a checkpoint was written, in one line. Raises InputError
    when one of them makes it another run, unless --force_resume insists."""
    now = stored_options(args)
    changed = {k: f"--{k} {saved[k]} -> {now[k]}" for k in saved
               if k in now and k not in NEVER_COMPARED and str(saved[k]) != str(now[k])}
    if changed:
        log("options changed since the checkpoint: " + ", ".join(changed.values()))
    severe = [changed[k] for k in SAME_RUN if k in changed]
    if severe and not args.force_resume:
        raise InputError(f"{args.resume} belongs to another run: {', '.join(severe)}; start from "
                         "its weights with --vision_model instead, or insist with --force_resume")
