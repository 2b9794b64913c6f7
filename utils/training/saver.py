"""The checkpoints of a run: when they are written, what a resumed run takes up from them."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils.distributed import is_main
from utils.errors import InputError
from utils.files import UNFINISHED, reading
from utils.method.memorybank import fingerprint
from utils.training import checkpoints


class Saver:
    """Writes and restores the checkpoints of a run; see utils.training.checkpoints for what they
    hold. A thread of the main process writes them while training goes on."""

    def __init__(self, run, model, optimizers, history, trained_on):
        self.run, self.model, self.optimizers, self.history = run, model, optimizers, history
        self.data, self.best, self.best_epoch = trained_on, 0.0, 0
        self.writer, self.writing = ThreadPoolExecutor(1), None

    def restore(self):
        """Take up the state of the checkpoint that the run continues; returns the steps done."""
        state, args, steps = self.run.state, self.run.args, 0
        if state:
            if {name for name in state if name.endswith("optimizer")} != set(self.optimizers):
                raise InputError(f"{args.resume} was trained by another script; start from its "
                                 "weights with --vision_model instead")
            if state["data"] != self.data and not args.force_resume:
                raise InputError(f"{args.resume} was trained on other pairs or memory entries than "
                                 "--dataset_root has now; start from its weights with "
                                 "--vision_model, or insist with --force_resume")
            try:
                steps = self._take_up(state)
            except Exception as error:  # a crafted file can provoke anything
                reason = " ".join(f"{error or type(error).__name__}".split())[:200]
                raise InputError(f"{args.resume} holds no usable training state ({reason}); take "
                                 "another checkpoint, or start from its weights with "
                                 "--vision_model") from error
            self.run.state = {}  # frees the memory
        if is_main():
            for path in self.run.folder.glob(f".*{UNFINISHED}"):  # of a run that was killed
                path.unlink()
            self._own_the_folder(steps)
            if steps:
                self._restore_best()
        return steps

    def _take_up(self, state):
        for name, optimizer in self.optimizers.items():
            checkpoints.load_optimizer(optimizer, state[name])
        if state["scaler"]:
            self.run.precision.scaler.load_state_dict(state["scaler"])
        self.history.load(state["history"])
        self.best, self.best_epoch = float(state["best_score"]), int(state["best_epoch"])
        steps = int(state["step"])
        if steps < 1 or state["epoch"] > self.run.args.epochs:
            raise ValueError(f"{state['epoch']} epochs and {steps} steps of --epochs "
                             f"{self.run.args.epochs} are done")
        return steps

    def _own_the_folder(self, done):
        """Raise InputError where this run, which has `done` steps, would mix with what another one
        has earned; remove what an earlier run of the same options left."""
        folder, args = self.run.folder, self.run.args
        there = checkpoints.by_step(folder)
        if done and Path(args.resume).parent.samefile(folder):
            later = [path.name for step, path in there if step > done and checkpoints.intact(path)]
            if later:
                raise InputError(f"{folder} holds later checkpoints than {args.resume} "
                                 f"({', '.join(later)}); continue with --resume auto, give a new "
                                 "--experiments, or delete them")
        elif there:
            options = folder / "options.json"
            advice = "give this run a new --experiments, continue that one with --resume auto, or "
            with reading(options, "a run's options", f"{advice} delete {folder}"):
                changed = checkpoints.changed_options(json.loads(options.read_text()), args)
            if changed:
                raise InputError(f"{folder} holds a run of other options "
                                 f"({', '.join(changed.values())}); {advice} delete it")
            self.run.log(f"{folder} holds an earlier run of the same options: it is replaced")
            for name in [*(path.name for _, path in there), "best.pt", "log.jsonl", "weights.npz"]:
                (folder / name).unlink(missing_ok=True)

    def _restore_best(self):
        """Make best.pt what it was when the checkpoint was saved: a run that was killed just then
        may not have come to it. Without that epoch's file best.pt stays, if there is one."""
        best = Path(self.run.args.resume).with_name(f"epoch{self.best_epoch}.pt")
        target = self.run.folder / "best.pt"
        if best.is_file():
            checkpoints.hard_link(best, target)
        elif not target.is_file():
            self.best = 0.0

    def save(self, name, epoch, step):
        """Copy the state after `step` steps and `epoch` epochs and begin to write it, once the
        checkpoint before is whole: host memory holds one copy at a time."""
        self.history.check()
        limits = [x for p in self.model.parameters() for x in p.detach().aminmax()]  # NaN passes
        if not torch.stack(limits).isfinite().all():  # a GPU is waited for once
            raise InputError(f"after step {step} the model's parameters are not finite; lower --lr "
                             "or use --precision fp32; checkpoints before it are intact")
        if is_main():
            self.wait()
            self.writing = self.writer.submit(
                self._write, name, checkpoints.on_host(self.state(epoch, step)))

    def state(self, epoch, step):
        """The content of a checkpoint, which training goes on to change."""
        args = self.run.args
        return {
            "epoch": epoch, "step": step, "name": args.name,
            "state_dict": self.model.state_dict(), "config": self.model.config,
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.run.precision.scaler.state_dict(),
            "args": checkpoints.stored_options(args),
            "data": self.data, "best_score": self.best, "best_epoch": self.best_epoch,
            "history": self.history.state(),
        }

    def _write(self, name, state):
        checkpoints.save(self.run.folder / name, state)
        if name.startswith("step"):
            checkpoints.prune(self.run.folder, self.run.args.keep_checkpoints)

    def check(self):
        """Raise what ended the write at hand, if anything has."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self):
        """Wait until the checkpoint at hand is whole. Raises InputError if it cannot be written."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def scored(self, epoch, score):
        """Take in the dev mean R@1 of an epoch whose checkpoint is whole: where none was better it
        becomes best.pt (ties go to the later epoch, as in the released code)."""
        if not is_main():
            return
        run, path = self.run, self.run.folder / f"epoch{epoch}.pt"
        if score >= self.best:
            self.best, self.best_epoch = score, epoch
            # a run that continues in another folder scores an epoch that lies elsewhere
            checkpoints.hard_link(path if path.is_file() else Path(run.args.resume),
                                  run.folder / "best.pt")
            run.log(f"best so far: {path}, dev mean R@1 {score:.2f}")
        checkpoints.prune(run.folder, run.args.keep_checkpoints)


def hash_of_data(loader):
    """What a run is trained on, as a hash (hex): the pairs, those that are chosen among them, and
    their memory entries or the pairs that these are drawn from."""
    dataset, chosen = loader.dataset, loader.sampler.chosen
    digest = hashlib.sha256(fingerprint(dataset.pairs).encode())
    if len(chosen) < len(dataset.pairs):
        digest.update(b"chosen" + chosen.tobytes())
    if dataset.clean is not None:
        digest.update(b"random" + dataset.clean.tobytes())
    elif dataset.bank is not None:
        digest.update(dataset.bank.image_entry.tobytes() + dataset.bank.caption_entry.tobytes())
    return digest.hexdigest()
