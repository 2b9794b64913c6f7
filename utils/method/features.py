"""Features of a whole data set: each distinct image and caption encoded once, or read from a file;
held in blocks, and searched."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import clip
from utils.distributed import gather, rank, world
from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.method.batches import cut_tokens
from utils.method.pairs import fingerprint, first_pairs
from utils.progress import progress
from utils.reading.images import image_loader

RANDOM = 256  # random images, and captions, whose cosines are averaged
CHECKED = 2**14  # rows of features that are checked at a time
ITEMS, LN_100 = "items.sha256", math.log(100)
ADVICE = "python data.py --list_items DIR writes what must be encoded, in which order"


def encoders(model):
    """Functions of uint8 images (u, 3, R, R) and of tokens (v, L) that give raw features (., D)."""
    def encode_image(images):
        return model.encode_image(
            clip.normalize(images, model.dtype, model.image_mean, model.image_std))
    return encode_image, model.encode_text


@torch.inference_mode()
def embed_pairs(model, pairs, args, precision):
    """Features of the distinct images and captions of `Pairs`, on the device.

    Returns (images (u, D), captions (v, D)), fp32 (float64 for a float64 model), not normalised.
    The model is left in eval mode. Raises InputError when a feature is not finite.
    """
    model.eval()

    def finish(features, what, total):
        features = gather(torch.cat(features), 0, total)
        features = features if features.dtype == torch.float64 else features.float()
        if not features.isfinite().all():
            raise InputError(f"the model gives {what} features that are not finite; its weights "
                             "are broken or --precision is too low for them")
        return features

    encode_image, encode_text = encoders(model)
    lengths = pairs.tokens.argmax(dim=1)  # captions of like length share a batch
    order = lengths.argsort(stable=True)
    # where there are fewer items than processes, the last ones encode one in vain
    own_images = range(rank() % len(pairs.images), len(pairs.images), world())
    own_texts = order[rank() % len(order) :: world()]
    with precision.autocast():
        images, texts = [], []
        with progress(total=len(own_images), desc="images", unit="img") as bar:
            for batch in image_loader(args, Subset(pairs.images, own_images)):
                images.append(encode_image(batch.to(args.device, non_blocking=True)))
                bar.update(len(batch))
        with progress(total=len(order), desc="captions", unit="cap") as bar:
            for rows in own_texts.split(args.eval_batch_size):
                texts.append(encode_text(cut_tokens(pairs.tokens[rows]).to(args.device)))
                bar.update(len(rows) * world())

    texts = finish(texts, "text", len(order))[order.argsort().to(args.device)]
    return finish(images, "image", len(pairs.images)), texts


@torch.inference_mode()
def mean_random_cosine(model, args, precision):
    """Mean cosine of pictures of random pixels with texts of random tokens: One-Step Anti-noise's
    idea of what a model says where there is nothing to say."""
    rng, size = np.random.default_rng(args.noise_seed), model.visual.input_resolution
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
    lines = {"images.txt": (pairs.images.folder / name for name in pairs.images.names),
             "captions.txt": (pairs.captions[i] for i in first_pairs(pairs.text_of)),
             ITEMS: [fingerprint(pairs)]}
    for name, content in lines.items():
        with atomic_write(folder / name) as f:
            f.writelines(f"{line}\n" for line in content)


def read_features(path, pairs, device):
    """((images (u, D), texts (v, D)) as `Features`, log temperature) of a folder or an .npz file.

    It holds `images` and `texts`, a row for each distinct item or for each pair, and `items`, the
    hash that `write_items` wrote: arrays of the file, or images.npy, texts.npy and items.sha256 of
    the folder, whose arrays stay on disk (a GPU takes them as they are). The log temperature is
    `logit_scale` or logit_scale.txt, or else ln 100. Raises InputError when they do not fit the
    pairs.
    """
    read = _read_folder if Path(path).is_dir() else _read_file
    arrays, items, scale = read(Path(path))
    if items.strip() != fingerprint(pairs):
        raise InputError(f"{path} holds features of other images or captions than {pairs.source}, "
                         f"or in another order; {ADVICE}")
    found = []
    for (name, values), item_of in zip(arrays.items(), (pairs.image_of, pairs.text_of),
                                       strict=True):
        count = int(item_of.max()) + 1
        if values.ndim != 2 or len(values) not in (count, len(pairs)):
            raise InputError(f"{path}: '{name}' has shape {tuple(values.shape)}; expected a row "
                             f"for each of {count} distinct {name} or of {len(pairs)} pairs; "
                             f"{ADVICE}")
        if not (values.is_floating_point() and all(rows.isfinite().all()
                                                   for rows in values.split(CHECKED))):
            raise InputError(f"{path}: '{name}' must be finite floating-point numbers")
        per_pair = len(values) != count
        chosen = torch.from_numpy(first_pairs(item_of)).to(device) if per_pair else None
        found.append(Features(values.to(device), chosen=chosen, dtype=torch.float32))
    if found[0].shape[1] != found[1].shape[1]:
        raise InputError(f"{path}: images have {found[0].shape[1]} dimensions, texts "
                         f"{found[1].shape[1]}; both must lie in one space")
    return found, torch.tensor(scale)


def _read_file(path):
    with parsing(path, "a file of features", ADVICE), np.load(path, allow_pickle=False) as data:
        arrays = {name: torch.from_numpy(data[name]) for name in ("images", "texts")}
        items = str(data["items"].reshape(-1)[0])
        return arrays, items, float(data["logit_scale"] if "logit_scale" in data else LN_100)


def _read_folder(path):
    arrays, scale = {}, path / "logit_scale.txt"
    for name in ("images", "texts"):
        file = path / f"{name}.npy"
        with parsing(file, "an array of features", ADVICE):  # c: in memory it may change, unwarned
            arrays[name] = torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    with parsing(path / ITEMS, "a hash of items", ADVICE):
        items = (path / ITEMS).read_text("utf-8")
    if not scale.exists():
        return arrays, items, LN_100
    with parsing(scale, "a log temperature", "write a number, or remove the file"):
        return arrays, items, float(scale.read_text("utf-8"))


# ---- features in blocks, and the search for the most similar ones -------------------------------


QUERIES, KEYS = 4096, 4096  # of a block of similarities: 64 MiB in fp32


class Features:
    """Features (n, D) of which only the rows in use are held.

    features: any float dtype, a tensor, one that is mapped from a file, or other `Features`. A
    slice or an int64 tensor as index gives these rows on the device, in `dtype` (fp32, or float64
    where the features are): of those that are `chosen` (n,) int64 where given, less `centre` (D,)
    where given, at length 1 with `normalise`.
    """

    def __init__(self, features, chosen=None, centre=None, normalise=False, dtype=None):
        self.features, self.chosen = features, chosen
        self.centre, self.normalise = centre, normalise
        self.device = features.device
        self.dtype = dtype or torch.promote_types(features.dtype, torch.float32)
        self.shape = (len(features if chosen is None else chosen), features.shape[1])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if self.chosen is not None:
            index = self.chosen[index]
        rows = self.features[index].to(self.dtype)
        if self.centre is not None:
            rows = rows - self.centre
        return F.normalize(rows, dim=1) if self.normalise else rows


def normalised(features):
    """`Features` (n, D) at length 1."""
    return Features(features, normalise=True)


def random_rows(n, most, seed):
    """Rows (min(n, most),) int64 of n by chance, ascending; all where `most` is None."""
    if most is None or most >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, n]).choice(n, most, replace=False))


def nearest(queries, keys, k=1, without=None, title="nearest"):
    """(similarity (q, k), row (q, k) int64) of the k keys with the largest dot product with each
    query, the best first, the lowest row of equals.

    queries (q, D), keys (m, D): tensors or `Features`. without: (q,) int64, the key that a query
    must not find, -1 for none. k is at most the number of keys that every query may find. The time
    is that of 2 q m D floating-point operations.
    """
    device, total = queries.device, len(keys)
    k = min(k, total - (without is not None))
    similarity = torch.empty(len(queries), k, dtype=queries.dtype, device=device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=device)
    if k == 0:  # of one key, which the queries must not find
        return similarity, found
    room = torch.empty(min(QUERIES, len(queries)) * min(KEYS, total), dtype=queries.dtype,
                       device=device)  # fresh memory for each block would cost a tenth of the time
    with progress(total=len(queries) * total, desc=title, unit="", unit_scale=True,
                  leave=False) as bar:
        for first in range(0, len(queries), QUERIES):
            block = queries[first : first + QUERIES]
            best = similarity[first : first + QUERIES].fill_(-torch.inf)
            row = found[first : first + QUERIES].zero_()
            for start in range(0, total, KEYS):
                some = keys[start : start + KEYS]
                scores = room[: len(block) * len(some)].view(len(block), len(some))
                torch.mm(block, some.T, out=scores)
                if without is not None:
                    own = without[first : first + QUERIES] - start
                    here = ((own >= 0) & (own < len(some))).nonzero()[:, 0]
                    scores[here, own[here]] = -torch.inf
                better = (scores.amax(dim=1) > best[:, -1]).nonzero()[:, 0]  # few, after a while
                values, columns = largest(scores[better], k)
                values, order = torch.cat([best[better], values], dim=1).sort(
                    dim=1, descending=True, stable=True)
                columns = torch.cat([row[better], columns + start], dim=1)
                best[better], row[better] = values[:, :k], columns.gather(1, order[:, :k])
                bar.update(scores.numel())
    return similarity, found


def largest(scores, k):
    """(value, column) (b, up to k) of the largest of scores (b, w), descending, the lowest column
    of equals."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    equal = (values[:, 1:] == values[:, :-1]).any(dim=1)
    if equal.any():  # of which topk takes any
        sort = scores[equal].sort(dim=1, descending=True, stable=True)
        values[equal], columns[equal] = (x[:, : values.shape[1]] for x in sort)
    return values[:, :k], columns[:, :k]
