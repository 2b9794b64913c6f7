"""Devices: how a GPU is used, and tensors on their way between it and the host, for which nobody
waits."""

import torch


def choose_kernels(args):
    """Choose among PyTorch's kernels for a GPU, once for all models of this process.

    cuDNN's attention takes a third of a second to plan for each shape that it has not met, and most
    steps and most batches of captions bring a new one. In fp32 its convolutions would round to
    TF32.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"


def ship(tensor, device):
    """A host tensor on its way to a device, through pinned memory, so that nobody waits for it. One
    that is there already stays."""
    if device.type == "cuda" and not (tensor.is_cuda or tensor.is_pinned()):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Later:
    """A small tensor on its way to the host: whoever reads it a step later never waits for the GPU
    to finish the step at hand."""

    def __init__(self, tensor):
        self.host = tensor.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if tensor.is_cuda else None
        if self.event:
            self.event.record()

    def get(self):
        """The tensor, on the CPU."""
        if self.event:
            self.event.synchronize()
        return self.host
