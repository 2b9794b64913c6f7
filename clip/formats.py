"""Files and folders that hold a CLIP model, on disk or on the Hugging Face hub. Nothing in them is
executed.

- Files of torch.save: a state dict, or a training checkpoint with a state dict among its entries.
  Wrappers may have put a prefix before all names; `config` may describe the model.
- TorchScript archives, as OpenAI publishes: a zip with the pickle data.pkl, which describes a tree
  of modules, a file for each tensor's numbers, and code, which is not read.
- safetensors: parameters by name.
- Folders of transformers: config.json and model.safetensors or pytorch_model.bin, with or without a
  preprocessor_config.json or (transformers 5) a processor_config.json, and a tokenizer.
- Folders of open_clip: open_clip_config.json and open_clip_model.safetensors or
  open_clip_pytorch_model.bin.

A folder's settings that change the features are read or refused, never ignored. A state dict here
maps OpenAI's parameter names to tensors, as CLIP.state_dict() does. transformers' names are
translated.
"""

import contextlib
import fnmatch
import io
import json
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from .model import POOLING
from .preprocess import MEAN, STD
from .tokenizer import default_tokenizer

WAYS = (  # description and weights of a model, which may be in parts: safetensors before pickles
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("config.json", "model.safetensors"),
    ("config.json", "model-*.safetensors"),
    ("open_clip_config.json", "open_clip_pytorch_model.bin"),
    ("config.json", "pytorch_model.bin"),
    ("config.json", "pytorch_model-*.bin"),
)
OTHER_MODELS = {  # beginning of a parameter's name: the model that has it
    "logit_bias": "SigLIP",
    "text_decoder.": "CoCa",
    "visual.trunk.": "a model with an image tower of timm",
    "text.": "a model with a text tower of its own kind",
}
OUTSIDE = "--judge_features takes the features of any model"


class CheckpointError(RuntimeError):
    """A model cannot be loaded; the message is one line that names the file."""

    for_people = True


def read_checkpoint(path):
    """Content of a file, as from `read_file`, or of a folder, {"state_dict", "config"}, on the CPU.
    Raises CheckpointError for a path that does not exist, is damaged, has another format, would run
    code, or holds a model that cannot be built here."""
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    described, weights = _choose([file.name for file in path.iterdir()], path)
    try:
        read = _hf_config if described == "config.json" else _open_clip_config
        config, content = read(path, _read_json(path / described)), {}
        for name in weights:
            content |= read_file(path / name)
        return {"state_dict": state_dict_of(content, path / weights[0]), "config": config}
    except CheckpointError:
        raise
    except Exception as error:  # a value of an unexpected type
        raise CheckpointError(f"{path / described} or a file that goes with it is damaged "
                              f"({error!r:.100})") from None


def _choose(files, where):
    """Names of a model's description and of its weights (list), by the first of `WAYS` that the
    files of a folder allow."""
    for described, pattern in WAYS:
        if described in files and (weights := fnmatch.filter(files, pattern)):
            return described, weights
    raise CheckpointError(
        f"{where} holds no model: needed are open_clip_config.json and open_clip_model.safetensors "
        "or open_clip_pytorch_model.bin, or config.json and model.safetensors or pytorch_model.bin"
    )


def _read_json(path):
    require_file(path)
    return json.loads(path.read_text(encoding="utf-8"))


def _require(folder, said, accepted):
    """Raise CheckpointError if a setting in `said` (dict) is none of those in `accepted`, {name:
    values}. A missing one has the first value."""
    for key, values in accepted.items():
        if said.get(key, values[0]) not in values:
            raise CheckpointError(f"{folder} has {key} {said[key]}, but supported is "
                                  f"{' or '.join(map(str, values))}; {OUTSIDE}")


def _three(value):
    """Numbers for red, green and blue, given as one number or three."""
    return (value,) * 3 if isinstance(value, int | float) else tuple(value)


# ------------------------------------------------------------------------------ files


def read_file(path):
    """Content (dict) of a file (Path) of any format named above, on the CPU: the entries of a
    training checkpoint, or the parameters by name. Raises CheckpointError for a file that does not
    exist, is damaged, has another format, or would run code."""
    require_file(path)
    with open(path, "rb") as file:
        start = file.read(40)
    file, allowed = path, NUMPY_SCALARS
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(x.file_size for x in archive.infolist()) > path.stat().st_size + 2**26:
                    raise ValueError("it unpacks to far more than its size")
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    file, allowed = _without_code(archive)
        elif not start.startswith(b"\x80"):  # a pickle does
            raise ValueError(f"it begins with {start!r}" if start else "it is empty")
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other pickle protocols, then raises
            content = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(content, _Module):
            content = dict(_tensors(content))
    except Exception as error:  # damaged and hostile files provoke errors of any type
        said = " ".join(str(error).split())
        if refused := re.search(r"GLOBAL `?([\w.]+)", said):
            raise CheckpointError(
                f"{path} was refused: it would run code on loading ({refused[1]})"
            ) from None
        reason = said.split("WeightsUnpickler error: ")[-1].split(" Check the documentation")[0]
        reason = reason[:100] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def require_file(path):
    """Raise CheckpointError unless `path` is a regular file: opening a pipe would block."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {what}")


def state_dict_of(content, path):
    """The state dict in `content`, which `read_file` returned for `path`, in the file's dtypes.
    Raises CheckpointError if there is none, or one of another kind of model."""
    state_dict = _model_in(content, path)
    for key in list(state_dict):  # archives hold these beside the weights
        if key in ("input_resolution", "context_length", "vocab_size") or "attn_mask" in key:
            del state_dict[key]
    for start, what in OTHER_MODELS.items():
        if any(key.startswith(start) for key in state_dict):
            raise CheckpointError(f"{path} holds {what}, not CLIP as OpenAI built it; {OUTSIDE}")
    for key, value in state_dict.items():
        number = value.is_floating_point() or "num_batches" in key or "position_ids" in key
        dense = value.layout == torch.strided and value.device.type == "cpu"
        if not (number and dense and 0 < value.nbytes <= value.untyped_storage().nbytes()):
            raise CheckpointError(f"{path}: '{key}' is not an ordinary tensor of real numbers")
    if any(key.startswith("text_model.") for key in state_dict):
        try:
            state_dict = from_hf(state_dict)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not CLIP as transformers saves it: {error}") from None
    return state_dict


def _model_in(content, path):
    """{name: tensor} of the model in a checkpoint, without other tensors and without the prefixes
    of wrappers (DistributedDataParallel, torch.compile, trainers, weight averaging)."""
    entries = [content.get("state_dict"), content, *content.values()]
    entries = [entry for entry in entries if isinstance(entry, dict)]
    for entry in entries:
        tensors = {str(key).replace("_orig_mod.", ""): value for key, value in entry.items()
                   if isinstance(value, torch.Tensor)}
        before = {key.removesuffix("logit_scale") for key in tensors if key.endswith("logit_scale")}
        if len(before) > 1:
            raise CheckpointError(f"{path} holds several models, below {', '.join(sorted(before))}")
        if before:
            start = before.pop()
            return {key.removeprefix(start): value for key, value in tensors.items()
                    if key.startswith(start)}
    names = ", ".join(map(str, list(entries[0])[:5])) or "nothing"
    raise CheckpointError(f"{path} holds no CLIP model (no logit_scale), but {names}")


def _numpy_scalar(dtype, data):
    """Replaces numpy's function for pickled scalars, which would also take pointers."""
    return np.frombuffer(data, dtype)[0]


NUMPY_SCALARS = [  # the authors' checkpoints hold one in the optimiser's state
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # numpy 1's name
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # numpy 2's name
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]


class _Module:
    """Replaces the classes that a TorchScript archive defines."""


def _without_code(archive):
    """A TorchScript archive (ZipFile) as a file of torch.save: a copy in memory without its code
    and constants, and what its pickle may name: its own classes, and lists of numbers."""
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as new:
        for name in archive.namelist():
            if "/code/" not in name and not name.endswith("/constants.pkl"):
                new.writestr(name, archive.read(name))
    copy.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
    copy.seek(0)
    lists = [(list, f"torch.jit._pickle.build_{kind}list") for kind in ("int", "double", "bool")]
    return copy, lists + [(_Module, name) for name in names if name.startswith("__torch__.")]


def _tensors(module, prefix=""):
    """(name, tensor) of each tensor in a `_Module`."""
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + name, value


# ------------------------------------------------------------------------------ transformers

PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # of transformers 5, and older
TOKENIZER = ("tokenizer.json", "vocab.json")


def _hf_config(folder, config):
    """What a folder of transformers, whose config.json is `config`, says of a model's `config`."""
    text, vision = ({"hidden_act": "quick_gelu"} | (
        config.get(f"{tower}_config_dict") or config.get(f"{tower}_config", {}))
        for tower in ("text", "vision"))  # in transformers' order
    _require(folder, {"model_type": None} | config, {"model_type": ["clip"]})
    _require(folder, vision, {"layer_norm_eps": [1e-5]})
    _require(folder, text, {
        "hidden_act": [vision["hidden_act"]],
        "layer_norm_eps": [1e-5],
        "vocab_size": [49408],  # another vocabulary has another tokenizer
        "eos_token_id": [49407, 2],  # 2, in older files, means the largest id
    })
    for file in (folder / name for name in TOKENIZER if (folder / name).exists()):
        said = _read_json(file)
        vocabulary = said if file.name == "vocab.json" else said["model"]["vocab"]
        if not default_tokenizer().encoder.items() <= vocabulary.items():
            raise CheckpointError(f"{file} has other tokens than CLIP's; {OUTSIDE}")
    resolution = vision.get("image_size", 224)
    return {
        "activation": vision["hidden_act"],
        "vision_heads": vision.get("num_attention_heads", 12),
        "transformer_heads": text.get("num_attention_heads", 8),
        "image_resolution": resolution,
        **_hf_preprocessing(folder, resolution),
    }


def _hf_preprocessing(folder, resolution):
    """What a folder's image processor says of a model's `config`, {} if it has none."""
    new, old = (_read_json(folder / name) if (folder / name).exists() else {} for name in PROCESSOR)
    said = new.get("image_processor") or old
    if not said:
        return {}
    said = {"size": {"shortest_edge": 224}, "crop_size": 224, "image_mean": MEAN, "image_std": STD,
            } | {key: value for key, value in said.items() if value is not None}
    square = {"height": resolution, "width": resolution}
    squash, crops = said["size"] == square, said.get("do_center_crop", True)
    _require(folder, said, {
        "image_processor_type": ["CLIPImageProcessor", "CLIPImageProcessorFast",
                                 "CLIPImageProcessorPil"],
        "feature_extractor_type": ["CLIPFeatureExtractor"],
        "do_resize": [True],
        "size": [{"shortest_edge": resolution}, resolution, square],
        "resample": [3],  # bicubic
        "do_center_crop": [True, False] if squash else [True],
        "crop_size": [square, resolution] if crops else [said["crop_size"]],
        "do_pad": [False],
        "do_rescale": [True],
        "rescale_factor": [1 / 255],
        "do_normalize": [True],
    })
    return {
        "image_mean": _three(said["image_mean"]),
        "image_std": _three(said["image_std"]),
        "image_resize": "squash" if squash else "shortest",
    }


def save_hf(model, folder):
    """Write `model` to `folder` for CLIPModel and CLIPProcessor.from_pretrained of transformers.
    Raises CheckpointError for a ResNet."""
    weights, config = to_hf(model.state_dict()), model.config
    resolution, squash = config["image_resolution"], config["image_resize"] == "squash"
    square = {"height": resolution, "width": resolution}
    tokenizer = default_tokenizer()

    def tower(name):
        return {
            "hidden_size": config[f"{name}_width"],
            "intermediate_size": config[f"{name}_mlp_width"],
            "num_attention_heads": config[f"{name}_heads"],
            "num_hidden_layers": config[f"{name}_layers"],
            "hidden_act": config["activation"],
        }

    files = {
        "config.json": {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config["embed_dim"],
            "text_config": tower("transformer") | {
                "vocab_size": config["vocab_size"],
                "max_position_embeddings": config["context_length"],
            },
            "vision_config": tower("vision") | {
                "image_size": resolution,
                "patch_size": config["vision_patch_size"],
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": square if squash else {"shortest_edge": resolution},
            "do_center_crop": not squash,  # all else is CLIPImageProcessor's default
            "crop_size": square,
            "image_mean": config["image_mean"],
            "image_std": config["image_std"],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config["context_length"],
        },
        "vocab.json": tokenizer.encoder,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    merges = ["#version: 0.2", *map(" ".join, tokenizer.ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    # safetensors' save_file would give the file to its owner alone
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


HF_NAMES = {  # part of OpenAI's names: the same part of transformers' names
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}
TRANSPOSED = ("text_projection", "visual.proj")


def to_hf(state_dict):
    """A state dict with OpenAI's names -> one with the names of transformers.CLIPModel. Raises
    CheckpointError for a ResNet."""
    if "visual.proj" not in state_dict:
        raise CheckpointError("transformers has CLIP with a Vision Transformer only; open_clip "
                              "loads the checkpoint of a ResNet as it is")
    out = {}
    for name, value in state_dict.items():
        value = value.T if name in TRANSPOSED else value
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        if "in_proj_" in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{letter}_proj.")] = third.clone()
        else:
            out[name] = value.contiguous()
    return out


def from_hf(state_dict):
    """The inverse of to_hf, without the position ids of older versions of transformers. Unknown
    names are kept. Raises KeyError if a name is missing."""
    out = {}
    for key, value in state_dict.items():
        name = key
        for ours, theirs in HF_NAMES.items():
            name = name.replace(theirs, ours)
        if ".q_proj." in name:
            three = [state_dict[key.replace(".q_", f".{letter}_")] for letter in "qkv"]
            out[name.replace("q_proj.", "in_proj_")] = torch.cat(three)
        elif not name.endswith("position_ids") and not {"k_proj", "v_proj"} & {*name.split(".")}:
            out[name] = value.T if name in TRANSPOSED else value
    return out


# ------------------------------------------------------------------------------ open_clip

OPEN_CLIP_KEYS = {  # read here, known from the weights, or without effect
    "layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size",
    "patch_dropout", "context_length", "vocab_size", "pad_id", "eos_id"}
OPEN_CLIP_USUAL = (None, False, {}, "tok", "argmax", "learnable", "linear", "default")  # of others


def _open_clip_config(folder, config):
    """What a folder of open_clip, whose open_clip_config.json is `config`, says of a model's
    `config`."""
    model, images = config["model_cfg"], config.get("preprocess_cfg") or {}
    vision, text = model["vision_cfg"], model["text_cfg"]
    images = {key: value for key, value in images.items() if value is not None}
    for part in (vision, text):
        _require(folder, part, dict.fromkeys({*part} - OPEN_CLIP_KEYS, OPEN_CLIP_USUAL))
    _require(folder, images, {"interpolation": ["bicubic", "random"], "mode": ["RGB"]})
    width = vision.get("width", 768) * (POOLING if isinstance(vision.get("layers"), list) else 1)
    said = {
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_heads": width // vision.get("head_width", 64),
        "transformer_heads": text.get("heads", 8),
        "image_resolution": vision.get("image_size", 224),
    }
    if images:
        said["image_mean"] = _three(images.get("mean", MEAN))
        said["image_std"] = _three(images.get("std", STD))
        said["image_resize"] = images.get("resize_mode", "shortest")
    return said


# ------------------------------------------------------------------------------ the hub


def download(name):
    """Folder of the hub's model `name` (ORG/NAME) in huggingface_hub's cache. Downloads the files
    that `read_checkpoint` reads and the cache lacks. Raises CheckpointError."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise CheckpointError(f"{name} is no file here, and models of the Hugging Face hub need a "
                              "package: pip install huggingface_hub") from None
    try:
        files = [file.rfilename for file in hub.model_info(name, timeout=10).siblings]
        described, weights = _choose(files, name)
        for file in {described, *weights, *PROCESSOR, *TOKENIZER}.intersection(files):
            path = Path(hub.hf_hub_download(name, file))
        return path.parent
    except CheckpointError:
        raise
    except Exception as error:  # an unknown name, no network, the hub is down, the disk is full
        with contextlib.suppress(Exception):
            return Path(hub.snapshot_download(name, local_files_only=True))
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(
            f"{name}: no such file or folder, and it cannot be downloaded from "
            f"{hub.constants.ENDPOINT} (private or gated: hf auth login): {reason}") from None
