"""Features of a step, and of whole data sets: each distinct image and caption encoded once."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Subset
from tqdm import tqdm

import clip
from data import cut_tokens, explain_deaths, image_loader
from utils.distributed import gather, rank, world
from utils.errors import InputError


def encoders(model):
    """Functions of uint8 images (u, 3, R, R) and of tokens (v, L) that give raw features (., D)."""
    return lambda x: model.encode_image(clip.normalize(x, model.dtype)), model.encode_text


def encode(model, batch, part, chunks=1):
    """L2-normalised features [(u, D), (v, D)] of the distinct images and captions in a part of a
    `Step`: "batch", "memory" or "rest" (what the memory needs beyond the batch).

    With several `chunks` no more than one chunk's activations are held: each is computed again in
    the backward pass (GradCache, Gao et al. 2021), and gradients stay exact.
    """
    result = []
    for encoder, shared in zip(encoders(model), (batch.images, batch.texts), strict=True):
        start, end = shared.span(part)
        pieces = [encoder(piece) if chunks == 1 else
                  checkpoint(encoder, piece, use_reentrant=False, preserve_rng_state=False)
                  for piece in shared.own(start, end).chunk(chunks)]
        result.append(gather(F.normalize(torch.cat(pieces), dim=1), start, end))
    return result


def encode_batch(model, batch, chunks=1):
    """L2-normalised features [(B, D), (B, D)] of the pairs of a `Step`.

    Where BatchNorm uses batch statistics it matters how often an image occurs, so that images are
    then encoded as they lie in the batch.
    """
    if uses_batch_statistics(model):
        if world() > 1 or chunks > 1:
            raise InputError("--recipe released trains BatchNorm on whole batches: a ResNet needs "
                             "one process and --accum_steps 1")
        encode_image, encode_text = encoders(model)
        features = [encode_image(batch.images.items[batch.images.rows[0]]),
                    encode_text(batch.texts.items[batch.texts.rows[0]])]
        return [F.normalize(x, dim=1) for x in features]
    images, texts = encode(model, batch, "batch", chunks)
    return [images[batch.images.rows[0]], texts[batch.texts.rows[0]]]


def uses_batch_statistics(model):
    """Whether `model` has a BatchNorm layer in training mode."""
    return any(isinstance(m, torch.nn.BatchNorm2d) and m.training for m in model.modules())


@torch.inference_mode()
def embed_pairs(model, pairs, args, precision, normalise=True):
    """Features of the distinct images and captions of `Pairs`, on the device.

    Returns (images (u, D), captions (v, D)), fp32 (float64 for a float64 model), L2-normalised
    unless `normalise` is False. The model is left in eval mode. Raises InputError when a feature is
    not finite.
    """
    model.eval()

    def finish(features, what, total):
        features = gather(torch.cat(features), 0, total)
        features = features if features.dtype == torch.float64 else features.float()
        if not features.isfinite().all():
            raise InputError(f"the model gives {what} features that are not finite; its weights "
                             "are broken or --precision is too low for them")
        return F.normalize(features, dim=1) if normalise else features

    encode_image, encode_text = encoders(model)
    lengths = pairs.tokens.argmax(dim=1)  # captions of like length share a batch
    order = lengths.argsort(stable=True)
    # where there are fewer items than processes, the last ones encode one in vain
    own_images = range(rank() % len(pairs.images), len(pairs.images), world())
    own_texts = order[rank() % len(order) :: world()]
    with precision.autocast():
        images, texts = [], []
        with (tqdm(total=len(own_images), desc="images", unit="img", disable=None) as bar,
              explain_deaths(pairs.images)):
            for batch in image_loader(args, Subset(pairs.images, own_images)):
                images.append(encode_image(batch.to(args.device, non_blocking=True)))
                bar.update(len(batch))
        with tqdm(total=len(order), desc="captions", unit="cap", disable=None) as bar:
            for rows in own_texts.split(args.eval_batch_size):
                texts.append(encode_text(cut_tokens(pairs.tokens[rows]).to(args.device)))
                bar.update(len(rows) * world())

    texts = finish(texts, "text", len(order))[order.argsort().to(args.device)]
    return finish(images, "image", len(pairs.images)), texts
