"""CLIP models by name or from a file or folder: architectures, downloads, loading."""

import difflib
import hashlib
import os
import re
from pathlib import Path

import torch

from .folders import download, read_checkpoint
from .formats import CheckpointError, state_dict_of
from .model import CLIP, SETTINGS, complete_config, infer_config
from .preprocess import Preprocess

URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
PRETRAINED = Path(__file__).resolve().parents[1] / "pre-trained_models"
HOME = Path(os.path.expanduser("~"))  # stays "~" where a user has none
CACHE = HOME / ".cache" / "clip" if HOME.is_absolute() else PRETRAINED
ON_THE_HUB = re.compile(r"(hf-hub:)?([\w.-]+)/[\w.-]+")
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # suffixes that no model of the hub has


def _config(embed, resolution, vision_layers, vision_width, patch, width, layers=12, context=77):
    return complete_config(embed, resolution, vision_layers, vision_width, patch, context, 49408,
                           width, layers)


CONFIGS = {
    "RN50": _config(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _config(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _config(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _config(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _config(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": _config(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _config(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _config(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _config(768, 336, 24, 1024, 14, 768),
    "tiny": _config(64, 32, 2, 128, 8, 64, layers=2),  # ours, for tests; random weights
}


def available_models():
    """Names of OpenAI's nine models."""
    return list(SHA256)


def describe(config):
    """A config in words: the model's name, or its size and the settings in which it differs from
    OpenAI's models of that size."""
    for name, known in CONFIGS.items():
        if config == known:
            return name
    size = dict(list(config.items())[:9])  # settings without a default
    usual = complete_config(**size)
    numbers = (f"{key} {value}" for key, value in config.items()
               if key in size or value != usual[key])
    return f"a CLIP model with {', '.join(numbers)}"


def architecture(name_or_path, activation=None):
    """The `config` of the model that `load` would return. Raises CheckpointError."""
    if name_or_path in CONFIGS:
        return CONFIGS[name_or_path]
    return _understand(_read(name_or_path), name_or_path, activation)[1]


def load(name_or_path, device=None, activation=None, log=print):
    """A model and the preprocessing that belongs to it: (CLIP, Preprocess).

    `name_or_path` is one of

    - available_models(): from pre-trained_models/ or ~/.cache/clip, or downloaded to the latter;
    - "tiny": a small architecture for tests with random weights from torch's global generator;
    - a file or folder that read_checkpoint reads;
    - a model on the Hugging Face hub: "hf-hub:ORG/NAME", or "ORG/NAME" if that is no path.

    The model is in float32, in evaluation mode, on `device` (default: "cuda" if available, else
    "cpu"). activation, log: as for `build`. Raises CheckpointError.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name_or_path == "tiny":
        model = CLIP(**CONFIGS["tiny"] | ({"activation": activation} if activation else {}))
        return model.eval().to(device), Preprocess.of(model.config)
    if name_or_path not in SHA256:
        return build(_read(name_or_path), name_or_path, device, activation, log)
    path = _find(name_or_path)
    known = {key: CONFIGS[name_or_path][key] for key in ("activation", "image_mean", "image_std")}
    checkpoint = {"state_dict": read_checkpoint(path), "config": known}
    return build(checkpoint, path, device, activation, log)


def build(checkpoint, source, device="cpu", activation=None, log=print):
    """(CLIP, Preprocess), as from `load`, of what `read_checkpoint` returned; `source` names it in
    messages.

    activation: "quick_gelu" or "gelu", for a checkpoint that does not say it. `log` receives a line
    about the values that had to be assumed. Raises CheckpointError.
    """
    state_dict, config = _understand(checkpoint, source, activation, log)
    try:
        with torch.device("meta"):  # skips the initialisation and its random numbers
            model = CLIP(**config)
        model.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} does not fit {describe(config)}: {reason}") from None
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return model.eval().to(device), Preprocess.of(config)


def _understand(checkpoint, source, activation=None, log=None):
    """(state dict, config) of a checkpoint."""
    state_dict, said = state_dict_of(checkpoint, source), checkpoint.get("config")
    settings = {k: said[k] for k in SETTINGS if k in said} if isinstance(said, dict) else {}
    assumed = []
    if activation is None and "activation" not in settings:
        assumed.append("activation (quick_gelu is assumed, as in OpenAI's models; LAION's and "
                       "DataComp's have gelu: --activation gelu)")
    if "image_mean" not in settings:
        assumed.append("preprocessing (OpenAI's is assumed)")
    if assumed and log:
        log(f"{source} does not say its {' and its '.join(assumed)}")
    found = settings.setdefault("activation", activation or "quick_gelu")
    if activation not in (None, found):
        raise CheckpointError(f"{source} says that its activation is {found}, not {activation}")
    try:
        return state_dict, infer_config(state_dict, settings)
    except ValueError as error:
        names = ", ".join(list(state_dict)[:5])
        raise CheckpointError(f"{source}: {error}; the first names in it are {names}") from None


def _read(name_or_path):
    """`read_checkpoint` of a file, a folder or a model on the hub."""
    path, on_hub = Path(name_or_path), ON_THE_HUB.fullmatch(str(name_or_path))
    if on_hub and (on_hub[1] or not (path.exists() or path.suffix in FILES
                                     or Path(on_hub[2]).is_dir() or on_hub[2].startswith("ViT-"))):
        return read_checkpoint(download(str(name_or_path).removeprefix("hf-hub:")))
    if not path.suffix and not path.exists():
        near = difflib.get_close_matches(str(path), CONFIGS, 1)  # as for open_clip's ViT-B-32
        raise CheckpointError(
            f"{path}: no such file, nor a model of that name"
            f"{f' (did you mean {near[0]}?)' if near else ''}: there are {', '.join(CONFIGS)}, and "
            "hf-hub:ORG/NAME"
        )
    return read_checkpoint(path)


def _find(name):
    """Path of the weights of one of OpenAI's models, which are downloaded if need be."""
    file = re.sub("[/@]", "-", name) + ".pt"
    for folder in (PRETRAINED, CACHE):
        if (folder / file).is_file():
            if _sha256(folder / file) == SHA256[name]:
                return folder / file
            print(f"{folder / file} is not OpenAI's file (its SHA-256 differs): not used")
    target, url = CACHE / file, URL.format(sha256=SHA256[name], file=file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=SHA256[name])
    except (OSError, RuntimeError) as error:  # RuntimeError: its SHA-256 differs
        raise CheckpointError(
            f"cannot download {url} ({error}): put that file at {target} or {PRETRAINED}/"
        ) from None
    return target


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
