"""The checkpoints of a run: when they are written, what a resumed run takes up from them."""

import hashlib
import json
from pathlib import Path

from utils.distributed import is_main
from utils.errors import InputError
from utils.files import reading
from utils.method.memorybank import fingerprint
from utils.training import checkpoints


class Saver:
    """Writes and restores the checkpoints of a run; see utils.training.checkpoints for what they
    hold."""

    def __init__(self, run, model, optimizers, history, trained_on):
        self.run, self.model, self.optimizers, self.history = run, model, optimizers, history
        self.data, self.best, self.best_epoch = trained_on, 0.0, 0

    def restore(self):
        """Take up the state of the checkpoint that the run continues; returns the steps done."""
        run, state, args = self.run, self.run.state, self.run.args
        if is_main():
            checkpoints.remove_unfinished(run.folder)
            self._own_the_folder(state)
        if not state:
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
                run.precision.scaler.load_state_dict(state["scaler"])
            self.history.load(state["history"])
            steps = int(state["step"])
            if steps < 0:
                raise ValueError("'step' is negative")
            self._take_up_best(state)
        except Exception as error:  # a crafted file can provoke anything
            reason = " ".join(f"{error or type(error).__name__}".split())[:200]
            raise InputError(f"{args.resume} holds no usable training state ({reason}); take "
                             "another checkpoint, or start from its weights with --vision_model"
                             ) from error
        run.state = {}  # frees the memory
        return steps

    def _own_the_folder(self, state):
        """Raise InputError where this run would overwrite what another one has earned; remove what
        an earlier run of the same options left."""
        folder, args = self.run.folder, self.run.args
        there = checkpoints.by_step(folder)
        if state:
            later = [path.name for path in there if path.parent == Path(args.resume).parent
                     and (checkpoints.step_of(path) or 0) > state["step"]]
            if later:
                raise InputError(f"{folder} holds later checkpoints than {args.resume} "
                                 f"({', '.join(later)}); continue with --resume auto, give a new "
                                 "--experiments, or delete them")
            return
        if not there:
            return
        options, changed = folder / "options.json", {"": "of unknown options"}
        if options.exists():
            with reading(options, "a run's options", "delete it"):
                saved = json.loads(options.read_text())
            changed = checkpoints.changed_options(saved, args)
        if changed:
            raise InputError(f"{folder} holds a run of other options ({', '.join(changed.values())}"
                             "); give this one a new --experiments, continue that one with "
                             "--resume auto, or delete it")
        self.run.log(f"{folder} holds an earlier run of the same options, which this one replaces")
        for path in [*there, folder / "best.pt", folder / "log.jsonl", folder / "weights.npz"]:
            path.unlink(missing_ok=True)

    def _take_up_best(self, state):
        """Make best.pt what it was when the checkpoint was saved: a run that was killed just then
        may not have come to it. Without that epoch's file best.pt stays, if there is one."""
        self.best, self.best_epoch = float(state["best_score"]), int(state["best_epoch"])
        if not is_main():
            return
        best, target = (Path(self.run.args.resume).with_name(f"epoch{self.best_epoch}.pt"),
                        self.run.folder / "best.pt")
        if best.is_file():
            checkpoints.hard_link(best, target)
        elif not target.is_file():
            self.best = 0.0

    def save(self, name, epoch, step):
        """Write a checkpoint after `step` steps and `epoch` epochs."""
        self.history.check()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise InputError(f"after step {step} the weights are not finite; lower --lr or use "
                             "--precision fp32; checkpoints before it are intact")
        if not is_main():
            return
        run = self.run
        checkpoints.save(run.folder / name, {
            "epoch": epoch, "step": step, "name": run.args.name,
            "state_dict": {k: v.detach().cpu() for k, v in self.model.state_dict().items()},
            "config": self.model.config,
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": run.precision.scaler.state_dict(),
            "args": checkpoints.stored_options(run.args),
            "data": self.data, "best_score": self.best, "best_epoch": self.best_epoch,
            "history": self.history.state(),
        })
        if name.startswith("step"):
            checkpoints.prune(run.folder, run.args.keep_checkpoints, run.folder / name)

    def scored(self, epoch, score):
        """Take in the dev mean R@1 of an epoch that is saved: where none was better it becomes
        best.pt (ties go to the later epoch, as in the released code)."""
        path = self.run.folder / f"epoch{epoch}.pt"
        if score >= self.best:
            self.best, self.best_epoch = score, epoch
            if is_main():
                # a run that continues in another folder scores an epoch that lies elsewhere
                source = path if path.is_file() else Path(self.run.args.resume)
                checkpoints.hard_link(source, self.run.folder / "best.pt")
                self.run.log(f"best so far: {path}, dev mean R@1 {score:.2f}")
        if is_main():
            checkpoints.prune(self.run.folder, self.run.args.keep_checkpoints, path)


def hash_of_data(dataset):
    """What a run is trained on, as a hash (hex): the pairs of `Batches` and, if it has any, their
    memory entries."""
    digest = hashlib.sha256(fingerprint(dataset.pairs).encode())
    if dataset.bank is not None:
        digest.update(dataset.bank.image_entry.tobytes() + dataset.bank.caption_entry.tobytes())
    return digest.hexdigest()
