"""Training checkpoints: the state of a run beside the weights, whole or absent.

`epoch{N}.pt` after each epoch and `step{S}.pt` in between hold `epoch` (epochs done), `batch`
(batches done of the next one), `step` (optimiser steps in all), `epoch_steps`, `name`,
`state_dict`, `config` (the model's), the optimisers, the gradient scaler, `args` (options), `data`
and `dev` (hashes of what is trained and scored on), `kept` (what the weighting keeps of each pair)
and `history` (see utils.training.history). The order of the pairs depends on seed and epoch alone
and nothing else is random, so no random state is kept. clip.read_checkpoint reads checkpoints and
runs none of their code.
"""

import hashlib
import math
import os
import shutil
import zipfile
from pathlib import Path

import torch

from utils.distributed import is_main
from utils.errors import InputError
from utils.files import UNFINISHED, atomic_write
from utils.method.pairs import fingerprint

STEP_FILES_KEPT = 2  # the newest may turn out broken after a crash of the machine
OF_THIS_COMMAND = ("resume", "force_resume", "overwrite", "eval", "device", "num_workers",
                   "eval_batch_size", "checkpoint_path", "experiments")  # not a checkpoint's
SAME_RUN = ("dataset", "noise_ratio", "noise_kind", "noise_seed", "num_anns", "context_length",
            "batch_size", "recipe", "seed", "weighting", "memory", "memory_loss_weight", "train_on",
            "freeze")  # options that make it another run
OF_A_RUN = ("epoch*.pt", "step*.pt", "best.pt", "log.txt", "log.jsonl", "weights.npz",
            "eval_test.json", "options_eval.json")  # what --overwrite deletes


class TrainingState:
    """What a checkpoint holds of a run: `epoch`, `batch` and `step` say how far it is."""

    def __init__(self, run, model, optimizers, history, loader, dev, kept):
        self.run, self.model, self.optimizers, self.history = run, model, optimizers, history
        self.kept = kept
        self.data, self.dev, self.epoch_steps = hash_of_data(loader), fingerprint(dev), len(loader)
        self.epoch = self.batch = self.step = 0

    def advance(self):
        """Count a step."""
        self.step += 1
        self.batch += 1
        if self.batch == self.epoch_steps:
            self.epoch, self.batch = self.epoch + 1, 0

    def save(self, name):
        """Write the checkpoint `name`; the main process does. Raises InputError when the numbers of
        the last step are not finite, or the file cannot be written."""
        run = self.run
        self.history.require_finite()
        if is_main():
            save(run.folder / name, {
                "epoch": self.epoch, "batch": self.batch, "step": self.step,
                "epoch_steps": self.epoch_steps, "name": run.args.name,
                "state_dict": self.model.state_dict(), "config": self.model.config,
                **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "scaler": run.precision.scaler.state_dict(), "args": stored_options(run.options()),
                "data": self.data, "dev": self.dev, "kept": self.kept,
                "history": self.history.state()})
            prune(run.folder, run.args.keep_checkpoints)

    def restore(self):
        """Load the checkpoint that the run continues, if there is one."""
        run = self.run
        if run.state:
            self._check(run.state)
            try:
                self._load(run.state)
            except Exception as error:  # a crafted file can provoke anything
                reason = " ".join(f"{error or type(error).__name__}".split())[:200]
                raise InputError(f"{run.resume} holds no usable training state ({reason}); take "
                                 "another checkpoint, or start from its weights with "
                                 "--vision_model") from error
            run.state = {}  # frees the memory

    def _check(self, state):
        """Raise InputError unless `state` is that of a run which this one may continue."""
        resume, forced = self.run.resume, self.run.args.force_resume
        advice = "start from its weights with --vision_model instead"
        if {name for name in state if name.endswith("optimizer")} != set(self.optimizers):
            raise InputError(f"{resume} was trained by another script; {advice}")
        for name, what in (("data", "trained on other pairs or memory entries"),
                           ("dev", "scored on other dev captions")):
            if state[name] != getattr(self, name) and not forced:
                raise InputError(f"{resume} was {what} than --dataset_root has now; {advice}, or "
                                 "insist with --force_resume")
        if state["batch"] and state["epoch_steps"] != self.epoch_steps:
            raise InputError(f"{resume} stopped within an epoch of {state['epoch_steps']} steps, "
                             f"and an epoch has {self.epoch_steps} now; continue from the end of "
                             f"an epoch (epoch{state['epoch']}.pt), or {advice}")

    def _load(self, state):
        epochs = self.run.args.epochs
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state[name])
        if state["scaler"]:
            self.run.precision.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = (int(state[key]) for key in ("epoch", "batch", "step"))
        if self.step < 1 or self.epoch + (self.batch > 0) > epochs:
            raise ValueError(f"{self.epoch} epochs and {self.step} steps of --epochs {epochs} are "
                             "done")
        for name, tensor in self.kept.items():
            tensor.copy_(state["kept"][name])
        self.history.load(state["history"])
        self.history.best()  # raises for lines that are none
        if state["dev"] != self.dev:
            self.history.ignore_scores()

    def restore_best(self):
        """Make best.pt that of the best epoch when the checkpoint was saved. That epoch lies beside
        the checkpoint under its own name or as best.pt."""
        if not is_main() or not self.history.best():
            return
        epoch, resume = self.history.best()[0], Path(self.run.resume)
        for name in (f"epoch{epoch}.pt", "best.pt"):
            found = peek(resume.with_name(name)).get("epoch")
            if found == epoch:
                hard_link(resume.with_name(name), self.run.folder / "best.pt")
                return
        if found != self.epoch:  # else this epoch was better, and is scored once more
            self.run.log(f"warning: epoch {epoch}, the best so far, is not beside {resume}; "
                         f"best.pt is chosen among the epochs from {max(1, self.epoch)} on")
            self.history.ignore_scores()

    def link_best(self, epoch):
        """Make best.pt a second name of the checkpoint of `epoch`, which may lie in the folder that
        the run was resumed from."""
        path = self.run.folder / f"epoch{epoch}.pt"
        hard_link(path if path.is_file() else Path(self.run.resume), self.run.folder / "best.pt")


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


def peek(path):
    """The content of a checkpoint whose tensors stay on disk; {} where it cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content if isinstance(content, dict) else {}
    except Exception:  # whatever an absent, damaged or foreign file provokes
        return {}


def step_of(path):
    """Optimiser steps that the run of a checkpoint had made; infinite for a damaged one."""
    if path.stem.removeprefix("step").isdigit():
        return int(path.stem.removeprefix("step"))
    step = peek(path).get("step")
    return step if isinstance(step, int) else math.inf


def by_step(folder, kinds=("epoch", "step")):
    """[(steps, path)] of the checkpoints in a folder by `step_of`, most steps first."""
    return sorted(((step_of(path), path) for kind in kinds for path in folder.glob(f"{kind}*.pt")),
                  reverse=True)


def newest(folder, log):
    """Path of the intact checkpoint of most steps in a folder, None without any."""
    for _, path in by_step(folder):
        if intact(path):
            return path
        log(f"warning: {path} is damaged; taking the one before")
    return None


def options_of(resume, folder):
    """Options of the run that wrote the checkpoint `resume`, or of "auto" the newest readable one
    in `folder`: a dictionary, empty where there is no training state."""
    readable = [path for step, path in by_step(folder) if step < math.inf]
    paths = readable[:1] if resume == "auto" else [resume]
    content = peek(paths[0]) if paths else {}
    saved = content.get("args") if "history" in content else {}
    return {name: value for name, value in dict(saved).items()
            if isinstance(value, str | int | float | None)}


def require_free(folder, resume, overwrite):
    """Raise InputError where a run, which continues the checkpoint `resume` or none, would write
    over the checkpoints of another one or over later ones."""
    there, what = [*folder.glob("best.pt"), *(path for _, path in by_step(folder))], "a run"
    if is_in(folder, resume):
        done, what = step_of(Path(resume)), "later checkpoints"
        there = [path for step, path in by_step(folder) if step > done and intact(path)]
    elif overwrite:
        return
    if there:
        raise InputError(f"{folder} holds {what} already "
                         f"({', '.join(sorted(path.name for path in there))}): continue it with "
                         "--resume auto, replace it with --overwrite, or give this one a new "
                         "--experiments")


def clear(folder, resume, overwrite):
    """Remove from a folder what killed runs left and, unless it holds the checkpoint `resume`, the
    curves of an earlier run; with `overwrite` all that an earlier run wrote."""
    gone = [f".*{UNFINISHED}"]
    if not is_in(folder, resume):
        gone += ["events.out.tfevents*", *(OF_A_RUN if overwrite else ())]
    for path in [path for pattern in gone for path in folder.glob(pattern)]:
        path.unlink()


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


def load_optimizer(optimizer, saved):
    """Load AdamW's moments from a state dict; rates and decays stay those of this run. Raises
    anything when the moments do not fit the parameters."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name].view_as(parameter)


def stored_options(options):
    """Options (dict) as numbers, strings and None, as they are stored."""
    return {k: v if isinstance(v, int | float | None) else str(v) for k, v in options.items()}


def compare_options(saved, run):
    """Log in one line which options changed since a checkpoint was written. Raises InputError when
    one of them makes it another run, unless --force_resume insists."""
    now = stored_options(run.options())
    changed = {k: f"--{k} {saved[k]} -> {now[k]}" for k in saved
               if k in now and k not in OF_THIS_COMMAND and str(saved[k]) != str(now[k])}
    if changed:
        run.log("options changed since the checkpoint: " + ", ".join(changed.values()))
    severe = [changed[k] for k in SAME_RUN if k in changed]
    if severe and not run.args.force_resume:
        raise InputError(f"{run.resume} belongs to another run: {', '.join(severe)}; start from "
                         "its weights with --vision_model instead, or insist with --force_resume")


def hash_of_data(loader):
    """What a run is trained on, as a hash (hex): the pairs, those that are chosen among them, and
    their memory entries or the pairs that these are drawn from."""
    dataset, chosen = loader.dataset, loader.sampler.chosen
    digest = hashlib.sha256(fingerprint(dataset.pairs).encode())
    if len(chosen) < len(dataset.pairs):
        digest.update(b"chosen" + chosen.tobytes())
    if dataset.clean_set is not None:
        digest.update(b"random" + dataset.clean_set.tobytes())
    elif dataset.bank is not None:
        digest.update(dataset.bank.image_entry.tobytes() + dataset.bank.caption_entry.tobytes())
    return digest.hexdigest()
