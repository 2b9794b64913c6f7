"""`--precision`: what the weights are stored in, and what the towers compute in."""

import contextlib

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import clip
from utils.distributed import reduce_gradients


class Precision:
    """`fp32`; `amp_bf16` and `amp_fp16`: fp32 weights, half-precision arithmetic; `fp16`: weights
    and AdamW's state in half, as the released script trains on a GPU."""

    def __init__(self, name, device):
        self.name, self.device = name, device
        self.amp = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "amp_fp16")

    def anew(self):
        """The same, with a gradient scaler that has seen nothing yet."""
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

    def step(self, model, optimizer, max_norm=None):
        """One step of the optimiser of `model` on the gradients at hand, summed over processes and
        clipped to a global norm of `max_norm` if it is given; frees them after it. Returns the
        norm before clipping (scalar tensor), None without `max_norm`."""
        reduce_gradients(model)
        self.scaler.unscale_(optimizer)
        norm = None
        if max_norm is not None:
            norm = clip_gradients(model, max_norm)
        self.scaler.step(optimizer)
        optimizer.zero_grad()
        return norm


def clip_gradients(model, max_norm):
    """Scale a model's gradients in place to a global norm of at most `max_norm`; returns the norm
    before that (scalar tensor). Norms of half gradients are fp32: in half they overflow at 65504,
    and what is divided by infinity is silently zero."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients])
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
