"""Set-up, log and evaluation: what main_NPC.py and main_CLIP.py have in common around training."""

import datetime
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import clip
from utils import distributed
from utils.devices import choose_kernels
from utils.errors import InputError
from utils.files import atomic_write, lock
from utils.method.recipes import RECIPES
from utils.reading.layout import require_dataset
from utils.scoring.retrieval import KS, evaluate, evaluate_coco
from utils.training import checkpoints
from utils.training.interruptions import LastingStream
from utils.training.precision import Precision

DEFAULT_MODEL = "ViT-B/32"


class Run:
    """One run of a command: its options, device, precision and recipe, its folder and its log.

    With `folder` the run writes below {checkpoint_path}/{experiments}, which nobody else may train
    into, and outlives its terminal. Under torchrun this joins the other processes; the first one
    alone writes.
    """

    def __init__(self, args, folder=False):
        require_dataset(args.dataset_root)  # before a model is fetched
        args.device = self.device = distributed.join_processes(args.device)
        self.args = args
        self.precision = Precision(args.precision, self.device)
        self.recipe = RECIPES[args.recipe]
        self.state = {}  # the training state of a checkpoint that this run continues
        self.folder = None
        if self.device.type == "cuda":
            choose_kernels(args)
        torch.manual_seed(args.seed)
        if folder:
            self.folder = Path(args.checkpoint_path) / args.experiments
            if distributed.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                log = self.folder / "log.txt"
                self.earlier_log = log.stat().st_size if log.exists() else 0  # bytes
                if not args.eval:
                    self.lock = lock(self.folder / ".lock", self.folder)
            sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)

    def log(self, message):
        """One line for people, on the terminal and in log.txt."""
        if not distributed.is_main():
            return
        tqdm.write(message)
        if self.folder:
            with open(self.folder / "log.txt", "a", encoding="utf-8",
                      errors="backslashreplace") as f:
                f.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    def write_options(self, name, **more):
        """Write what the command was called with, and what else is given, to the file `name` in
        this run's folder."""
        if distributed.is_main():
            with atomic_write(self.folder / name) as f:
                json.dump(vars(self.args) | more, f, indent=1, default=str)

    def load_model(self):
        """(model, preprocess): `--vision_model`, with the weights of `--resume` if it is given.

        Without `--vision_model` the architecture is the checkpoint's. Fills in args.vision_model,
        and keeps the checkpoint's training state, if it has one, in `self.state`.
        """
        args = self.args
        if args.resume == "auto":
            if self.folder is None:
                raise InputError("--resume auto looks in an experiment's folder, which this "
                                 "command does not have; give the checkpoint's path")
            path = checkpoints.newest(self.folder, self.log) if distributed.is_main() else None
            path = distributed.from_main(path)
            if path is None and args.eval:
                raise InputError(f"--eval --resume auto: {self.folder} holds no checkpoint to "
                                 "score; give its path, or --experiments of a run that has one")
            args.resume = str(path) if path else None
            self.log(f"resuming from {path}" if path else "nothing to resume from: a fresh start")
        if self.folder and not args.eval and distributed.is_main():
            checkpoints.require_free(self.folder, args.resume, args.overwrite)
        if args.resume is None:
            args.vision_model = args.vision_model or DEFAULT_MODEL
            with distributed.main_first():  # one downloads, if need be
                model, preprocess = clip.load(args.vision_model, self.device,
                                              activation=args.activation, log=self.log)
            args.activation = model.config["activation"]
        else:
            model, preprocess = self._resume()
        if args.context_length > model.context_length:
            raise InputError(f"--context_length {args.context_length} is more than the "
                             f"{model.context_length} positions of {args.vision_model}")
        return self.precision.prepare(model), preprocess

    def _resume(self):
        args = self.args
        checkpoint = clip.read_checkpoint(args.resume)
        model, preprocess = clip.build(checkpoint, args.resume, self.device, args.activation,
                                       self.log)
        args.activation = model.config["activation"]
        if args.vision_model is not None:
            expected = clip.architecture(args.vision_model, args.activation)
            if model.config != expected:
                raise InputError(
                    f"{args.resume} holds {clip.describe(model.config)}, but --vision_model is "
                    f"{clip.describe(expected)}; leave --vision_model out to take what the "
                    "checkpoint holds")
        if self.folder and not args.eval and {"args", "history"} <= checkpoint.keys():
            if not checkpoints.intact(args.resume):
                raise InputError(f"{args.resume} is damaged: its checksums do not fit; take an "
                                 "older checkpoint, as --resume auto does")
            checkpoints.compare_options(checkpoint["args"], args, self.log)
            self.state = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        args.vision_model = (args.vision_model or self.state.get("args", {}).get("vision_model")
                             or args.resume)
        return model, preprocess

    def evaluate_test(self, model, pairs):
        """Score `model` on the test split: prints the paper's rows, writes eval_test.json."""
        args = self.args
        if args.dataset == "coco":
            scores = evaluate_coco(model, pairs, args, self.precision)
            rows = {"MSCOCO 1K": scores["1K"], "MSCOCO 5K": scores["5K"]}
        else:
            scores = evaluate(model, pairs, args, self.precision)
            rows = {{"f30k": "Flickr30K", "cc": "CC120K"}.get(args.dataset, "test"): scores}
        self.log(table(rows))
        self.write_options("options_eval.json", test_images=len(pairs.images))
        if distributed.is_main():
            path = self.folder / "eval_test.json"
            with atomic_write(path) as f:
                json.dump(scores, f, indent=1)
            self.log(f"wrote {path}")


def table(rows):
    """Scores by name as lines of text: R@1, R@5, R@10 both ways and their sum."""
    lines = [f"{'':12}{'image-to-text':^24}{'text-to-image':^24}",
             f"{'':12}" + "".join(f"{f'R@{k}':>8}" for _ in range(2) for k in KS) + f"{'rsum':>9}"]
    for name, scores in rows.items():
        values = [scores[f"{way}_R@{k}"] for way in ("i2t", "t2i") for k in KS]
        lines.append(f"{name:12}" + "".join(f"{v:8.2f}" for v in values) + f"{scores['rsum']:9.2f}")
    return "\n".join(lines)
