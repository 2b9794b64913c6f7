"""The contrastive loss of each pair, and the weights that the methods give to pairs."""

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


def _ratio(before, after):
    """before / after of losses >= 0, where nothing over nothing means: unchanged."""
    return torch.where((before == 0) & (after == 0), 1.0, before / after)


def negative_impact_weights(image_before, image_after, text_before, text_after):
    """The paper's weights w, (B,), in [0, 1] and always finite.

    Arguments: losses (B,) of the memory entries M^I and M^T under A (before) and under A' (after
    its step). r_i is the mean of the two ratios before/after: below 1, the step on the batch made
    the clean memory entries of pair i worse. w_i = tanh(r_i) if r_i < 1, else 1.
    """
    r = (_ratio(image_before, image_after) + _ratio(text_before, text_after)) / 2
    return torch.where(r < 1, torch.tanh(r), 1.0)


def one_step_anti_noise_weights(cosine, beta):
    """Weights of One-Step Anti-noise (Li et al. 2024) for cosines of pairs, any shape.

    s = cosine - beta, where beta is the mean cosine of random pairs; w = 0 where s <= 0, else
    s^2 (1 - s).
    """
    s = (cosine - beta).clamp(min=0)
    return s.square() * (1 - s)
