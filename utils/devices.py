"""Devices: how a GPU is used, and host copies that do not synchronise."""

import torch


def use_device(args):
    """Make `--device` the device of this process, before anything is put on it, and choose among
    PyTorch's kernels for a GPU.

    cuDNN's attention takes a third of a second to plan each new shape, and most steps and most
    batches of captions bring a new one. In fp32 its convolutions would round to TF32.
    """
    if args.device.type != "cuda":
        return
    torch.cuda.set_device(args.device.index or 0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"


def ship(tensor, device):
    """A host tensor copied to a device in the background, through pinned memory; a tensor that is
    there already as it is."""
    if device.type == "cuda" and not (tensor.is_cuda or tensor.is_pinned()):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy of a small tensor in host memory, made in the background: reading it a step later does
    not wait for the step at hand."""

    def __init__(self, tensor):
        self.host = tensor.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if tensor.is_cuda else None
        if self.event:
            self.event.record()

    def get(self):
        """The copy, a tensor on the CPU; waits until it is complete."""
        if self.event:
            self.event.synchronize()
        return self.host
