"""The memory bank: for each training image and caption, a clean pair that resembles it.

Its file lies in annotations/frozen_memory_bank/ and is named for what it was made with, see
`bank_name`: plain arrays, read without pickle. The authors' format is that of
utils.method.released_bank.
"""

import contextlib
import hashlib
import json
import re
import tempfile
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

MADE_WITH = ("recipe", "clean_threshold", "min_clean", "batch_size", "context_length", "judge",
             "judge_features", "judge_rounds", "judge_steps", "judge_neighbours", "search_among",
             "judge_lr")  # options that a bank depends on, beside its model and its seed


@dataclass
class MemoryBank:
    """For each training image and caption, a clean pair that resembles it.

    image_entry: (distinct images,) int64, the pair M^I of each image. caption_entry: (pairs,)
    int64, the pair M^T of each caption. The rest is known only of banks that we built, per pair
    and of the initial model: clean (bool, the strict clean set), loss (float32), posterior
    (float32, probability of the mixture's low component), cosine (float32). `info` says how the
    bank was made, and holds `beta`, the mean cosine of random pairs.
    """

    image_entry: np.ndarray
    caption_entry: np.ndarray
    clean: np.ndarray | None = None
    loss: np.ndarray | None = None
    posterior: np.ndarray | None = None
    cosine: np.ndarray | None = None
    info: dict = field(default_factory=dict)


def bank_name(model, pairs, args):
    """What the bank is called that `model` (None where features alone judge) builds of `pairs`:

        {ratio}_mbank_{model}_{judge}_{kind of noise}_seed{seed}_{hash}.npz

    without the judge where it is the paper's, and without the kind where there is no noise. The
    hash is that of all that the bank depends on.
    """
    made_with = {key: getattr(args, key) for key in MADE_WITH}
    recipe = RECIPES[args.recipe]
    made_with["recipe"] = recipe.random_bank_batches, recipe.cosine_bank  # all that it changes here
    name = ""
    if model is not None:
        made_with |= {"model": weights_hash(model), "activation": model.config["activation"]}
        known = args.vision_model in clip.available_models()
        name = args.vision_model if known else Path(args.vision_model).name or "model"
    text = json.dumps([made_with, fingerprint(pairs)], sort_keys=True, default=str)
    parts = [ratio_name(args.noise_ratio), "mbank", name, judge_name(args),
             args.noise_kind if args.noise_ratio else "", f"seed{args.noise_seed}",
             hashlib.sha256(text.encode()).hexdigest()[:8]]
    return re.sub(r"[^\w.-]", "-", "_".join(filter(None, parts))) + ".npz"


def judge_name(args):
    """What a bank's file name says of its judge; empty for the paper's."""
    parts = [f"features_{Path(args.judge_features).stem}" if args.judge_features
             else (Path(args.judge).name or "model") if args.judge else "",
             f"rounds{args.judge_rounds}x{args.judge_steps}" if args.judge_rounds else ""]
    if args.judge_neighbours:
        parts += [f"neighbours{args.judge_neighbours}",
                  f"among{args.search_among}" if args.search_among else ""]
    return re.sub(r"[^\w.-]", "-", "_".join(filter(None, parts)))


def weights_hash(model):
    """SHA-256 (hex) of up to 256 values of each of a model's tensors, whatever their precision."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        value = value.detach().flatten()
        some = value[:: -(-len(value) // 256) or 1].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def bank_path(dataset_root, name="", folder=BANK_FOLDERS[0]):
    """Where the bank of a name is written; without one, its folder."""
    return Path(dataset_root) / "annotations" / folder / name


def writable(*folders):
    """The first of some folders that can be written, tried before pairs are judged. Raises
    InputError when there is none."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    raise InputError(f"cannot write {folders[0]}, where the memory bank belongs; training keeps "
                     "one in its own folder; or copy annotations/ and link images/ to a folder "
                     "that you may write to")


def save_bank(bank, pairs, path, replace=True):
    """Write `bank`, with the fingerprint of `pairs`, to `path` (.npz, no pickle). Without `replace`
    one that another run has written meanwhile stays."""
    info = json.dumps({**bank.info, "fingerprint": fingerprint(pairs)})
    with atomic_write(path, "wb", replace) as f:
        np.savez(f, image_entry=bank.image_entry, caption_entry=bank.caption_entry,
                 clean=bank.clean, loss=bank.loss, posterior=bank.posterior, cosine=bank.cosine,
                 info=np.frombuffer(info.encode(), np.uint8))


def load_bank(name, pairs, args, log=print, own_folder=None):
    """(bank, path) of the bank of a name, from the data folder or that of the run, `own_folder`;
    else of another at hand that fits `pairs` and the options: one of ours that has an older name,
    {ratio}_mbank.npz or {ratio}_mbank_{judge}.npz, or any name if none is known (older checkpoints
    do not say); or the authors', which do not say what they were made with, so that the log says
    that; else None.

    Raises InputError when it is broken, belongs to other captions or points outside the data.
    """
    folders = [bank_path(args.dataset_root, folder=folder) for folder in BANK_FOLDERS]
    folders += [own_folder] if own_folder else []
    for folder in folders if name else []:
        if (folder / name).exists():
            return read_bank(folder / name, pairs), folder / name
    ratio, judge = args.noise_ratio, judge_name(args)
    older = f"_mbank_{judge}.npz" if judge else "_mbank.npz"
    paths = [find_by_ratio(folder, older, ratio) for folder in folders]
    if not name:
        paths += sorted(folders[0].glob(f"{ratio_name(ratio)}_mbank_*.npz"))
    for path in filter(None, paths):
        if fits(_read(path), pairs, args):
            return read_bank(path, pairs), path
    if judge or args.noise_ratio and not pairs.source.name.endswith(SUFFIX):
        return None  # the authors judge as in the paper, and the noise of their own file
    path = next(filter(None, (find_by_ratio(folder, IMAGES, ratio) for folder in folders)), None)
    if path is None:
        return None
    log(f"memory bank at hand: {path} does not say by which model and seed it was made; "
        "get_memorybank.py makes one that does")
    return read_bank(path, pairs), path


def fits(bank, pairs, args):
    """Whether a bank of ours was made for `pairs` and with these options, as far as it says."""
    wanted = {**vars(args), "seed": args.noise_seed, "fingerprint": fingerprint(pairs)}
    keys = (*MADE_WITH, "seed", "fingerprint",
            *(() if args.judge_features else ("vision_model",)))
    return all(bank.info[key] == wanted[key] for key in keys if key in bank.info)


def read_bank(path, pairs):
    """The `MemoryBank` in a file of ours or of the authors'. Raises InputError when it is broken,
    belongs to other captions than those of `pairs` or points outside the data."""
    if path.name.endswith(IMAGES):
        bank = MemoryBank(*read_released(path, pairs))
    else:
        bank = _read(path)
        if bank.info["fingerprint"] != fingerprint(pairs):
            raise InputError(f"{path} was built for other captions than {pairs.source}; delete it "
                             "or run get_memorybank.py again")
    n = len(pairs)
    with parsing(path, "a memory bank of these pairs", "run get_memorybank.py again"):
        for what, entry, length in (("images", bank.image_entry, len(pairs.image_ids)),
                                    ("captions", bank.caption_entry, n)):
            if entry.shape != (length,) or entry.dtype.kind != "i":
                raise ValueError(f"entries of shape {entry.shape} and type {entry.dtype} for "
                                 f"{what}, expected {length} whole numbers")
            if length and not (0 <= entry.min() and entry.max() < n):
                outside = entry[(entry < 0) | (entry >= n)][0]
                raise ValueError(f"points at pair {outside} of 0 to {n - 1}")
        for name, low, high in (("clean", 0, 1), ("loss", 0, np.inf), ("posterior", 0, 1),
                                ("cosine", -1.001, 1.001)):
            value = getattr(bank, name)
            if value is not None and (value.shape != (n,) or value.dtype.kind not in "bf"
                                      or not np.isfinite(value).all()
                                      or not (low <= value.min() and value.max() <= high)):
                raise ValueError(f"'{name}' is not a number in its range for each pair")
    return bank


def _read(path):
    with parsing(path, "a memory bank of ours", "delete it or run get_memorybank.py again"):
        with np.load(path, allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        info = json.loads(arrays.pop("info").tobytes())
        bank = MemoryBank(**arrays, info=info)
        info["fingerprint"]
        if "beta" in info:
            info["beta"] = float(info["beta"])
    return bank


def clean_pairs(bank):
    """Indices (k,) int64 of the strict clean set. Raises InputError when the bank, being one of the
    authors', does not say."""
    if bank.clean is None:
        raise InputError("--train_on clean and --memory random need the strict clean set, which "
                         "the authors' banks do not hold; run get_memorybank.py first")
    return np.flatnonzero(bank.clean)


def arrays_on(device, bank, names):
    """Arrays of a bank, and numbers of its `info`, by name, as tensors (n,) on the device. Raises
    InputError when the bank, being one of the authors', lacks them."""
    n = len(bank.caption_entry)
    found = {name: bank.info.get(name) if name in bank.info else getattr(bank, name, None)
             for name in names}
    if any(value is None for value in found.values()):
        raise InputError("this --weighting needs losses and cosines of the initial model, which "
                         "this bank does not hold (those of the authors do not, cosines neither "
                         "with --judge_features); run get_memorybank.py first")
    return {name: torch.as_tensor(value, device=device).expand(n) for name, value in found.items()}
