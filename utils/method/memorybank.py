"""The memory bank: for each training image and caption, a clean pair that resembles it.

Its file lies in annotations/frozen_memory_bank/ and is named for what it was made with, see
`bank_name`: plain arrays, read without pickle. The authors' format is that of
utils.method.released_bank.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import clip
from utils.errors import InputError
from utils.files import atomic_write, parsing
from utils.method.pairs import fingerprint
from utils.method.recipes import RECIPES
from utils.method.released_bank import IMAGES, read_released
from utils.reading.layout import BANK_FOLDERS, find_by_ratio, ratio_name
from utils.reading.noise import SUFFIX

UNWRITABLE = ("where the memory bank belongs: copy annotations/ and link images/ to a folder that "
              "you may write to, and give it as --dataset_root")
ARRAYS = ("image_entry", "caption_entry", "clean", "loss", "posterior", "cosine")
MADE_WITH = ("clean_threshold", "min_clean", "batch_size", "context_length", "judge",
             "judge_features", "judge_rounds", "judge_neighbours", "search_among")
OF_ROUNDS = ("judge_steps", "judge_lr")


@dataclass
class MemoryBank:
    """For each training image and caption, a clean pair that resembles it.

    image_entry: (distinct images,) int64, the pair M^I of each image. caption_entry: (pairs,)
    int64, the pair M^T of each caption. The rest is known only of banks that we built, per pair:
    clean (bool, the strict clean set), loss (float32) and posterior (float32, probability of being
    clean) by the judge, cosine (float32) by the model before the judge's rounds. `info` holds the
    estimated `wrong_share` of the pairs, and `beta` for `--weighting osa`.
    """

    image_entry: np.ndarray
    caption_entry: np.ndarray
    clean: np.ndarray | None = None
    loss: np.ndarray | None = None
    posterior: np.ndarray | None = None
    cosine: np.ndarray | None = None
    info: dict = field(default_factory=dict)


def asks_for_beta(args):
    """Whether the options ask for the mean cosine of random inputs."""
    return getattr(args, "weighting", None) == "osa"


def bank_name(model, pairs, args):
    """File name of the bank that `model` (None where features alone judge) builds of `pairs`:

        {ratio}_mbank_{model}_{judge}_{kind of noise}_seed{seed}_{hash}.npz

    without the judge where it is the paper's, and without the kind where there is no noise. The
    hash is that of all that the bank depends on.
    """
    parts, recipe = [ratio_name(args.noise_ratio), "mbank"], RECIPES[args.recipe]
    depends_on = {name: getattr(args, name) for name in MADE_WITH}
    depends_on["recipe"] = recipe.random_bank_batches, recipe.cosine_bank
    if asks_for_beta(args):
        depends_on["weighting"] = args.weighting
    if model is not None:
        known = args.vision_model in clip.available_models()
        parts.append(args.vision_model if known else Path(args.vision_model).name or "model")
        depends_on |= {"model": weights_hash(model), "activation": model.config["activation"]}
    if args.judge_features:
        parts.append(f"features_{Path(args.judge_features).stem}")
    if args.judge:
        parts.append(Path(args.judge).name or "model")
    if args.judge_rounds:
        parts.append(f"rounds{args.judge_rounds}x{args.judge_steps}")
        depends_on |= {name: getattr(args, name) for name in OF_ROUNDS}
    if args.judge_neighbours:
        parts.append(f"neighbours{args.judge_neighbours}")
        if args.search_among:
            parts.append(f"among{args.search_among}")
    if args.noise_ratio:
        parts.append(args.noise_kind)
    text = json.dumps([depends_on, fingerprint(pairs)], sort_keys=True, default=str)
    parts += [f"seed{args.noise_seed}", hashlib.sha256(text.encode()).hexdigest()[:8]]
    return re.sub(r"[^\w.-]", "-", "_".join(parts)) + ".npz"


def weights_hash(model):
    """SHA-256 (hex) of up to 256 values of each of a model's tensors, whatever their precision."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        value = value.detach().flatten()
        some = value[:: -(-len(value) // 256) or 1].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def bank_path(dataset_root, name="", folder=BANK_FOLDERS[0]):
    """Path of the bank of a name; without a name, of its folder."""
    return Path(dataset_root) / "annotations" / folder / name


def save_bank(bank, pairs, path, replace=True):
    """Write `bank`, with the fingerprint of `pairs`, to `path` (.npz, no pickle). Without `replace`
    a file that another run has written meanwhile stays."""
    info = json.dumps({**bank.info, "fingerprint": fingerprint(pairs)})
    arrays = {name: getattr(bank, name) for name in ARRAYS}
    with atomic_write(path, "wb", replace) as f:
        np.savez(f, **arrays, info=np.frombuffer(info.encode(), np.uint8))


def load_bank(name, pairs, args, log=print):
    """(bank, path) of our bank of this name, else of the authors' bank of this noise ratio, else
    None. Raises InputError when it is broken, belongs to other captions or points outside the data.

    The authors' bank was built by the paper's judge on noise of the authors' own file.
    """
    path = bank_path(args.dataset_root, name)
    if path.exists() and not name.endswith(IMAGES):
        return read_bank(path, pairs), path
    own_judge = (args.judge or args.judge_features or args.judge_rounds or args.judge_neighbours)
    if own_judge or args.noise_ratio and not pairs.source.name.endswith(SUFFIX):
        return None
    for folder in BANK_FOLDERS:
        path = find_by_ratio(bank_path(args.dataset_root, folder=folder), IMAGES, args.noise_ratio)
        if path:
            log(f"memory bank at hand: {path} does not say by which model and seed it was made; "
                "get_memorybank.py makes one that does")
            return MemoryBank(*read_released(path, pairs)), path
    return None


def read_bank(path, pairs):
    """The `MemoryBank` in a file of ours. Raises InputError when it is broken, belongs to other
    captions than those of `pairs` or points outside the data."""
    n, advice = len(pairs), "delete it, or run get_memorybank.py again"
    with (parsing(path, "a memory bank of these pairs", advice),
          np.load(path, allow_pickle=False) as data):
        if any(member.file_size != member.compress_size for member in data.zip.infolist()):
            raise ValueError("compressed, as no bank is")
        info = json.loads(data["info"].tobytes())
        arrays = {name: data[name] for name in ARRAYS}
        if info["fingerprint"] != fingerprint(pairs):
            raise InputError(f"{path} was built for other captions than {pairs.source}; {advice}")
        if "beta" in info:
            info["beta"] = float(info["beta"])
        for name, values in arrays.items():
            is_entry = name.endswith("_entry")
            length = len(pairs.image_ids) if name == "image_entry" else n
            if (values.shape != (length,) or values.dtype.kind not in ("i" if is_entry else "bf")
                    or not np.isfinite(values).all()):
                raise ValueError(f"'{name}' is not {length} finite numbers")
            if is_entry and len(outside := values[(values < 0) | (values >= n)]):
                raise ValueError(f"points at pair {outside[0]} of 0 to {n - 1}")
    return MemoryBank(**arrays, info=info)


def clean_pairs(bank):
    """Indices (k,) int64 of the strict clean set. Raises InputError when the bank, being one of the
    authors', does not say."""
    if bank.clean is None:
        raise InputError("--train_on clean and --memory random need the strict clean set, which "
                         "the authors' banks do not hold; run get_memorybank.py first")
    return np.flatnonzero(bank.clean)


def arrays_on(device, bank, names):
    """Arrays of a bank, and numbers of its `info`, by name, as tensors (n,) on the device. Raises
    InputError when the bank, being one of the authors' or of --judge_features, lacks them."""
    n = len(bank.caption_entry)
    found = {name: bank.info.get(name, getattr(bank, name, None)) for name in names}
    if any(value is None for value in found.values()):
        raise InputError("this --weighting needs losses and cosines of the initial model, which "
                         "this bank does not hold (the authors' banks do not, nor, for osa, those "
                         "of --judge_features); run get_memorybank.py with the same --weighting")
    return {name: torch.as_tensor(value, device=device).expand(n) for name, value in found.items()}
