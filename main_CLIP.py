"""Fine-tune or evaluate CLIP with its own contrastive loss: the baseline of NPC.

    python main_CLIP.py --dataset coco --dataset_root PATH --noise_ratio 0.2
    python main_CLIP.py --eval --resume CKPT --dataset coco --dataset_root PATH
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import command  # isort: skip

import torch

from data import retrieval_split, training_data
from params import parse_args
from utils.method.batches import training_loader
from utils.method.building import memory_bank
from utils.method.optimizer import adamw, clip_gradients, prepare_training
from utils.method.passes import Passes
from utils.training.loop import fit
from utils.training.run import Run


@command
def main(argv=None):
    args = parse_args("clip", argv)
    run = Run(args, folder=True)
    model, preprocess = run.load_model()
    if args.eval:
        return run.evaluate_test(model, retrieval_split(args, "test", preprocess, run.log))

    pairs, dev = training_data(args, preprocess, run.log)
    bank = memory_bank(model, pairs, run) if args.train_on == "clean" else None

    loader = training_loader(args, pairs, bank, with_memory=False)
    baseline = Baseline(model, run)
    fit(run, model, dev, baseline.optimizers, loader, baseline.step)


class Baseline:
    """CLIP and the step that trains it."""

    def __init__(self, model, run):
        self.model, self.run = model, run
        prepare_training(model, run.args, run.recipe)
        self.optimizer = adamw(model, run.args)
        self.optimizers = {"optimizer": self.optimizer}
        self.max_norm = run.args.clip_grad if run.recipe.clips_baseline else 0

    def step(self, batch):
        """One AdamW step on the mean contrastive loss of a `Batch`; returns its numbers."""
        model, optimizer, run = self.model, self.optimizer, self.run
        scaler = run.precision.scaler
        passes = Passes(model, batch, run.precision, accum_steps=run.args.accum_steps)
        loss = passes.batch.mean()
        passes.backward(loss)
        scaler.unscale_(optimizer)
        norm = clip_gradients(model, self.max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=run.recipe.max_logit_scale)
        return {"batch_loss": loss, "grad_norm": norm, "exp_logit_scale": model.logit_scale.exp()}


if __name__ == "__main__":
    main()
