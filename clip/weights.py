"""CLIP models by name or from a file or folder: architectures, downloads, loading."""

import difflib
import hashlib
import os
import re
from pathlib import Path

import torch

from .formats import CheckpointError, download, read_checkpoint, state_dict_of
from .model import CLIP, complete_config, infer_config
from .preprocess import Preprocess, normalize

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
ON_THE_HUB = re.compile(r"(?:hf-hub:)?((?!ViT-)[\w.-]+/[\w.-]+)")
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # suffixes that no model of the hub has

CONFIGS = {
    "RN50": complete_config(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": complete_config(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": complete_config(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": complete_config(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": complete_config(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": complete_config(512, 224, 12, 768, 32, 512),
    "ViT-B/16": complete_config(512, 224, 12, 768, 16, 512),
    "ViT-L/14": complete_config(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": complete_config(768, 336, 24, 1024, 14, 768),
    "tiny": complete_config(64, 32, 2, 128, 8, 64, 2),  # ours, for tests; random weights
}


def available_models():
    """Names of OpenAI's nine models."""
    return list(SHA256)


def describe(config):
    """A config in words: the known model that is most like it, and the settings that differ."""
    other = {name: [f"{key} {value}" for key, value in config.items() if value != known[key]]
             for name, known in CONFIGS.items()}
    name = min(other, key=lambda name: len(other[name]))
    return f"{name} with {', '.join(other[name])}" if other[name] else name


def architecture(name_or_path, activation=None):
    """The `config` of the model that `load` would return. Raises CheckpointError."""
    if name_or_path in CONFIGS:
        return CONFIGS[name_or_path]
    return load(name_or_path, "cpu", activation, log=lambda _: None)[0].config


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
    return build(_read(name_or_path), name_or_path, device, activation, log)


def build(checkpoint, source, device="cpu", activation=None, log=print):
    """(CLIP, Preprocess), as from `load`, of what `read_checkpoint` returned; `source` names it in
    messages.

    activation: "quick_gelu" or "gelu", for a checkpoint that does not say it. `log` receives a line
    about the values that had to be assumed. Raises CheckpointError.
    """
    state_dict, said = state_dict_of(checkpoint, source), checkpoint.get("config")
    settings = {k: said[k] for k in CONFIGS["tiny"] if k in said} if isinstance(said, dict) else {}
    assumed = []
    if activation is None and "activation" not in settings:
        assumed.append("activation (quick_gelu is assumed, as in OpenAI's models; LAION's and "
                       "DataComp's have gelu: --activation gelu)")
    if "image_mean" not in settings:
        assumed.append("preprocessing (OpenAI's is assumed)")
    if assumed:
        log(f"{source} does not say its {' and its '.join(assumed)}")
    found = settings.setdefault("activation", activation or "quick_gelu")
    if activation not in (None, found):
        raise CheckpointError(f"{source} says that its activation is {found}, not {activation}")
    try:
        config = infer_config(state_dict, settings)
    except (IndexError, KeyError, ValueError) as error:
        names = ", ".join(list(state_dict)[:5])
        raise CheckpointError(f"{source}: not the weights of a CLIP model ({error!r}); the first "
                              f"names in it are {names}") from None
    try:
        with torch.device("meta"):  # shapes alone: no initialisation, no random numbers
            model, preprocess = CLIP(**config).eval(), Preprocess.of(config)
            images = torch.zeros(1, 3, *[preprocess.resolution] * 2, dtype=torch.uint8)
            model(normalize(images, mean=preprocess.mean, std=preprocess.std),
                  torch.zeros(1, model.context_length, dtype=torch.int64))
        model.load_state_dict(state_dict, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} does not fit {describe(config)}: {reason}") from None
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return model.to(device), preprocess


def _read(name_or_path):
    """`read_checkpoint` of one of OpenAI's models, a file, a folder or a model on the hub."""
    if name_or_path in SHA256:
        return {"state_dict": read_checkpoint(_find(name_or_path)), "config": CONFIGS[name_or_path]}
    path, on_hub = Path(name_or_path), ON_THE_HUB.fullmatch(str(name_or_path))
    if path.exists() or path.suffix in FILES:
        return read_checkpoint(path)
    if on_hub and not path.parent.is_dir():
        return read_checkpoint(download(on_hub[1]))
    near = difflib.get_close_matches(str(path), CONFIGS, 1)  # as for open_clip's ViT-B-32
    raise CheckpointError(f"{path}: no such file, nor a model of that name"
                          f"{f' (did you mean {near[0]}?)' if near else ''}: there are "
                          f"{', '.join(CONFIGS)}, and hf-hub:ORG/NAME")


def _find(name):
    """Path of the weights of one of OpenAI's models, which are downloaded if need be."""
    file = re.sub("[/@]", "-", name) + ".pt"
    for path in (PRETRAINED / file, CACHE / file):
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]:
                return path
            print(f"{path} is not OpenAI's file (its SHA-256 differs): not used")
    target, url = CACHE / file, URL.format(sha256=SHA256[name], file=file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=SHA256[name])
    except (OSError, RuntimeError) as error:  # RuntimeError: its SHA-256 differs
        raise CheckpointError(
            f"cannot download {url} ({error}): put that file at {target} or {PRETRAINED}/"
        ) from None
    return target
