"""`--recipe`: `paper` follows the paper, `released` the authors' script, `robust` is the recipe of
this repository."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """One column of the table in docs/fidelity.md."""

    per_sample: bool  # the weighted loss is mean(w_i l_i); else mean(w) mean(l)
    trains_on_memory: bool  # the memory loss has a gradient; else it is only logged
    siamese_gradient: float  # A' steps on this multiple of the gradient of mean(l)
    batch_norm_trains: bool  # A uses and updates batch statistics; else BatchNorm stays frozen
    schedule_per_step: bool  # the cosine runs over optimiser steps; else see `Schedule`
    clips_baseline: bool  # main_CLIP.py clips its gradient like main_NPC.py
    max_logit_scale: float  # upper limit of the learned log temperature
    cosine_bank: bool  # the bank's nearest neighbour is by cosine; else only queries are normalised
    random_bank_batches: bool  # the bank's losses come from random batches; else in data order
    # defaults of options
    weighting: str = "npc"
    memory_loss_weight: float = 1.0
    train_on: str = "all"
    judge_rounds: int = 0
    epochs: int = 10


RECIPES = {
    "paper": Recipe(per_sample=True, trains_on_memory=True, siamese_gradient=1.0,
                    batch_norm_trains=False, schedule_per_step=True, clips_baseline=True,
                    max_logit_scale=math.log(100), cosine_bank=True, random_bank_batches=True),
    "released": Recipe(per_sample=False, trains_on_memory=False, siamese_gradient=4.0,
                       batch_norm_trains=True, schedule_per_step=False, clips_baseline=False,
                       max_logit_scale=math.inf, cosine_bank=False, random_bank_batches=False),
}
# A plain CLIP step on the pairs that the better judge finds clean: no A', no w, no memory
RECIPES["robust"] = replace(RECIPES["paper"], weighting="none", memory_loss_weight=0.0,
                            train_on="clean", judge_rounds=2, epochs=13)
