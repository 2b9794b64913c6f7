"""Average the initial model and the trained one (WiSE-FT, Wortsman et al. 2022): often better than
both, and it forgets less of what the initial model knew.

    python interpolate.py --resume logs/ex0/best.pt --initial ViT-B/32 \\
        --dataset coco --dataset_root PATH

scores the weights (1 - alpha) theta_0 + alpha theta on the dev split, alpha = 0, 0.1, ..., 1, and
writes the best as a checkpoint, which every other command takes.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import InputError, command  # isort: skip

from pathlib import Path

import clip
from data import retrieval_split
from params import parse_args
from utils.distributed import is_main, main_first
from utils.scoring.retrieval import evaluate
from utils.training import checkpoints
from utils.training.run import Run, table

ALPHAS = [k / 10 for k in range(11)]


@command
def main(argv=None):
    args = parse_args("interpolate", argv)
    run = Run(args)
    model, preprocess = run.load_model()
    with main_first():  # the main process downloads the model
        initial, _ = clip.load(args.initial, run.device, activation=args.activation, log=run.log)
    if initial.config != model.config:
        raise InputError(f"{args.resume} holds {clip.describe(model.config)}, but --initial is "
                         f"{clip.describe(initial.config)}; give the model that it started from")
    dev = retrieval_split(args, "dev", preprocess, run.log)

    start = run.precision.prepare(initial).state_dict()
    end = {name: value.clone() for name, value in model.state_dict().items()}
    scores = {}
    for alpha in ALPHAS:
        model.load_state_dict(between(start, end, alpha))
        scores[alpha] = evaluate(model, dev, args, run.precision)
    run.log(table({f"alpha {alpha}": row for alpha, row in scores.items()}))

    best = max(ALPHAS, key=lambda alpha: (scores[alpha]["mean_R1"], alpha))
    path = Path(args.out or Path(args.resume).with_name("interpolated.pt"))
    if is_main():
        checkpoints.save(path, {"state_dict": between(start, end, best), "config": model.config,
                                "alpha": best})
    run.log(f"wrote {path}: alpha {best}, dev mean R@1 {scores[best]['mean_R1']:.2f}")


def between(start, end, alpha):
    """The state dict (1 - alpha) start + alpha end. Integers (BatchNorm's number of batches) are
    those of `end`."""
    return {name: start[name].lerp(value, alpha) if value.is_floating_point() else value
            for name, value in end.items()}


if __name__ == "__main__":
    main()
