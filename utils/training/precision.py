"""`--precision`: what the weights are stored in, and what the towers compute in."""

import contextlib

import torch

import clip


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
