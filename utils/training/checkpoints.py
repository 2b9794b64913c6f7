"""Training checkpoints: the state of a run beside the weights, whole or absent.

`epoch{N}.pt` after each epoch and `step{S}.pt` in between hold `epoch` (epochs done), `step`
(optimiser steps done), `name`, `state_dict`, `config` (the model's), the optimisers, the
gradient scaler, `args` (options), `data` (a hash of what is trained on), `best_score` and
`best_epoch` (before this epoch was scored) and `history` (see utils.training.history). The order of
the pairs depends on seed and epoch alone and nothing else is random, so that there is no random
state to keep. They are read by clip.read_checkpoint, which runs no code of theirs.
"""

import contextlib
import os
import shutil
import zipfile
from pathlib import Path

import torch

from utils.errors import InputError
from utils.files import atomic_write

STEP_FILES_KEPT = 2  # the newest may turn out broken after a crash of the machine
SAME_RUN = ("dataset", "noise_ratio", "num_anns", "context_length", "batch_size", "recipe", "seed",
            "weighting", "memory_loss_weight")  # options that make it another run
NEVER_COMPARED = ("resume", "force_resume", "eval", "device", "vision_model")
TEMPORARY = tuple(f".{name}" for name in ("epoch", "step", "best.pt", "log.jsonl", "weights.npz",
                                          "options", "eval_test.json"))


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
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays where both were the same file already


def step_of(path):
    """Optimiser steps that the run of a checkpoint had made, None if the file is damaged."""
    if path.stem.removeprefix("step").isdigit():
        return int(path.stem.removeprefix("step"))
    try:  # of epoch{N}.pt the tensors, gigabytes, are left on disk
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # whatever a damaged file provokes
        return None


def by_step(folder):
    """The checkpoints of an experiment's folder, most steps first; damaged ones last."""
    paths = [*Path(folder).glob("epoch*.pt"), *Path(folder).glob("step*.pt")]
    steps = {path: step_of(path) for path in paths if path.is_file()}
    return sorted(steps, key=lambda path: -1 if steps[path] is None else steps[path], reverse=True)


def newest(folder, log):
    """Path of the intact checkpoint of most steps of an experiment, None without any. Files whose
    checksums do not fit are passed over with a warning."""
    for path in by_step(folder):
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
    none, as those of the authors. Raises InputError when it is damaged."""
    if not {"args", "history"} <= checkpoint.keys():
        return {}
    if not intact(path):
        raise InputError(f"{path} is damaged: its checksums do not fit; take an older checkpoint, "
                         "as --resume auto does")
    return {k: v for k, v in checkpoint.items() if k != "state_dict"}


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


def prune(folder, keep, written):
    """Delete all but the two newest step files and, with `keep` > 0, all but the `keep` newest
    checkpoints. best.pt and what was just `written` stay."""
    paths = by_step(folder) if keep else sorted(Path(folder).glob("step*.pt"), key=step_of,
                                                reverse=True)
    steps = [path for path in paths if path.name.startswith("step")]
    for path in {*steps[STEP_FILES_KEPT:], *(paths[keep:] if keep else ())} - {written}:
        path.unlink(missing_ok=True)


def remove_unfinished(folder):
    """Delete the unfinished files of a run that was killed while it wrote."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)


def stored_options(args):
    """Options as numbers, strings and None, as they are stored."""
    return {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(args).items()}


def changed_options(saved, args, names=None):
    """{option: "--option old -> new"} of those (among `names`) that are not as in `saved`."""
    now = stored_options(args)
    return {k: f"--{k} {saved[k]} -> {now[k]}" for k in saved
            if k in now and k not in NEVER_COMPARED and (names is None or k in names)
            and str(saved[k]) != str(now[k])}


def compare_options(saved, args, force, log):
    """List the options that changed since a checkpoint was written, in one line. Raises InputError
    when one of them makes it another run, unless `force` is given."""
    changed = changed_options(saved, args)
    if changed:
        log("options changed since the checkpoint: " + ", ".join(changed.values()))
    severe = [changed[k] for k in SAME_RUN if k in changed]
    if severe and not force:
        raise InputError(f"{args.resume} belongs to another run: {', '.join(severe)}; start from "
                         "its weights with --vision_model instead, or insist with --force_resume")
