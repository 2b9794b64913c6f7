"""Set-up, log, checkpoints and evaluation: what main_NPC.py and main_CLIP.py have in common."""

import contextlib
import datetime
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

import clip
from data import retrieval_split
from utils.errors import InputError
from utils.files import atomic_write
from utils.precision import Precision
from utils.recipes import RECIPES
from utils.retrieval import KS, evaluate, evaluate_coco

DEFAULT_MODEL = "ViT-B/32"


class Run:
    """One run of a command: its options, device, precision and recipe, its folder and its log.

    With `folder` the run writes below {checkpoint_path}/{experiments}, which is made, and made sure
    of, right away.
    """

    def __init__(self, args, folder=False):
        self.args, self.device = args, args.device
        self.precision = Precision(args.precision, args.device)
        self.recipe = RECIPES[args.recipe]
        self.state = {}  # the training state of a checkpoint that this run continues
        self.folder = None
        torch.manual_seed(args.seed)
        if folder:
            self.folder = Path(args.checkpoint_path) / args.experiments
            name = "options_eval.json" if args.eval else "options.json"
            with atomic_write(self.folder / name) as f:
                json.dump(vars(args), f, indent=1, default=str)

    def log(self, message):
        """One line for people, on the terminal and in log.txt."""
        tqdm.write(message)
        if self.folder:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as f:
                f.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    def load_model(self):
        """(model, preprocess): `--vision_model`, with the weights of `--resume` if it is given.

        Without `--vision_model` the architecture is the checkpoint's. Fills in args.vision_model
        and keeps the checkpoint's training state in `self.state`.
        """
        args = self.args
        if args.resume is None:
            args.vision_model = args.vision_model or DEFAULT_MODEL
            model, preprocess = clip.load(args.vision_model, device=self.device)
        else:
            checkpoint = clip.read_checkpoint(args.resume)
            model, preprocess = clip.load(args.resume, device=self.device)
            if args.vision_model is None:
                args.vision_model = args.resume
            else:
                self._require_architecture(model)
            if isinstance(checkpoint.get("epoch"), int) and "args" in checkpoint:
                self.state = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        if args.context_length > model.context_length:
            raise InputError(f"--context_length {args.context_length} is more than the "
                             f"{model.context_length} positions of {args.vision_model}")
        return self.precision.prepare(model), preprocess

    def _require_architecture(self, model):
        """Refuse a `--resume` checkpoint whose architecture is not `--vision_model`'s."""
        name = self.args.vision_model
        expected = clip.architecture(name)
        if model.config != expected:
            raise InputError(f"{self.args.resume} holds {clip.describe(model.config)}, but "
                             f"--vision_model is {clip.describe(expected)}; leave --vision_model "
                             "out to take what the checkpoint holds")

    # ---- training -------------------------------------------------------------------------------

    def save_checkpoint(self, epoch, model, optimizers, scores):
        """Write epoch{N}.pt, and best.pt where the dev score is the best so far (ties go to the
        later epoch, as in the released code)."""
        best = max(self.state.get("best_score", 0.0), scores["mean_R1"])
        self.state["best_score"] = best
        checkpoint = {
            "epoch": epoch, "name": self.args.name,
            "state_dict": {k: v.detach().cpu() for k, v in model.state_dict().items()},
            **{name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "scaler": self.precision.scaler.state_dict(),
            "args": {k: v if isinstance(v, int | float | None) else str(v)
                     for k, v in vars(self.args).items()},
            "dev": scores, "best_score": best,
        }
        path = self.folder / f"epoch{epoch}.pt"
        with atomic_write(path, "wb") as f:
            torch.save(checkpoint, f)
        if scores["mean_R1"] >= best:
            hard_link(path, self.folder / "best.pt")
            self.log(f"best so far: {path}, dev mean R@1 {best:.2f}")

    def restore(self, optimizers):
        """Load the optimisers' states of the checkpoint that this run continues; returns the number
        of epochs that are done."""
        for name, optimizer in optimizers.items():
            if name in self.state:
                optimizer.load_state_dict(self.state[name])
        self.precision.scaler.load_state_dict(self.state.get("scaler", {}) or
                                              self.precision.scaler.state_dict())
        return self.state.get("epoch", 0)

    # ---- evaluation -----------------------------------------------------------------------------

    def evaluate_test(self, model, preprocess):
        """Score `model` on the test split: prints the paper's rows, writes eval_test.json."""
        args = self.args
        pairs = retrieval_split(args, "test", preprocess, self.log)
        if args.dataset == "coco":
            scores = evaluate_coco(model, pairs, args, self.precision)
            rows = {"MSCOCO 1K": scores["1K"], "MSCOCO 5K": scores["5K"]}
        else:
            scores = evaluate(model, pairs, args, self.precision)
            rows = {{"f30k": "Flickr30K", "cc": "CC120K"}.get(args.dataset, "test"): scores}
        self.log(table(rows))
        path = self.folder / "eval_test.json"
        with atomic_write(path) as f:
            json.dump(scores, f, indent=1)
        self.log(f"wrote {path}")
        return scores


def table(rows):
    """Scores by name as lines of text: R@1, R@5, R@10 both ways and their sum."""
    lines = [f"{'':12}{'image-to-text':^24}{'text-to-image':^24}",
             f"{'':12}" + "".join(f"{f'R@{k}':>8}" for _ in range(2) for k in KS) + f"{'rsum':>9}"]
    for name, scores in rows.items():
        values = [scores[f"{way}_R@{k}"] for way in ("i2t", "t2i") for k in KS]
        lines.append(f"{name:12}" + "".join(f"{v:8.2f}" for v in values) + f"{scores['rsum']:9.2f}")
    return "\n".join(lines)


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
