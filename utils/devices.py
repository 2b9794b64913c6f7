"""The GPU: which kernels it uses, and copies between it and the host that do not synchronise."""

import torch


def choose_kernels(args):
    """Choose PyTorch's kernels for a GPU, once for all models of this process.

    cuDNN's attention plans a third of a second for each new shape, and most steps and most batches
    of captions bring one. In fp32 cuDNN's convolutions would round to TF32.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"


def ship(tensor, device):
    """The tensor on the device; a copy from the host goes through pinned memory and does not
    synchronise."""
    if device.type == "cuda" and not (tensor.is_cuda or tensor.is_pinned()):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy of a small tensor to the host that does not synchronise: read a step later, it does
    not wait for the step that runs on the GPU."""

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
