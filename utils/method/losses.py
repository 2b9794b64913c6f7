"""The contrastive loss of each pair."""

import torch
import torch.nn.functional as F


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
