"""AdamW as CLIP's fine-tuners use it, its rate, its gradients, and `--precision`."""

import contextlib

import torch
import torch._functorch.config
from torch.nn import BatchNorm2d
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import clip
import clip.model
from utils.distributed import world
from utils.errors import InputError

REPLAYED = ("fp32", "amp_bf16")  # precisions in which AdamW asks the host for nothing
MOST_SHAPES = 64  # of code that --compile makes of a block: by tower, gradient, precision


def adamw(model, args):
    """AdamW over all parameters of `model` that are trained, decayed alike, as CLIP's fine-tuners
    do.

    Half weights take the unfused one, whose every operation rounds to half, as released. The fused
    kernel computes in fp32 and rounds what it stores, so that a second moment still counts in its
    own step if it underflows. Where steps are replayed the rate is a tensor, which a CUDA graph
    reads anew. Raises InputError when eps is zero in half.
    """
    parameters, rate = trained(model), args.lr
    half = any(p.dtype == torch.float16 for p in parameters)
    if half and not torch.tensor(args.eps).half():
        raise InputError(f"--eps {args.eps:g} is zero in half precision, where second moments are "
                         "too; use 1e-6, or another --precision")
    if half:  # torch's default is one kernel per tensor where `fused` is given
        kind = {"fused": False, "foreach": parameters[0].is_cuda}
    else:
        kind = {"fused": True, "capturable": replays(args)}
    if replays(args):
        rate = torch.tensor(args.lr, device=parameters[0].device)
    return torch.optim.AdamW(parameters, lr=rate, betas=(args.beta1, args.beta2), eps=args.eps,
                             weight_decay=args.weight_decay, **kind)


def replays(args):
    """Whether the options let steps be captured and replayed: on a GPU, by one process."""
    return (args.device.type == "cuda" and not getattr(args, "eager", True)
            and args.precision in REPLAYED and world() == 1)


def set_rate(optimizer, rate):
    """Make `rate` the learning rate of an optimiser's next steps."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def prepare_training(model, args, recipe):
    """Apply --freeze, --grad_checkpointing and --compile to a model, in place, before its optimiser
    is made. Raises InputError when the recipe trains the BatchNorm of its ResNet together with what
    cannot see whole batches."""
    for name, parameter in model.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        parameter.requires_grad_(tower != args.freeze or name == "logit_scale")
    if trains_batch_norm(model, args, recipe):
        memory = recipe.trains_on_memory and getattr(args, "memory_loss_weight", 0)
        pieces = world() > 1 or args.accum_steps > 1 or args.grad_checkpointing
        if memory or pieces:
            raise InputError(
                f"--recipe {args.recipe} trains BatchNorm on whole batches: a ResNet then needs "
                "one process, --accum_steps 1, no --grad_checkpointing, and a recipe that does not "
                "train on the memory")
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        compile_blocks(model)


def trains_batch_norm(model, args, recipe):
    """Whether `model` has BatchNorm layers that use and update batch statistics in training."""
    return (recipe.batch_norm_trains and args.freeze != "image"
            and any(isinstance(m, BatchNorm2d) for m in model.modules()))


def compile_blocks(model):
    """Let torch.compile fuse the operations around attention in the blocks of both towers, in
    place. All blocks of a tower share the compiled code, for any number of items."""
    torch._functorch.config.donated_buffer = False  # the graph is retained for A's own gradient
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    clip.model.attend = torch.compiler.disable(clip.model.attend)  # to be cuDNN's
    for module in model.modules():
        if isinstance(module, clip.model.ResidualAttentionBlock):
            module.compile(dynamic=True)


def clip_gradients(model, max_norm):
    """Scale a model's gradients in place to a global norm of at most `max_norm`; 0 leaves them.
    Returns the norm before that (scalar tensor). Norms of half gradients are fp32: in half they
    overflow at 65504, and what is divided by infinity is silently zero."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([torch.linalg.vector_norm(g, dtype=torch.float32)
                           if g.dtype == torch.float16 else g for g in gradients])
    if max_norm:
        clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def trained(model):
    """The parameters of `model` that have a gradient: all but those of a frozen tower."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def steps_of(optimizer):
    """Steps that an AdamW optimiser has made, those before a resume included: a scalar tensor."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0])
    return state["step"].clone() if state else torch.zeros(())


# ---- --precision --------------------------------------------------------------------------------


class Precision:
    """`fp32`; `amp_bf16` and `amp_fp16`: fp32 weights, half-precision arithmetic; `fp16`: weights
    and AdamW's state in half, as the released script trains on a GPU."""

    def __init__(self, name, device):
        self.name, self.device = name, device
        self.amp = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "amp_fp16")

    def anew(self):
        """The same precision with a new gradient scaler."""
        return Precision(self.name, self.device)

    def autocast(self):
        """Context in which the towers run."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp)

    def prepare(self, model):
        """Convert a freshly loaded fp32 model in place; returns it."""
        if self.name == "fp16":
            clip.convert_weights_to_fp16(model)
        return model
