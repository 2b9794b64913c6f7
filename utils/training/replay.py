"""A training step as CUDA graphs: what it launches is recorded once for each shape of batch, and
then replayed by a single launch.

A step of NPC launches thousands of kernels, which takes the host longer than the GPU needs to run
them. A graph holds addresses: what it reads is copied to where its first batch lay, what lives on
between steps (parameters, AdamW's moments and rates) stays where it is.
"""

import contextlib
import copy

import torch
from torch.utils._pytree import tree_leaves


class Replay:
    """`step`, which takes a `Batch` on a GPU and returns tensors by name, faster.

    What it returns is overwritten by the next step. Whatever Python does in the step happens when a
    shape is met for the first and the second time, not when it is replayed. A step that looks at a
    value on the host cannot be captured: it then runs as it is, and `log` says so.
    """

    def __init__(self, step, log):
        self.step, self.log, self.graphs = step, log, {}  # None: met once, and perhaps never again
        self.pool = torch.cuda.graph_pool_handle()  # steps never overlap: all graphs share it

    def __call__(self, batch):
        shape = shape_of(batch)
        if shape not in self.graphs or self.pool is None:
            self.graphs[shape] = None
            with cudnn_attention():
                return self.step(batch)
        if self.graphs[shape] is None:
            try:
                with cudnn_attention():
                    self.graphs[shape] = self._capture(batch)
            except RuntimeError as error:
                self.log(f"warning: steps are not replayed, as one cannot be captured "
                         f"({str(error).splitlines()[0]}); --eager does without")
                self.pool = None
                return self(batch)
        graph, inputs, numbers = self.graphs[shape]
        torch._foreach_copy_(tensors(inputs), tensors(batch))
        graph.replay()
        return dict(numbers)

    def _capture(self, batch):
        """(graph, the `Batch` that it reads, the numbers that it writes)."""
        graph, inputs = torch.cuda.CUDAGraph(), copy.deepcopy(batch)
        # thread_local: others, which pin memory or write checkpoints, go on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            numbers = {name: value.detach() for name, value in self.step(inputs).items()}
        return graph, inputs, numbers


@contextlib.contextmanager
def cudnn_attention():
    """Context in which attention is cuDNN's: the fastest one where shapes repeat, but it plans each
    new one for a third of a second; see `utils.devices.choose_kernels`."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def tensors(batch):
    """The tensors of a `Batch`."""
    return [x for x in tree_leaves(batch) if isinstance(x, torch.Tensor)]


def shape_of(batch):
    """What a graph depends on: the shapes of a batch's tensors and its numbers of items."""
    return tuple(x.shape if isinstance(x, torch.Tensor) else x for x in tree_leaves(batch))
