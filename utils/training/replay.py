"""A training step as CUDA graphs: its kernels are recorded once for each shape of batch, and then
replayed by a single launch.

A step of NPC launches thousands of kernels. Launching them takes the host longer than running them
takes the GPU. A graph holds addresses: each batch is copied to where the first batch of its shape
lay; parameters, AdamW's moments and rates stay where they are.
"""

import contextlib
import copy

import torch
from torch.utils._pytree import tree_leaves


class Replay:
    """Wraps `step`, which takes a `Batch` on a GPU and returns tensors by name: records a CUDA
    graph for each shape of batch, then replays it.

    The next step overwrites what a step returns. Python code of the step runs when a shape is seen
    for the first and the second time, not when it is replayed. A step that cannot be captured, as
    it looks at a value on the host or memory runs out, ends all replaying: the graphs are freed,
    `log` says so, and steps run eagerly from then on.
    """

    def __init__(self, step, log):
        self.step, self.log = step, log
        self.graphs = {}  # by shape; None: seen once; captured when it is seen again
        self.pool = torch.cuda.graph_pool_handle()  # steps never overlap: all graphs share it

    def __call__(self, batch):
        shape = shape_of(batch)
        if shape not in self.graphs or self.pool is None:
            self.graphs[shape] = None
            with cudnn_attention():
                return self.step(batch)
        if self.graphs[shape] is None:
            stream = torch.cuda.current_stream()
            try:
                with cudnn_attention():
                    self.graphs[shape] = self._capture(batch)
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a failed capture can leave its own one current
                self.graphs, self.pool = {}, None
                self.log(f"warning: steps are not replayed, as one cannot be captured "
                         f"({str(error).splitlines()[0]}); --eager does without")
                return self(batch)
        graph, inputs, numbers = self.graphs[shape]
        torch._foreach_copy_(tensors(inputs), tensors(batch))
        graph.replay()
        return dict(numbers)

    def _capture(self, batch):
        """(graph, the `Batch` that it reads, the numbers that it writes). Raises RuntimeError where
        the batch is on another device than the process, whose graph would be empty."""
        if batch.indices.device.index != torch.cuda.current_device():
            raise RuntimeError(f"the batch is on {batch.indices.device}, the process on cuda:"
                               f"{torch.cuda.current_device()}")
        graph, inputs = torch.cuda.CUDAGraph(), copy.deepcopy(batch)
        # thread_local: threads that pin memory go on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            numbers = {name: value.detach() for name, value in self.step(inputs).items()}
        return graph, inputs, numbers


@contextlib.contextmanager
def cudnn_attention():
    """Context in which attention is cuDNN's: the fastest kernel where shapes repeat. It plans each
    new shape for a third of a second, see `utils.distributed.use_device`."""
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
