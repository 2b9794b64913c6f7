"""Files that hold a CLIP model, whoever wrote them.  Nothing in them is executed.

- Files of torch.save: a state dict, or a training checkpoint that has one as an entry, perhaps with
  the prefix of a wrapper before all names, and perhaps the `config` of the model.
- TorchScript archives, as OpenAI publishes: a zip with a pickle, data.pkl, that describes a tree of
  modules, the numbers of their tensors in files of their own, and code, which is left alone.
- Hugging Face's CLIP with a Vision Transformer: model.safetensors or pytorch_model.bin with their
  own parameter names, in a folder with config.json and perhaps preprocessor_config.json, or alone.
- open_clip's CLIP: open_clip_model.safetensors or open_clip_pytorch_model.bin with OpenAI's names,
  in a folder with open_clip_config.json, or alone.

A state dict here maps OpenAI's parameter names to tensors, as CLIP.state_dict() does.
"""

import json
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch.serialization import StorageType

from .model import POOLING, SETTINGS
from .preprocess import MEAN, STD
from .tokenizer import END, START, default_tokenizer

MAX_CODE = 2**26  # bytes that an archive may unpack to beyond its own size
OTHER_MODELS = {  # beginning of a parameter's name: whose it is
    "logit_bias": "SigLIP",
    "text_decoder.": "CoCa",
    "visual.trunk.": "a model with an image tower of timm",
    "text.": "a model with a text tower of its own kind",
}


class CheckpointError(RuntimeError):
    """Weights that cannot be had; the message is one line that names the file."""

    for_people = True


def read_checkpoint(path):
    """The content (dict) of any file or folder named above, on the CPU: all entries of a training
    checkpoint, "state_dict" and "config" of a folder, the parameters by name otherwise.  Raises
    CheckpointError if there is nothing at `path`, or what is there is damaged, none of these, or
    would run code."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    _require_file(path)
    with open(path, "rb") as file:
        start = file.read(40)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                refuse_inflation(archive, path)
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(archive)
        elif not start.startswith(b"\x80"):  # as a pickle does
            raise ValueError(f"it begins with {start!r}" if start else "it is empty")
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols, before the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes
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


def state_dict_of(content, path):
    """The state dict in what `read_checkpoint` gave for `path`, in the dtypes of the file.  Raises
    CheckpointError if there is none."""
    state_dict = _model_in(content, path)
    for key in list(state_dict):  # what archives hold beside the weights
        if key in ("input_resolution", "context_length", "vocab_size") or "attn_mask" in key:
            del state_dict[key]
    for start, what in OTHER_MODELS.items():
        if any(key.startswith(start) for key in state_dict):
            _refuse_other_model(path, what)
    for key, value in state_dict.items():
        real = value.is_floating_point() or "num_batches" in key or "position_ids" in key
        if not real or not _holds_its_numbers(value):
            raise CheckpointError(f"{path}: '{key}' is not an ordinary tensor of real numbers")
    if any(key.startswith("text_model.") for key in state_dict):
        try:
            state_dict = from_hf(state_dict)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not CLIP as transformers saves it: {error}") from None
    return state_dict


def _model_in(content, path):
    """{name: tensor} of the model in the content of a checkpoint, without what wrappers put before
    the names (DistributedDataParallel, torch.compile, trainers, weight averaging); what stands
    beside the weights is left out."""
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
    entry = entries[0]
    if not any(isinstance(value, torch.Tensor) for value in entry.values()):
        names = ", ".join(list(map(str, content))[:5]) or "nothing"
        raise CheckpointError(f"{path} holds no state dict, but {names}")
    return {str(key).removeprefix("module."): value for key, value in entry.items()
            if isinstance(value, torch.Tensor)}


def settings_of(content):
    """What a checkpoint's `config` (dict) says of the model beyond the shapes of its weights."""
    config = content.get("config")
    return {k: config[k] for k in SETTINGS if k in config} if isinstance(config, dict) else {}


def _refuse_other_model(path, what):
    raise CheckpointError(f"{path} holds {what}, not CLIP in OpenAI's architecture, and cannot be "
                          "trained here; --judge_features takes its features of the pairs")


def _require_file(path):
    """Raise CheckpointError unless `path` is a file proper: a pipe would be waited for."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {what}")


def _holds_its_numbers(tensor):
    """Whether a tensor has numbers and all of them were in the file: a sparse one, a view, or one
    on no device can claim terabytes."""
    return (tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
            and 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


# ------------------------------------------------------------------------------ torch.save


def _numpy_scalar(module):
    """What a pickled numpy scalar calls as `module`.scalar; unlike numpy's own it takes no dtype
    with pointers."""

    def scalar(dtype, data):
        return np.frombuffer(data, dtype)[0]

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


NUMPY_SCALARS = [  # the authors' checkpoints hold one in the optimiser's state
    _numpy_scalar("numpy.core.multiarray"),  # as numpy 1 names it
    _numpy_scalar("numpy._core.multiarray"),  # as numpy 2 does
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]


def refuse_inflation(archive, path):
    """Raise CheckpointError for an archive that unpacks to far more than it holds. In torch's, the
    code of a TorchScript model alone is compressed."""
    size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size + MAX_CODE:
        raise CheckpointError(f"{path} was refused: it unpacks to {size / 1e9:.1f} GB")


# ------------------------------------------------------------------------------ TorchScript


def _read_torchscript(archive):
    """{name: tensor} of a TorchScript archive (ZipFile)."""
    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    with archive.open(pickled) as file:
        root = _TorchScriptUnpickler(file, archive, pickled.removesuffix(".pkl")).load()
    tensors = {}

    def collect(module, prefix):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Module):
                collect(value, f"{prefix}{name}.")

    collect(root, "")
    return tensors


class _Module:
    """Stands for an instance of any class that a TorchScript archive defines."""


def _rebuild_tensor(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)  # checks the bounds


class RestrictedUnpickler(pickle.Unpickler):
    """Takes what NAMES ("module.name": what stands for it) has for each function or class that a
    pickle names, and refuses all others: a file calls nothing of its choice."""

    NAMES = {}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"refused to run GLOBAL {module}.{name}")
        return self.NAMES[f"{module}.{name}"]


class _TorchScriptUnpickler(RestrictedUnpickler):
    """Knows the names that TorchScript writes."""

    NAMES = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch.jit._pickle.build_intlist": list,
        "torch.jit._pickle.build_doublelist": list,
        "torch.jit._pickle.build_boollist": list,
        "torch.jit._pickle.build_tensorlist": list,
    }

    def __init__(self, file, archive, folder):
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages = {}

    def find_class(self, module, name):
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name.endswith("Storage"):
            return StorageType(name)
        return super().find_class(module, name)

    def persistent_load(self, pid):
        _, storage, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=storage.dtype)
        return self.storages[key]


# ------------------------------------------------------------------------------ Hugging Face

HF_NAMES = {  # parts of OpenAI's names: of Hugging Face's
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
    """A state dict with OpenAI's names -> with those of transformers.CLIPModel.  Raises ValueError
    if the image encoder is a ResNet, which transformers does not have."""
    if "visual.proj" not in state_dict:
        raise ValueError("transformers has CLIP with a Vision Transformer only")
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
    """The inverse of to_hf.  Position ids, which older versions of transformers saved, are dropped;
    names that transformers.CLIPModel does not have are kept.  Raises KeyError if one is missing."""
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


def _hf_settings(folder):
    """What config.json and preprocessor_config.json, if it is there, say of `SETTINGS`."""
    config, beside = _read_json(folder / "config.json"), folder / "preprocessor_config.json"
    preprocessing = _read_json(beside) if beside.exists() else {}
    if config["model_type"] != "clip":
        _refuse_other_model(folder, f"a model of type {config['model_type']}")
    text, vision = config["text_config"], config["vision_config"]
    activation = vision.get("hidden_act", "quick_gelu")
    size = preprocessing.get("size")
    for part, key, usual in (
        (text, "hidden_act", activation),
        (text, "layer_norm_eps", 1e-5),
        (vision, "layer_norm_eps", 1e-5),
        (preprocessing, "resample", 3),  # bicubic
    ):
        if part.get(key, usual) != usual:
            _refuse_other_model(folder, f"a model with {key} {part[key]}")
    return {
        "activation": activation,
        "vision_heads": vision.get("num_attention_heads", 12),
        "transformer_heads": text.get("num_attention_heads", 8),
        "image_resolution": vision.get("image_size", 224),
        "image_mean": tuple(preprocessing.get("image_mean", MEAN)),
        "image_std": tuple(preprocessing.get("image_std", STD)),
        "image_resize": "squash" if isinstance(size, dict) and "height" in size else "shortest",
    }


def save_hf(model, folder):
    """Write `model` as config.json, model.safetensors and preprocessor_config.json to `folder`, and
    CLIP's tokenizer if it is the model's, for CLIPModel and CLIPProcessor.from_pretrained of
    transformers.  Raises ValueError if it has a ResNet."""
    weights, config = to_hf(model.state_dict()), model.config
    resolution, squash = config["image_resolution"], config["image_resize"] == "squash"

    def tower(name):
        return {
            "hidden_size": config[f"{name}_width"],
            "intermediate_size": config[f"{name}_mlp_width"],
            "num_attention_heads": config[f"{name}_heads"],
            "num_hidden_layers": config[f"{name}_layers"],
            "hidden_act": config["activation"],
            "layer_norm_eps": 1e-5,
            "projection_dim": config["embed_dim"],
        }

    described = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": tower("transformer")
        | {
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["context_length"],
            "bos_token_id": config["vocab_size"] - 2,
            "eos_token_id": config["vocab_size"] - 1,
        },
        "vision_config": tower("vision")
        | {"image_size": resolution, "patch_size": config["vision_patch_size"]},
    }
    square = {"height": resolution, "width": resolution}
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if squash else {"shortest_edge": resolution},
        "resample": 3,  # bicubic
        "do_center_crop": not squash,
        "crop_size": square,
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": config["image_mean"],
        "image_std": config["image_std"],
    }
    tokenizer, files = default_tokenizer(), {}
    if config["vocab_size"] == len(tokenizer.encoder):
        merges = "".join(f"{' '.join(pair)}\n" for pair in tokenizer.ranks)
        files = {"vocab.json": tokenizer.encoder, "merges.txt": f"#version: 0.2\n{merges}",
                 "tokenizer_config.json": {
                     "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END,
                     "unk_token": END, "pad_token": END,
                     "model_max_length": config["context_length"]}}
    _write_folder(folder, {"model.safetensors": weights, "config.json": described,
                           "preprocessor_config.json": preprocessing, **files})


# ------------------------------------------------------------------------------ open_clip

OPEN_CLIP_READ = {  # what may be in a tower's part: read, told by the weights, or without effect
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size",
                   "patch_dropout"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id",
                 "eos_id"),
}
OPEN_CLIP_USUAL = ("tok", "argmax", "learnable", "linear", "default")  # values of other keys


def _open_clip_settings(folder):
    """What open_clip_config.json says of `SETTINGS`."""
    config = _read_json(folder / "open_clip_config.json")
    model, images = config["model_cfg"], config.get("preprocess_cfg") or {}
    vision, text = model["vision_cfg"], model["text_cfg"]
    for part, read in OPEN_CLIP_READ.items():
        for key, value in model[part].items():
            if key not in read and value and value not in OPEN_CLIP_USUAL:
                _refuse_other_model(folder, f"a model with {key} {value} in its {part}")
    if images.get("interpolation", "bicubic") not in ("bicubic", "random"):
        _refuse_other_model(folder, f"a model with {images['interpolation']} interpolation")
    width = vision.get("width", 768) * (POOLING if isinstance(vision.get("layers"), list) else 1)
    return {
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_heads": width // vision.get("head_width", 64),
        "transformer_heads": text.get("heads", 8),
        "image_resolution": vision.get("image_size", 224),
        "image_mean": tuple(images.get("mean", MEAN)),
        "image_std": tuple(images.get("std", STD)),
        "image_resize": images.get("resize_mode", "shortest"),
    }


def save_open_clip(model, folder):
    """Write `model` as open_clip_config.json and open_clip_model.safetensors to `folder`, for
    open_clip.create_model_and_transforms("local-dir:FOLDER")."""
    config = model.config
    width, vit = config["vision_width"], config["vision_patch_size"] is not None

    def mlp_ratio(name):
        ratio = config[f"{name}_mlp_width"] / config[f"{name}_width"]
        exact = int(config[f"{name}_width"] * ratio) == config[f"{name}_mlp_width"]
        return ratio if exact else math.nextafter(ratio, math.inf)

    described = {
        "model_cfg": {
            "embed_dim": config["embed_dim"],
            "quick_gelu": config["activation"] == "quick_gelu",
            "vision_cfg": {
                "image_size": config["image_resolution"],
                "layers": config["vision_layers"],
                "width": width,
                "head_width": width * (1 if vit else POOLING) // config["vision_heads"],
                "patch_size": config["vision_patch_size"],
            }
            | ({"mlp_ratio": mlp_ratio("vision")} if vit else {}),
            "text_cfg": {
                "context_length": config["context_length"],
                "vocab_size": config["vocab_size"],
                "width": config["transformer_width"],
                "heads": config["transformer_heads"],
                "layers": config["transformer_layers"],
                "mlp_ratio": mlp_ratio("transformer"),
            },
        },
        "preprocess_cfg": {
            "mean": config["image_mean"],
            "std": config["image_std"],
            "interpolation": "bicubic",
            "resize_mode": config["image_resize"],
        },
    }
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    _write_folder(folder, {"open_clip_model.safetensors": weights,
                           "open_clip_config.json": described})


# ------------------------------------------------------------------------------ folders

FOLDERS = (  # open_clip's first: where a folder is of both, either will do
    (_open_clip_settings, "open_clip_config.json",
     ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
    (_hf_settings, "config.json", ("model.safetensors", "pytorch_model.bin")),
)


def _read_folder(folder):
    """{"state_dict", "config"} of a folder of open_clip or Hugging Face."""
    for settings, described, names in FOLDERS:
        ways = [name + end for name in names for end in ("", ".index.json")]
        file = next((folder / name for name in ways if (folder / name).exists()), None)
        if file is None or not (folder / described).exists():
            continue
        try:
            config = settings(folder)
            content = _read_shards(file) if file.suffix == ".json" else read_checkpoint(file)
            return {"state_dict": state_dict_of(content, file), "config": config}
        except CheckpointError:
            raise
        except Exception as error:  # whatever values of other types than expected provoke
            raise CheckpointError(f"{folder / described} or a file that goes with it is damaged "
                                  f"({error!r:.100})") from None
    needed = ", or ".join(f"{described} and {' or '.join(names)}"
                          for _, described, names in FOLDERS)
    raise CheckpointError(f"{folder} holds no model: needed are {needed}")


def _read_shards(index):
    """{name: tensor} of the files beside an index of them."""
    files = {str(name) for name in _read_json(index)["weight_map"].values()}
    if any(Path(name).name != name for name in files):
        raise CheckpointError(f"{index} names files outside its folder")
    return {key: value for name in sorted(files)
            for key, value in read_checkpoint(index.parent / name).items()}


def _read_json(path):
    _require_file(path)
    return json.loads(path.read_text(encoding="utf-8"))


def _write_folder(folder, files):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".safetensors"):  # save_file would let nobody else read it
            (folder / name).write_bytes(save(content, metadata={"format": "pt"}))
        else:
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            (folder / name).write_text(text, encoding="utf-8")
