"""AdamW as CLIP's fine-tuners use it, and what surrounds its step."""

import math

import torch
import torch._functorch.config
from torch.nn import BatchNorm2d

from clip.model import Bottleneck, ResidualAttentionBlock
from utils.distributed import world
from utils.errors import InputError

MOST_SHAPES = 64  # that --compile makes a block for; a run has two dozen


def adamw(model, args):
    """AdamW over all parameters of `model` that are trained, decayed alike, as CLIP's fine-tuners
    do.

    With half weights it is the unfused one, whose every operation rounds to half, as released. The
    fused kernel computes in fp32 and rounds what it stores, so that a second moment still counts in
    its own step if it underflows. Raises InputError when eps is zero in half.
    """
    half = any(p.dtype == torch.float16 for p in model.parameters())
    if half and not torch.tensor(args.eps).half():
        raise InputError(f"--eps {args.eps:g} is zero in half precision, where second moments are "
                         "too; use 1e-6, or another --precision")
    return torch.optim.AdamW(trained(model), lr=args.lr, betas=(args.beta1, args.beta2),
                             eps=args.eps, weight_decay=args.weight_decay, fused=not half)


def prepare_training(model, args, recipe):
    """Apply --freeze, --grad_checkpointing and --compile to a model, in place, before its optimiser
    is made. Raises InputError when the recipe trains the BatchNorm of its ResNet together with what
    cannot see whole batches."""
    for name, parameter in model.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        parameter.requires_grad_(tower != args.freeze or name == "logit_scale")
    if (recipe.batch_norm_trains and args.freeze != "image"
            and any(isinstance(m, BatchNorm2d) for m in model.modules())):
        memory = recipe.trains_on_memory and getattr(args, "memory_loss_weight", 0)
        pieces = world() > 1 or args.accum_steps > 1 or args.grad_checkpointing
        if memory or pieces:
            raise InputError(
                f"--recipe {args.recipe} trains BatchNorm on whole batches: a ResNet then needs "
                "one process, --accum_steps 1, no --grad_checkpointing, and a recipe that does not "
                "train on the memory")
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:  # A' takes a gradient through the graph before A does: it must be retained
        torch._functorch.config.donated_buffer = False
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        for module in model.modules():  # all blocks of a tower share what is compiled for one
            if isinstance(module, ResidualAttentionBlock | Bottleneck):
                module.compile(dynamic=False)


def update(model, optimizer, run, max_norm):
    """A step of the optimiser of the model that is trained: the gradient is clipped to a norm of
    `max_norm` (0: not), logit_scale kept at or below the recipe's limit. Returns the gradient's
    norm before clipping (scalar tensor)."""
    norm = run.precision.step(model, optimizer, max_norm or math.inf)
    run.precision.scaler.update()
    if math.isfinite(run.recipe.max_logit_scale):
        with torch.no_grad():
            model.logit_scale.clamp_(max=run.recipe.max_logit_scale)
    return norm


def trained(model):
    """The parameters of `model` that have a gradient: all but those of a frozen tower."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def steps_of(optimizer):
    """Steps that an AdamW optimiser has made so far, also before a resume: a scalar tensor."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0])
    return state["step"].clone() if state else torch.zeros(())
