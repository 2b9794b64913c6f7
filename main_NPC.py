"""Negative Pre-aware for Noisy Cross-Modal Matching (Zhang, Li, Ye; AAAI 2024).

    python main_NPC.py --dataset coco --dataset_root PATH --noise_ratio 0.2
    python main_NPC.py --eval --resume CKPT --dataset coco --dataset_root PATH

A is the model that is trained, A' its siamese, which takes each step first to show what the step
would do to a memory bank of clean pairs.
"""

import copy

import torch

from data import retrieval_split, training_loader, training_pairs
from get_memorybank import memory_bank
from params import parse_args
from utils.embed import encode, encode_batch, uses_batch_statistics
from utils.errors import InputError, command
from utils.losses import negative_impact_weights, one_step_anti_noise_weights, pair_losses
from utils.run import Run
from utils.training import adamw, fit, limit_logit_scale, prepare_towers


@command
def main(argv=None):
    args = parse_args("npc", argv)
    run = Run(args, folder=True)
    A, preprocess = run.load_model()
    if args.eval:
        return run.evaluate_test(A, preprocess)

    # The memory bank: clean pairs that resemble each training image and caption, found by A_0
    pairs = training_pairs(args, preprocess, run.log)
    dev = retrieval_split(args, "dev", preprocess, run.log)
    bank = memory_bank(A, pairs, args, run.precision, run.log, resumed=bool(run.state))
    loader = training_loader(args, pairs, bank)

    npc = NPC(A, run, fixed_weights(args.weighting, bank, run.device))
    fit(run, A, dev, npc.optimizers, loader, npc.step)


class NPC:
    """A, its siamese A' and the step that trains them."""

    def __init__(self, A, run, weights=None):
        self.A, self.run, self.args = A, run, run.args
        self.weights = weights  # (n,) of every pair where --weighting fixes them beforehand
        self.siamese = copy.deepcopy(A).eval()
        self.optimizer, self.siamese_optimizer = adamw(A, run.args), adamw(self.siamese, run.args)
        for model in (A, self.siamese):
            prepare_towers(model, run.args)
        self.optimizers = {"optimizer": self.optimizer, "siamese_optimizer": self.siamese_optimizer}

    def step(self, batch):
        """One training step on a `Step` of B pairs with their memory entries M^I and M^T.

        Returns its numbers: the total loss, its parts, the gradient norm, and the weights w (B,).
        """
        run, args, recipe = self.run, self.args, self.run.recipe

        # A' := A. As long as both compute alike, A's forward passes are also those of A'. Where w
        # becomes one factor of the whole loss, as released, the gradient of A' is also A's.
        copy_weights(self.A, self.siamese)
        alike = not uses_batch_statistics(self.A)
        model = self.A if alike else self.siamese
        one_weight = (alike and args.weighting == "npc"
                      and not (recipe.per_sample or recipe.trains_on_memory))

        # Losses before the step. The batch and what only the memory needs are encoded apart, so
        # that the gradient of A' crosses the batch's graph alone.
        features = self.encode(model, batch, "batch")
        loss = losses(model, features, batch, 0)  # (B,)
        with torch.set_grad_enabled(recipe.trains_on_memory and args.memory_loss_weight > 0):
            rest = self.encode(model, batch, "rest")
            features = [torch.cat(parts) for parts in zip(features, rest, strict=True)]
            memory_i, memory_t = (losses(model, features, batch, k) for k in (1, 2))  # (B,), (B,)

        # A' takes the step first; its losses on the memory tell how much each pair would hurt
        if args.weighting == "npc":
            self.siamese_step(loss.mean(), model, for_both=one_weight)
            with torch.no_grad():
                features = self.encode(self.siamese, batch, "memory")
                after_i, after_t = (losses(self.siamese, features, batch, k, "memory")
                                    for k in (1, 2))
                w = negative_impact_weights(memory_i, after_i, memory_t, after_t)
        elif args.weighting == "none":
            w = torch.ones_like(loss)
        else:
            w = self.weights[batch.pairs].to(loss)

        # A takes the step on the re-weighted batch and the memory
        if not alike:
            with run.precision.autocast():
                features = encode_batch(self.A, batch, args.accum_steps)
            loss = pair_losses(*features, self.A.logit_scale)
        weighted = (w * loss).mean() if recipe.per_sample else w.mean() * loss.mean()
        total = weighted + args.memory_loss_weight * (memory_i.mean() + memory_t.mean())
        if one_weight:  # A has the gradient of mean l since the step of A'
            torch._foreach_mul_([parameter.grad for parameter in self.A.parameters()], w.mean())
        else:
            run.precision.scaler.scale(total).backward()
        norm = run.precision.step(self.A, self.optimizer, args.clip_grad or float("inf"))
        run.precision.scaler.update()
        limit_logit_scale(self.A, recipe)
        return {"loss": total, "batch_loss": loss.mean(), "weighted_loss": weighted,
                "memory_image_loss": memory_i.mean(), "memory_text_loss": memory_t.mean(),
                "grad_norm": norm, "logit_scale": self.A.logit_scale, "w": w}

    def siamese_step(self, loss, model, for_both):
        """One AdamW step of A' on `loss`, which `model` computed: A or A', whose gradients agree
        as their weights do. AdamW's state of A' lives on from step to step. With `for_both` A gets
        the gradient of the loss too; else A's graph is kept for a backward pass of its own."""
        factor = self.run.recipe.siamese_gradient
        gradients = torch.autograd.grad(
            self.run.precision.scaler.scale(factor * loss), list(model.parameters()),
            retain_graph=model is self.A and not for_both)
        for own, other, gradient in zip(self.siamese.parameters(), self.A.parameters(), gradients,
                                        strict=True):
            own.grad = gradient
            if for_both:
                other.grad = gradient / factor
        self.run.precision.step(self.siamese, self.siamese_optimizer)

    def encode(self, model, batch, part):
        """Features of the distinct images and captions in a part of the step, see utils.embed."""
        with self.run.precision.autocast():
            return encode(model, batch, part, self.args.accum_steps)


def losses(model, features, batch, k, part="batch"):
    """Losses (B,) of the pairs of the batch (k = 0), of M^I (1) or of M^T (2) among themselves,
    from features [(u, D), (v, D)] that begin with those of a part of the step."""
    images, texts = (own[shared.rows[k] - shared.span(part)[0]]
                     for own, shared in zip(features, (batch.images, batch.texts), strict=True))
    return pair_losses(images, texts, model.logit_scale)


@torch.no_grad()
def copy_weights(source, target):
    """Overwrite the parameters and buffers of `target` with those of `source`."""
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)


def fixed_weights(weighting, bank, device):
    """Weights (n,) of all pairs where they come with the bank (gmm, osa), else None."""
    if weighting in ("npc", "none"):
        return None
    if bank.posterior is None or not isinstance(bank.info.get("beta"), float):
        raise InputError(f"--weighting {weighting} needs losses and cosines of the initial model, "
                         "which the authors' banks do not hold; run get_memorybank.py first")
    if weighting == "gmm":
        return torch.from_numpy(bank.posterior).to(device)
    cosine = torch.from_numpy(bank.cosine).to(device)
    return one_step_anti_noise_weights(cosine, bank.info["beta"])


if __name__ == "__main__":
    main()
