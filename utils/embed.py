"""Embeddings of whole data sets, each distinct image and caption encoded once."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import clip
from data import cut_tokens, image_loader
from utils.errors import InputError


def encode(model, images, tokens):
    """L2-normalised features (u, D), (v, D) of uint8 images (u, 3, R, R) and tokens (v, L)."""
    images = model.encode_image(clip.normalize(images, model.dtype))
    return F.normalize(images, dim=1), F.normalize(model.encode_text(tokens), dim=1)


def encode_batch(model, batch):
    """L2-normalised features (B, D), (B, D) of the pairs of a `Step`: each distinct image once,
    unless BatchNorm's batch statistics make it matter how often an image occurs."""
    images, texts = batch.images, batch.texts
    image_rows = images.rows[0]
    distinct = images.items[: images.end]
    if uses_batch_statistics(model):
        distinct, image_rows = distinct[image_rows], slice(None)
    image_features, text_features = encode(model, distinct, texts.items[: texts.end])
    return image_features[image_rows], text_features[texts.rows[0]]


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

    def finish(features, what):
        features = torch.cat(features)
        features = features if features.dtype == torch.float64 else features.float()
        if not features.isfinite().all():
            raise InputError(f"the model gives {what} features that are not finite; its weights "
                             "are broken or --precision is too low for them")
        return F.normalize(features, dim=1) if normalise else features

    with precision.autocast():
        images = []
        with tqdm(total=len(pairs.images), desc="images", unit="img", disable=None) as bar:
            for batch in image_loader(args, pairs.images):
                batch = batch.to(args.device, non_blocking=True)
                images.append(model.encode_image(clip.normalize(batch, model.dtype)))
                bar.update(len(batch))

        lengths = pairs.tokens.argmax(dim=1)  # captions of like length share a batch
        order = lengths.argsort(stable=True)
        texts = []
        with tqdm(total=len(order), desc="captions", unit="cap", disable=None) as bar:
            for rows in order.split(args.eval_batch_size):
                texts.append(model.encode_text(cut_tokens(pairs.tokens[rows]).to(args.device)))
                bar.update(len(rows))

    texts = finish(texts, "text")
    return finish(images, "image"), texts[order.argsort().to(texts.device)]
