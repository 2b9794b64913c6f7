"""This process among the processes of torchrun, and its device.

Under torchrun each process encodes its share of the items, and all of them see every feature.

Item i of a step belongs to process i mod N. Features are gathered, and every process computes the
whole loss from them (which costs little beside the towers), so that the gradient of a process's own
features is complete. The sum of the processes' gradients is then that of one process; only the
gradient of logit_scale, which every process computes whole, counts N times. Without torchrun N = 1,
and these functions do nothing.
"""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from utils.errors import InputError


def launched():
    """Number of processes that torchrun started, from its environment variables. Raises InputError
    if WORLD_SIZE is set alone."""
    number = os.environ.get("WORLD_SIZE") or "1"
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if not os.environ.get(name)]
    if not number.isdecimal() or number != "1" and missing:
        raise InputError(f"the environment has WORLD_SIZE={number}, but not torchrun's "
                         f"{', '.join(missing)}; start with torchrun, or unset WORLD_SIZE")
    return int(number)


def world():
    """Number of processes, N."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, 0 to N - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """Whether this process writes files and prints."""
    return rank() == 0


def join_processes(device):
    """Join the other processes of torchrun, if there are any, each with its `device`."""
    if launched() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_processes():
    """Leave the other processes once all of them have come here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first():
    """Run the block in the main process, which writes files, before the others, which read them."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and world() > 1:
        dist.barrier()


def num_own_below(k):
    """How many of the items 0..k-1 are this process's."""
    return max(0, -(-(k - rank()) // world()))


def gather(features, start, end):
    """Features (end - start, D) of the items start..end-1. `features` are those of this process's
    own items, in order, and get gradients."""
    if world() == 1:
        return features
    longest = -(-(end - start) // world())
    padded = F.pad(features, (0, 0, 0, longest - len(features)))
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded.detach().contiguous())
    parts[rank()] = padded
    in_order = [parts[(start + j) % world()] for j in range(world())]
    return torch.stack(in_order, dim=1).flatten(0, 1)[: end - start]


@torch.no_grad()
def reduce_gradients(model):
    """Replace the gradients of a model's parameters by their sum over the processes; the gradient
    of logit_scale, the same in all processes, stays."""
    if world() == 1:
        return
    model.logit_scale.grad /= world()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in gradients):  # in the same order everywhere
        same = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in same])
        dist.all_reduce(flat)
        for gradient, total in zip(same, flat.split([g.numel() for g in same]), strict=True):
            gradient.copy_(total.view_as(gradient))


def from_main(value):
    """The main process's `value`, anything that can be pickled, in every process."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_process(flag, device):
    """Whether `flag` (bool) is set in any process, as a tensor on `device`."""
    flags = torch.full((), int(flag), dtype=torch.int32, device=device)
    if world() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


# ---- the device of this process -----------------------------------------------------------------


def use_device(args):
    """Make `--device` the device of this process, before anything is put on it.

    On a GPU cuDNN's attention is off: it plans each new shape for a third of a second, and most
    batches bring a new shape. In fp32 TF32 is off, too, which cuDNN's convolutions would use.
    """
    if args.device.type != "cuda":
        return
    torch.cuda.set_device(args.device.index or 0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"


def ship(tensor, device):
    """`tensor` on `device`; copied from the host in the background, through pinned memory."""
    if device.type == "cuda" and not (tensor.is_cuda or tensor.is_pinned()):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy of a small tensor in host memory that does not synchronise: when it is read a step
    later, the GPU is not waited for."""

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
