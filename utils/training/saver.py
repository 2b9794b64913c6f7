"""The checkpoints of a run: when they are written, what a resumed run takes up from them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils.distributed import is_main
from utils.errors import InputError
from utils.files import UNFINISHED, atomic_write
from utils.method.pairs import fingerprint
from utils.training import checkpoints

OF_A_RUN = ("epoch*.pt", "step*.pt", "best.pt", "log.jsonl", "weights.npz", "eval_test.json",
            "options_eval.json")  # what --overwrite deletes, beside log.txt up to then


class Saver:
    """Writes and restores the checkpoints of a run; see utils.training.checkpoints for what they
    hold. In the main process a thread does what is to be written, one after the other, while
    training goes on; after the first failure it does nothing more."""

    def __init__(self, run, model, optimizers, history, trained_on):
        self.run, self.model, self.optimizers, self.history = run, model, optimizers, history
        self.data, self.best, self.best_epoch = trained_on, 0.0, 0
        self.thread, self.last = ThreadPoolExecutor(1), None  # last: the newest thing it has to do

    # ---- at the start ----

    def restore(self):
        """Take up the state of the checkpoint that the run continues, if it does, and remove from
        its folder what is of no use; returns the steps done."""
        run, args, steps = self.run, self.run.args, 0
        if run.state:
            steps = self._restore(run.state)
            run.state = {}  # frees the memory
        if is_main():
            gone = [f".*{UNFINISHED}"]  # of a run that was killed
            if not checkpoints.is_in(run.folder, args.resume):
                gone += ["events.out.tfevents*", *(OF_A_RUN if args.overwrite else ())]
                if args.overwrite and run.earlier_log:
                    own = (run.folder / "log.txt").read_bytes()[run.earlier_log :]
                    with atomic_write(run.folder / "log.txt", "wb") as f:
                        f.write(own)
            for path in [path for pattern in gone for path in run.folder.glob(pattern)]:
                path.unlink()
            if steps:
                self._restore_best()
        return steps

    def _restore(self, state):
        args = self.run.args
        if {name for name in state if name.endswith("optimizer")} != set(self.optimizers):
            raise InputError(f"{args.resume} was trained by another script; start from its weights "
                             "with --vision_model instead")
        if state["data"] != self.data and not args.force_resume:
            raise InputError(f"{args.resume} was trained on other pairs or memory entries than "
                             "--dataset_root has now; start from its weights with --vision_model, "
                             "or insist with --force_resume")
        try:
            return self._take_up(state)
        except Exception as error:  # a crafted file can provoke anything
            reason = " ".join(f"{error or type(error).__name__}".split())[:200]
            raise InputError(f"{args.resume} holds no usable training state ({reason}); take "
                             "another checkpoint, or start from its weights with "
                             "--vision_model") from error

    def _take_up(self, state):
        for name, optimizer in self.optimizers.items():
            checkpoints.load_optimizer(optimizer, state[name])
        if state["scaler"]:
            self.run.precision.scaler.load_state_dict(state["scaler"])
        self.history.load(state["history"])
        self.best, self.best_epoch = float(state["best_score"]), int(state["best_epoch"])
        steps = int(state["step"])
        if steps // self.history.epoch_steps != state["epoch"] and not self.run.args.force_resume:
            raise ValueError(f"{steps} steps are not {state['epoch']} epochs of "
                             f"{self.history.epoch_steps} steps")
        if steps < 1 or state["epoch"] > self.run.args.epochs:
            raise ValueError(f"{state['epoch']} epochs and {steps} steps of --epochs "
                             f"{self.run.args.epochs} are done")
        return steps

    def _restore_best(self):
        """Make best.pt what it was when the checkpoint was saved: a run that was killed just then
        may not have come to it. Without that epoch's file best.pt stays, if there is one."""
        best = Path(self.run.args.resume).with_name(f"epoch{self.best_epoch}.pt")
        target = self.run.folder / "best.pt"
        if best.is_file():
            checkpoints.hard_link(best, target)
        elif not target.is_file():
            self.best = 0.0

    # ---- while training goes on ----

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
            self.then(self._write, name, checkpoints.on_host(self.state(epoch, step)))

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

    def then(self, function, *arguments):
        """Call a function in the thread, once it has done all before."""
        before = self.last

        def call():
            if before:
                before.result()  # raises what has failed
            function(*arguments)

        if is_main():
            self.last = self.thread.submit(call)

    def check(self):
        """Raise what the thread has failed in, if it has in anything."""
        if self.last and self.last.done():
            self.wait()

    def wait(self):
        """Wait until all is written. Raises InputError where that cannot be."""
        last, self.last = self.last, None
        if last:
            last.result()

    def scored(self, epoch, score):
        """Take in the dev mean R@1 of an epoch whose checkpoint is whole: where none was better it
        becomes best.pt (ties go to the later epoch, as in the released code)."""
        run, path = self.run, self.run.folder / f"epoch{epoch}.pt"
        if score >= self.best:
            if score > self.best:
                run.log(f"best so far: {path}, dev mean R@1 {score:.2f}")
            self.best, self.best_epoch = score, epoch
            # a run that continues in another folder scores an epoch that lies elsewhere
            checkpoints.hard_link(path if path.is_file() else Path(run.args.resume),
                                  run.folder / "best.pt")
        checkpoints.prune(run.folder, run.args.keep_checkpoints)

    def finish(self):
        """The run has ended with an epoch's checkpoint: those between epochs go."""
        self.wait()
        if is_main():
            for path in self.run.folder.glob("step*.pt"):
                path.unlink()


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
