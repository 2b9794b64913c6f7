"""Features of a whole data set: each distinct image and caption encoded once."""

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from utils.distributed import gather, rank, world
from utils.errors import InputError
from utils.method.passes import cut_tokens, encoders
from utils.reading.images import explain_deaths, image_loader


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
              explain_deaths()):
            for batch in image_loader(args, Subset(pairs.images, own_images)):
                images.append(encode_image(batch.to(args.device, non_blocking=True)))
                bar.update(len(batch))
        with tqdm(total=len(order), desc="captions", unit="cap", disable=None) as bar:
            for rows in own_texts.split(args.eval_batch_size):
                texts.append(encode_text(cut_tokens(pairs.tokens[rows]).to(args.device)))
                bar.update(len(rows) * world())

    texts = finish(texts, "text", len(order))[order.argsort().to(args.device)]
    return finish(images, "image", len(pairs.images)), texts
