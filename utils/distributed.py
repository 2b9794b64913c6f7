"""Several processes under torchrun: each encodes its share, all of them see every feature.

Item i of a step belongs to process i mod N. Features are gathered, every process computes the whole
loss from them (its cost is nothing beside the towers'), and the gradient that reaches a process's
own features is complete. The sum of the processes' gradients is then that of one process; only
logit_scale, which every process sees whole, counts N times. Without torchrun N = 1 and nothing
here does anything.
"""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F


def world():
    """Number of processes, N."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, 0 to N - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """Whether this process writes files and speaks."""
    return rank() == 0


def join_processes(device):
    """Join the other processes of torchrun, if there are any, each with its `device`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_processes():
    """Leave the other processes once all of them have come here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first():
    """The main process runs the block before the others: it makes the files that they read."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and world() > 1:
        dist.barrier()


def num_own_below(k):
    """How many of the items 0..k-1 are this process's."""
    return max(0, -(-(k - rank()) // world()))


def gather(features, start, end):
    """Features (end - start, D) of the items start..end-1, of which this process gives its own in
    order. A gradient flows into the own ones."""
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
    """Replace the gradients of a model's parameters by their sum over the processes, that of
    logit_scale, which is the same everywhere, by itself."""
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
    """What `value` (anything that can be pickled) is in the main process."""
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
