"""A run of a command: set-up, log and evaluation."""

import datetime
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

import clip
from utils import distributed
from utils.distributed import use_device
from utils.errors import InputError
from utils.files import atomic_write, lock, require_writable
from utils.method.optimizer import Precision
from utils.method.recipes import RECIPES
from utils.reading.layout import require_dataset
from utils.scoring.retrieval import KS, evaluate_test
from utils.training import checkpoints

TITLES = {"coco": "MSCOCO", "f30k": "Flickr30K", "cc": "CC120K"}


class Run:
    """One run of a command: its options, device, precision and recipe, its folder and its log.

    With `folder` the run writes below {checkpoint_path}/{experiments}, which no other run may train
    into. Under torchrun this joins the other processes; the first one alone writes.

    resume: path of the checkpoint that was loaded, or None. state: its training state, which this
    run continues, or {}. found: what is known later than the options and stored beside them.
    """

    def __init__(self, args, folder=False):
        require_dataset(args.dataset_root)  # before a model is fetched
        self.args, self.device, self.found = args, args.device, {}
        use_device(args)
        distributed.join_processes(args.device)
        self.precision = Precision(args.precision, self.device)
        self.recipe = RECIPES[args.recipe]
        self.resume, self.state, self.lines = args.resume, {}, []  # lines: not in log.txt yet
        self.folder = Path(args.checkpoint_path) / args.experiments if folder else None
        self.begun = False
        if folder:
            require_writable(self.folder)
        torch.manual_seed(args.seed)

    def begin(self):
        """Make the folder, lock it for training, and begin log.txt: a run that fails before it
        starts leaves nothing."""
        if self.folder and distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.args.eval:
                self.lock = lock(self.folder / ".lock", self.folder)
                checkpoints.clear(self.folder, self.resume, self.args.overwrite)
            self.begun = True
            self._write_lines()

    def log(self, message):
        """One line for people, on the terminal and in log.txt."""
        if distributed.is_main():
            tqdm.write(message)
            self.lines.append(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")
            if self.begun:
                self._write_lines()

    def _write_lines(self):
        with open(self.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as f:
            f.writelines(self.lines)
        self.lines = []

    def options(self):
        """The options by name, and what was found for them since."""
        return vars(self.args) | self.found

    def write_options(self, name, **more):
        """Write the options, and what else is given, to the file `name` in this run's folder."""
        if distributed.is_main():
            with atomic_write(self.folder / name) as f:
                json.dump(self.options() | more, f, indent=1, default=str)

    def load_model(self):
        """(model, preprocess) with the weights of `--resume`, or else of `--vision_model`. A
        training run continues the checkpoint: its training state becomes `self.state`."""
        args = self.args
        if args.resume == "auto":
            self.resume = self._newest()
        if self.folder and not args.eval and distributed.is_main():
            checkpoints.require_free(self.folder, self.resume, args.overwrite)
        if self.resume is None:
            with distributed.main_first():  # one downloads, if need be
                model, preprocess = clip.load(args.vision_model, self.device,
                                              activation=args.activation, log=self.log)
        else:
            model, preprocess = self._resume()
        self.found["activation"] = model.config["activation"]
        if args.context_length > model.context_length:
            raise InputError(f"--context_length {args.context_length} is more than the "
                             f"{model.context_length} positions of {args.vision_model}")
        return self.precision.prepare(model), preprocess

    def _newest(self):
        """Path of the newest intact checkpoint in this run's folder, None without any."""
        if self.folder is None:
            raise InputError("--resume auto looks in an experiment's folder, which this command "
                             "does not have; give the checkpoint's path")
        path = checkpoints.newest(self.folder, self.log) if distributed.is_main() else None
        path = distributed.from_main(path)
        if path is None and self.args.eval:
            raise InputError(f"--eval --resume auto: {self.folder} holds no checkpoint to score; "
                             "give its path, or --experiments of a run that has one")
        self.log(f"resuming from {path}" if path else "nothing to resume from: a fresh start")
        return path and str(path)

    def _resume(self):
        args = self.args
        checkpoint = clip.read_checkpoint(self.resume)
        model, preprocess = clip.build(checkpoint, self.resume, self.device, args.activation,
                                       self.log)
        initial = checkpoint.get("args", {}).get("vision_model")
        if args.vision_model not in (self.resume, initial):
            expected = clip.architecture(args.vision_model, model.config["activation"])
            if model.config != expected:
                raise InputError(
                    f"{self.resume} holds {clip.describe(model.config)}, but --vision_model is "
                    f"{clip.describe(expected)}; leave --vision_model out to take what the "
                    "checkpoint holds")
        if self.folder and not args.eval and {"args", "history"} <= checkpoint.keys():
            if args.resume != "auto" and not checkpoints.intact(self.resume):
                raise InputError(f"{self.resume} is damaged: its checksums do not fit; take an "
                                 "older checkpoint, as --resume auto does")
            checkpoints.compare_options(checkpoint["args"], self)
            self.state = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        return model, preprocess

    def evaluate_test(self, model, pairs):
        """Score `model` on the test split, below the model that its training started from: logs
        both and writes eval_test.json."""
        self.begin()
        args, title = self.args, TITLES.get(self.args.dataset, "test")
        initial, before = self._initial_model(), {}
        if initial is not None:
            before, _ = evaluate_test(initial, pairs, args, self.precision)
        rows, interval = evaluate_test(model, pairs, args, self.precision)
        named = {f"{title} {row}".removesuffix(" test"): row for row in sorted(rows)}  # 1K, 5K
        self.log(table({**{f"{name}, initial": before[row] for name, row in named.items()
                           if before},
                        **{name: rows[row] for name, row in named.items()}}))
        self.log(f"95 % intervals for a test set of {len(pairs.images)} images: " + ", ".join(
            f"{name} {low:.1f} to {high:.1f}" for name, (low, high) in interval.items()))
        self.write_options("options_eval.json", test_images=len(pairs.images))
        if distributed.is_main():
            path = self.folder / "eval_test.json"
            found = rows.pop("test") if "test" in rows else rows
            before = before.get("test", before)
            with atomic_write(path) as f:
                json.dump({**found, "interval": interval, "initial": before or None}, f, indent=1)
            self.log(f"wrote {path}")

    def _initial_model(self):
        """The model that the training of `--resume` started from; None where there was none or it
        cannot be had."""
        args = self.args
        if args.vision_model == self.resume or not self.resume:
            return None
        torch.manual_seed(args.seed)  # random weights are those of the training again
        try:
            with distributed.main_first():
                model, _ = clip.load(args.vision_model, self.device, activation=args.activation)
        except clip.CheckpointError as error:
            self.log(f"the initial model is not scored: {error}")
            return None
        return self.precision.prepare(model)


def table(rows):
    """Scores by name as lines of text: R@1, R@5, R@10 both ways and their sum."""
    width = max(12, *(len(name) + 1 for name in rows))
    ranks = "".join(f"{f'R@{k}':>8}" for _ in range(2) for k in KS)
    lines = [f"{'':{width}}{'image-to-text':^24}{'text-to-image':^24}",
             f"{'':{width}}{ranks}{'rsum':>9}"]
    for name, scores in rows.items():
        values = "".join(f"{scores[f'{way}_R@{k}']:8.2f}" for way in ("i2t", "t2i") for k in KS)
        lines.append(f"{name:{width}}{values}{scores['rsum']:9.2f}")
    return "\n".join(lines)
