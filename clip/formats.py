"""Files that hold a CLIP model. Nothing in them is executed.

- Files of torch.save: a state dict, or a training checkpoint with a state dict among its entries.
  Wrappers may have put a prefix before all names; `config` may describe the model.
- TorchScript archives, as OpenAI publishes: a zip with the pickle data.pkl, which describes a tree
  of modules, a file for each tensor's numbers, and code, which is not read.
- safetensors: parameters by name.

A state dict here maps OpenAI's parameter names to tensors, as CLIP.state_dict() does. transformers'
names are translated.
"""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import torch
from safetensors.torch import load_file
from torch.serialization import StorageType

OTHER_MODELS = {  # beginning of a parameter's name: the model that has it
    "logit_bias": "SigLIP",
    "text_decoder.": "CoCa",
    "visual.trunk.": "a model with an image tower of timm",
    "text.": "a model with a text tower of its own kind",
}


class CheckpointError(RuntimeError):
    """A model cannot be loaded; the message is one line that names the file."""

    for_people = True


def read_file(path):
    """Content (dict) of a file (Path) of any format named above, on the CPU: the entries of a
    training checkpoint, or the parameters by name. Raises CheckpointError for a file that does not
    exist, is damaged, has another format, or would run code."""
    require_file(path)
    with open(path, "rb") as file:
        start = file.read(40)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(x.file_size for x in archive.infolist()) > path.stat().st_size + 2**26:
                    raise ValueError("it unpacks to far more than its size")
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(archive)
        elif not start.startswith(b"\x80"):  # a pickle does
            raise ValueError(f"it begins with {start!r}" if start else "it is empty")
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other pickle protocols, then raises
            content = torch.load(path, map_location="cpu", weights_only=True)
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
            refuse_other_model(path, what)
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


def refuse_other_model(path, what):
    """Raise CheckpointError: the model at `path` is `what`."""
    raise CheckpointError(f"{path} holds {what}, not CLIP in OpenAI's architecture, and cannot be "
                          "trained here; --judge_features takes its features of the pairs")


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


# ------------------------------------------------------------------------------ torch.save


def _numpy_scalar(dtype, data):
    """Replaces numpy's function for pickled scalars, which would also take pointers."""
    return np.frombuffer(data, dtype)[0]


NUMPY_SCALARS = [  # the authors' checkpoints hold one in the optimiser's state
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # numpy 1's name
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # numpy 2's name
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]


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
    """Replaces the classes that a TorchScript archive defines."""


def _rebuild_tensor(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)  # checks the bounds


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles with the functions and classes in `names` ({"module.name": function or class})
    and refuses all others."""

    def __init__(self, file, names):
        super().__init__(file)
        self.names = names

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.names:
            raise pickle.UnpicklingError(f"refused to run GLOBAL {module}.{name}")
        return self.names[f"{module}.{name}"]


class _TorchScriptUnpickler(RestrictedUnpickler):
    """Unpickles data.pkl of a TorchScript archive."""

    NAMES = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch.jit._pickle.build_intlist": list,
        "torch.jit._pickle.build_doublelist": list,
        "torch.jit._pickle.build_boollist": list,
        "torch.jit._pickle.build_tensorlist": list,
    }

    def __init__(self, file, archive, folder):
        super().__init__(file, self.NAMES)
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


# ------------------------------------------------------------------------------ parameter names

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
    ValueError for a ResNet."""
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
