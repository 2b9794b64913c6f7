"""The losses of one step by as few passes through the towers as they need.

This module does not know the method. tests/naive.py has a naive version that makes every pass by
itself; the tests show that both give the same numbers. The equalities that save passes:

1. A' starts as A, so A's pass over the batch is also that of A': one forward, two backward.
2. One pass over the memory gives the losses of the ratio and the losses that A trains on.
3. Each distinct image and caption of batch and memory is encoded once; pairs are gathered from
   these. Each process of torchrun encodes its share of them.
4. Items of the memory alone are encoded apart, so that the gradient of A' crosses only the
   batch's graph.
5. The text tower is causal and read at the end token: captions are cut at the longest of a step.
6. Unused losses are not computed: a step without A' and memory is a plain CLIP step.

BatchNorm in training mode makes a feature depend on the items beside it, which forbids 1 and 3:
images are then encoded as they lie in the batch, and A' makes passes of its own.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils.distributed import gather, num_own_below, reduce_gradients
from utils.method.batches import BATCH, MEMORY_I, MEMORY_T
from utils.method.features import encoders
from utils.method.optimizer import trained


def uses_batch_statistics(model):
    """Whether `model` has a BatchNorm layer in training mode."""
    return any(isinstance(m, torch.nn.BatchNorm2d) and m.training for m in model.modules())


class Passes:
    """The losses (B,) of a step's pairs under A and its siamese A', and their gradients.

    batch: l(batch; A). siamese_batch: l(batch; A'). memory: [l(M^I; A), l(M^T; A)], zeros where the
    batch was read without a memory. All are computed at once, when `siamese`, if there is one, has
    A's parameters. The method makes totals of them; `siamese_backward` and then `backward` give the
    totals' gradients to the parameters of A' and of A.

    precision: a utils.method.optimizer.Precision, whose scaler scales both gradients.
    accum_steps: number of pieces in which items are encoded, each once more in the backward pass,
    so that the activations of one piece are held at a time (GradCache, Gao et al. 2021).
    memory_gradient: whether losses on the memory have one.
    """

    def __init__(self, A, batch, precision, siamese=None, accum_steps=1, memory_gradient=True):
        self.A, self.siamese, self.items = A, siamese, (batch.images, batch.texts)
        self.precision, self.accum_steps = precision, accum_steps
        self.shared = not uses_batch_statistics(A)  # so that A's pass is that of A' too
        self.model = A if self.shared else siamese  # makes the passes of A' before its step
        if self.model is not None:
            features = self._encode(self.model, "batch")
            self.siamese_batch = self._losses(self.model, features, BATCH)
        self.batch = self.siamese_batch if self.shared else self._losses_pair_by_pair()
        self.memory = 2 * [torch.zeros_like(self.batch)]
        if len(batch.images.rows) > 1:  # those of M^I and M^T, too
            with torch.set_grad_enabled(memory_gradient):
                beyond = self._encode(self.model, "memory beyond the batch")
                features = [torch.cat(parts) for parts in zip(features, beyond, strict=True)]
                self.memory = [self._losses(self.model, features, entries)
                               for entries in (MEMORY_I, MEMORY_T)]

    @torch.no_grad()
    def memory_after(self):
        """[l(M^I; A'), l(M^T; A')] as A' is now, (B,) each."""
        features = self._encode(self.siamese, "memory")
        return [self._losses(self.siamese, features, entries, "memory")
                for entries in (MEMORY_I, MEMORY_T)]

    def siamese_backward(self, total):
        """Give the parameters of A' the gradient of `total`, made of `siamese_batch`. The graph is
        kept where it is A's too."""
        self._backward(total, self.model, self.siamese, retain_graph=self.shared)

    def backward(self, total):
        """Give the parameters of A the gradient of `total`, made of `batch` and `memory`."""
        self._backward(total, self.A, self.A)

    def _backward(self, total, of, to, retain_graph=False):
        """Give the parameters of one model the gradient of `total` with respect to those of
        another, summed over the processes and scaled for `precision.scaler`."""
        gradients = torch.autograd.grad(self.precision.scaler.scale(total), trained(of),
                                        retain_graph=retain_graph)
        for parameter, gradient in zip(trained(to), gradients, strict=True):
            parameter.grad = gradient
        reduce_gradients(to)

    def _losses(self, model, features, entries, part="batch"):
        """Losses (B,) of the pairs of the batch, of M^I or of M^T among themselves, from features
        [(u, D), (v, D)] that begin with those of a part of the step."""
        images, texts = (x[distinct.rows[entries] - span(distinct, part)[0]]
                         for x, distinct in zip(features, self.items, strict=True))
        return pair_losses(images, texts, model.logit_scale)

    def _losses_pair_by_pair(self):
        """l(batch; A), (B,), where it matters how often an image occurs."""
        with self.precision.autocast():
            features = [F.normalize(encoder(distinct.items[distinct.rows[BATCH]]), dim=1)
                        for encoder, distinct in zip(encoders(self.A), self.items, strict=True)]
        return pair_losses(*features, self.A.logit_scale)

    def _encode(self, model, part):
        """L2-normalised features [(u, D), (v, D)] of the distinct items of a part of the step."""
        result = []
        with self.precision.autocast():
            for encoder, distinct in zip(encoders(model), self.items, strict=True):
                start, end = span(distinct, part)
                own = distinct.items[num_own_below(start) : num_own_below(end)]
                pieces = [encoder(piece) if self.accum_steps == 1 else
                          checkpoint(encoder, piece, use_reentrant=False, preserve_rng_state=False)
                          for piece in own.chunk(self.accum_steps)]
                features = F.normalize(torch.cat(pieces), dim=1)
                result.append(gather(features, start, end))
        return result


def span(distinct, part):
    """(first, last + 1) of the items that a part of the step has."""
    return {"batch": (0, distinct.num_batch),
            "memory": (distinct.memory_start, distinct.total),
            "memory beyond the batch": (distinct.num_batch, distinct.total)}[part]


@torch.no_grad()
def copy_parameters(source, target):
    """Overwrite the parameters and buffers of `target` with those of `source`."""
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)


# ---- the loss of a pair -------------------------------------------------------------------------


def pair_losses(image_features, text_features, logit_scale):
    """Loss of every pair against the others of its batch: shape (B,).

    l_i = (CE of row i image->text + CE of row i text->image) / 2. Features are L2-normalised,
    (B, D); `logit_scale` is the log temperature (scalar). Half-precision features are scored in
    fp32.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        if image_features.dtype in (torch.float16, torch.bfloat16):
            image_features, text_features = image_features.float(), text_features.float()
        logits = logit_scale.exp().to(image_features.dtype) * image_features @ text_features.T
        target = torch.arange(len(logits), device=logits.device)  # (B,)
        i2t = F.cross_entropy(logits, target, reduction="none")
        t2i = F.cross_entropy(logits.T, target, reduction="none")
        return (i2t + t2i) / 2
