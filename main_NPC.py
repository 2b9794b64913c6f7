"""Negative Pre-aware for Noisy Cross-Modal Matching (Zhang, Li, Ye; AAAI 2024).

    python main_NPC.py --dataset coco --dataset_root PATH --noise_ratio 0.2
    python main_NPC.py --eval --resume CKPT --dataset coco --dataset_root PATH

A is the model that is trained, A' its siamese, which takes each step first to show what the step
would do to a memory bank of clean pairs.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import command  # isort: skip

import copy

import torch

from data import retrieval_split, training_data
from params import parse_args
from utils.method.batches import training_loader
from utils.method.building import memory_bank
from utils.method.memorybank import arrays_on
from utils.method.optimizer import adamw, clip_gradients, prepare_training, steps_of
from utils.method.passes import Passes, copy_parameters
from utils.method.weightings import WEIGHTINGS
from utils.training.loop import fit
from utils.training.run import Run


@command
def main(argv=None):
    args = parse_args("npc", argv)
    run = Run(args, folder=True)
    A, preprocess = run.load_model()
    if args.eval:
        return run.evaluate_test(A, retrieval_split(args, "test", preprocess, run.log))

    # The memory bank: clean pairs that resemble each training image and caption, found by A_0
    pairs, dev = training_data(args, preprocess, run.log)
    bank = memory_bank(A, pairs, run)

    npc = NPC(A, run, bank)
    loader = training_loader(args, pairs, bank, with_memory=npc.uses_memory)
    fit(run, A, dev, npc.optimizers, loader, npc.step, npc.kept)


class NPC:
    """A, its siamese A' and the step that trains them. AdamW's state of A' lives on from step to
    step, while its weights are overwritten by A's. A' exists only if the weighting looks ahead."""

    def __init__(self, A, run, bank):
        args = run.args
        self.A, self.siamese, self.run = A, None, run
        self.weighting, self.num_pairs = WEIGHTINGS[args.weighting], len(bank.caption_entry)
        self.of_bank = arrays_on(run.device, bank, self.weighting.of_bank)  # (n,) each
        self.kept = {name: torch.zeros(self.num_pairs, device=run.device)
                     for name in self.weighting.keeps}
        self.trains_on_memory = run.recipe.trains_on_memory and args.memory_loss_weight > 0
        self.uses_memory = self.weighting.looks_ahead or self.trains_on_memory
        prepare_training(A, args, run.recipe)
        self.optimizer = adamw(A, args)
        self.optimizers = {"optimizer": self.optimizer}
        if self.weighting.looks_ahead:
            self.siamese = copy.deepcopy(A)
            prepare_training(self.siamese, args, run.recipe)
            self.siamese_optimizer = adamw(self.siamese, args)
            self.optimizers["siamese_optimizer"] = self.siamese_optimizer

    def step(self, batch):
        """One step on a `Batch` of B pairs and their memory entries M^I (by image) and M^T (by
        caption). Returns its numbers: losses, gradient norm, and the weights w (B,)."""
        A, siamese, run = self.A, self.siamese, self.run
        args, recipe, scaler = run.args, run.recipe, run.precision.scaler

        if self.weighting.looks_ahead:
            copy_parameters(A, siamese)  # A' := A
        passes = Passes(A, batch, run.precision, siamese, args.accum_steps, self.trains_on_memory)
        loss = passes.batch                     # l(batch; A)           (B,)
        memory_i, memory_t = passes.memory      # l(M^I; A), l(M^T; A)  (B,), (B,)
        known = {"batch": loss, "memory_i": memory_i, "memory_t": memory_t,
                 "indices": batch.indices, "step": steps_of(self.optimizer),
                 "num_pairs": self.num_pairs, **self.kept,
                 **{name: array[batch.indices] for name, array in self.of_bank.items()}}

        # A' takes its AdamW step on mean l(batch; A'), and shows what that does to the memory
        if self.weighting.looks_ahead:
            passes.siamese_backward(recipe.siamese_gradient * passes.siamese_batch.mean())
            scaler.step(self.siamese_optimizer)
            self.siamese_optimizer.zero_grad()
            known["after_i"], known["after_t"] = passes.memory_after()  # l(M^I; A'), l(M^T; A')

        # r = (l(M^I; A) / l(M^I; A') + l(M^T; A) / l(M^T; A')) / 2; w = 1 if r >= 1, else tanh(r)
        with torch.no_grad():
            w = self.weighting.function(**known)

        # A takes its AdamW step on the re-weighted batch and on the memory
        weighted = (w * loss).mean() if recipe.per_sample else w.mean() * loss.mean()
        total = weighted + args.memory_loss_weight * (memory_i.mean() + memory_t.mean())
        passes.backward(total)
        scaler.unscale_(self.optimizer)
        norm = clip_gradients(A, args.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            A.logit_scale.clamp_(max=recipe.max_logit_scale)

        numbers = {"batch_loss": loss.mean(), "grad_norm": norm,
                   "exp_logit_scale": A.logit_scale.exp(), "w": w}
        if self.uses_memory:
            numbers |= {"memory_image_loss": memory_i.mean(), "memory_text_loss": memory_t.mean()}
        if self.uses_memory or args.weighting != "none":  # else it is the batch's
            numbers |= {"weighted_loss": weighted, "loss": total}
        return numbers


if __name__ == "__main__":
    main()
