"""The naive version of utils.method.passes: every loss by a pass of its own, nothing shared.

It follows the equations literally and uses nothing of the repository but the towers. `pairs` and
`bank` are set by the test; a pair is encoded wherever it occurs, captions at full length.
"""

import torch

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)


def losses(model, pairs, chosen):
    """(B,) losses of chosen pairs among themselves, full-length captions, one image per pair."""
    images = torch.stack([pairs.images[k] for k in pairs.image_of[chosen]]).double()
    images = (images / 255 - MEAN) / STD
    image = model.encode_image(images)
    text = model.encode_text(pairs.tokens[pairs.text_of[chosen]])
    image = image / image.norm(dim=1, keepdim=True)
    text = text / text.norm(dim=1, keepdim=True)
    logits = model.logit_scale.exp() * image @ text.T
    i2t = logits.logsumexp(1) - logits.diag()
    t2i = logits.logsumexp(0) - logits.diag()
    return (i2t + t2i) / 2


class NaivePasses:
    """Takes the place of `Passes`. A's losses are in A's mode, those of the siamese in eval mode;
    the memory is scored by the siamese, which has A's weights, unless A trains on it."""

    pairs, bank = None, None

    def __init__(self, A, batch, precision, siamese=None, accum_steps=1, memory_gradient=True):
        chosen, self.siamese = batch.indices.numpy(), siamese
        self.entries = (self.bank.image_entry[self.pairs.image_of[chosen]],
                        self.bank.caption_entry[chosen])
        self.batch = losses(A, self.pairs, chosen)
        self.siamese_batch = losses(siamese, self.pairs, chosen)
        with torch.set_grad_enabled(memory_gradient):
            self.memory = tuple(losses(A if memory_gradient else siamese, self.pairs, entries)
                                for entries in self.entries)

    @torch.no_grad()
    def memory_after(self):
        return tuple(losses(self.siamese, self.pairs, entries) for entries in self.entries)

    def siamese_backward(self, total):
        total.backward()

    def backward(self, total):
        total.backward()
