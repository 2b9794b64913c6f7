"""Fine-tune or evaluate CLIP with its own contrastive loss: the baseline of NPC.

    python main_CLIP.py --dataset coco --dataset_root PATH --noise_ratio 0.2
    python main_CLIP.py --eval --resume CKPT --dataset coco --dataset_root PATH
"""

from data import retrieval_split, training_loader, training_pairs
from params import parse_args
from utils.embed import encode_batch
from utils.errors import command
from utils.losses import pair_losses
from utils.run import Run
from utils.training import adamw, fit, limit_logit_scale, prepare_towers


@command
def main(argv=None):
    args = parse_args("clip", argv)
    run = Run(args, folder=True)
    model, preprocess = run.load_model()
    if args.eval:
        return run.evaluate_test(model, preprocess)

    pairs = training_pairs(args, preprocess, run.log)
    dev = retrieval_split(args, "dev", preprocess, run.log)
    loader = training_loader(args, pairs)
    baseline = Baseline(model, run)
    fit(run, model, dev, baseline.optimizers, loader, baseline.step)


class Baseline:
    """CLIP and the step that trains it."""

    def __init__(self, model, run):
        self.model, self.run = model, run
        prepare_towers(model, run.args)
        self.optimizer = adamw(model, run.args)
        self.optimizers = {"optimizer": self.optimizer}
        clips = run.args.clip_grad and run.recipe.clips_baseline
        self.max_norm = run.args.clip_grad if clips else float("inf")

    def step(self, batch):
        """One AdamW step on the mean contrastive loss of a `Step`; returns its numbers."""
        model, run = self.model, self.run
        with run.precision.autocast():
            features = encode_batch(model, batch, run.args.accum_steps)
        loss = pair_losses(*features, model.logit_scale).mean()
        run.precision.scaler.scale(loss).backward()
        norm = run.precision.step(model, self.optimizer, self.max_norm)
        run.precision.scaler.update()
        limit_logit_scale(model, run.recipe)
        return {"loss": loss, "grad_norm": norm, "logit_scale": model.logit_scale}


if __name__ == "__main__":
    main()
