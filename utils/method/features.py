"""Features of a whole data set: each distinct image and caption encoded once, or read from a
file."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from utils.distributed import gather, rank, world
from utils.errors import InputError
from utils.files import atomic_write, reading
from utils.method.memorybank import fingerprint
from utils.method.passes import cut_tokens, encoders
from utils.reading.images import explain_deaths, image_loader

RANDOM = 256  # random images, and captions, whose cosines are averaged


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


@torch.inference_mode()
def mean_random_cosine(model, args, precision):
    """Mean cosine of pictures of random pixels with texts of random tokens: One-Step Anti-noise's
    idea of what a model says where there is nothing to say."""
    rng, size = np.random.default_rng(args.seed), model.visual.input_resolution
    images, texts = [], []
    with precision.autocast():
        for part in np.array_split(np.arange(RANDOM), -(-RANDOM // args.eval_batch_size)):
            pixels = rng.integers(0, 256, (len(part), 3, size, size), dtype=np.uint8)
            tokens = rng.integers(1, model.vocab_size - 2, (len(part), args.context_length))
            tokens[:, 0], tokens[:, -1] = model.vocab_size - 2, model.vocab_size - 1
            for found, encode, items in zip((images, texts), encoders(model), (pixels, tokens),
                                            strict=True):
                items = torch.from_numpy(items).to(args.device)
                found.append(F.normalize(encode(items).float(), dim=1))
    return (torch.cat(images).mean(dim=0) @ torch.cat(texts).mean(dim=0)).item()


# ---- features of other models -------------------------------------------------------------------


def write_items(pairs, folder):
    """Write what a model of any kind must encode for `--judge_features`: images.txt, the path of
    each distinct image, captions.txt, each distinct caption, and items.sha256, the hash of both and
    of how they are paired."""
    caption_of = dict(zip(pairs.text_of.tolist(), pairs.captions, strict=True))
    lines = {"images.txt": [pairs.images.folder / name for name in pairs.images.names],
             "captions.txt": [caption_of[k] for k in range(len(caption_of))],
             "items.sha256": [fingerprint(pairs)]}
    for name, content in lines.items():
        with atomic_write(folder / name) as f:
            f.writelines(f"{line}\n" for line in content)


def read_features(path, pairs, device):
    """((images (u, D), texts (v, D)) fp32 on the device, log temperature) of an .npz file.

    It holds `images` and `texts`, a row for each distinct item or for each pair, `items`, the hash
    that `write_items` wrote, and perhaps `logit_scale` (else ln 100). Raises InputError when they
    do not fit the pairs.
    """
    advice = "python data.py --list_items DIR writes what must be encoded, in which order"
    with (reading(path, "a file of features", advice),
          np.load(path, allow_pickle=False) as data):
        arrays = {name: data[name] for name in data.files}
        items = str(arrays["items"].reshape(-1)[0])
        features = [arrays["images"], arrays["texts"]]
        scale = float(arrays.get("logit_scale", math.log(100)))
    if items.strip() != fingerprint(pairs):
        raise InputError(f"{path} holds features of other images or captions than {pairs.source}, "
                         f"or in another order; {advice}")
    found = []
    for name, values, item_of in (("images", features[0], pairs.image_of),
                                  ("texts", features[1], pairs.text_of)):
        count = int(item_of.max()) + 1
        if values.ndim != 2 or len(values) not in (count, len(pairs)):
            raise InputError(f"{path}: '{name}' has shape {values.shape}; expected a row for each "
                             f"of {count} distinct {name} or of {len(pairs)} pairs; {advice}")
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise InputError(f"{path}: '{name}' must be finite floating-point numbers")
        if len(values) != count:
            values = values[np.unique(item_of, return_index=True)[1]]
        found.append(torch.from_numpy(values.astype(np.float32)).to(device))
    if found[0].shape[1] != found[1].shape[1]:
        raise InputError(f"{path}: images have {found[0].shape[1]} dimensions, texts "
                         f"{found[1].shape[1]}; both must lie in one space")
    return found, torch.tensor(scale)
