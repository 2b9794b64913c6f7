"""Weights from files: OpenAI's TorchScript archives, state dicts, training checkpoints and Hugging
Face's CLIP models.  Nothing that is loaded can execute code.

A state dict here maps OpenAI's parameter names to tensors, as CLIP.state_dict() does.
"""

import hashlib
import json
import os
import pickle
import re
import tempfile
import urllib.request
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .model import CLIP, HEAD_WIDTH, infer_config
from .preprocess import MEAN, STD, Preprocess

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
CACHE = Path("~/.cache/clip").expanduser()
MAX_CODE = 2**26  # bytes that an archive may unpack to beyond its own size


def _config(embed, resolution, vision_layers, vision_width, patch, width, layers=12, context=77):
    return {
        "embed_dim": embed,
        "image_resolution": resolution,
        "vision_layers": vision_layers,
        "vision_width": vision_width,
        "vision_patch_size": patch,
        "context_length": context,
        "vocab_size": 49408,
        "transformer_width": width,
        "transformer_heads": width // HEAD_WIDTH,
        "transformer_layers": layers,
    }


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
    "tiny": _config(64, 32, 2, 128, 8, 64, layers=2),  # ours, for tests: never has trained weights
}


class CheckpointError(RuntimeError):
    """Weights that cannot be had; the message is one line that names the file."""

    for_people = True


def available_models():
    """Names of OpenAI's nine models."""
    return list(SHA256)


def describe(config):
    """A config in words: the model's name if it has one, its numbers otherwise."""
    for name, known in CONFIGS.items():
        if config == known:
            return name
    numbers = ", ".join(f"{key} {value}" for key, value in config.items())
    return f"a CLIP model with {numbers}"


def architecture(name_or_path):
    """The `config` of the model that `load` would give, without its weights for a known name.
    Raises CheckpointError."""
    if name_or_path in CONFIGS:
        return CONFIGS[name_or_path]
    return _infer(read_state_dict(name_or_path), name_or_path)


def load(name_or_path, device=None, jit=False, download_root=None):
    """A model and the preprocessing that belongs to it: (CLIP, Preprocess).

    `name_or_path` is one of available_models(); "tiny", a small architecture with random weights
    (from torch's global generator) for tests; or a file or folder that read_state_dict knows.  The
    model is in float32, in evaluation mode, on `device` (default: "cuda" if available, else "cpu").
    A name is looked up in `download_root` (if given), pre-trained_models/ and ~/.cache/clip, and
    otherwise downloaded to the first or last of these.  Raises CheckpointError; ValueError for
    jit=True, which would run code from the file.
    """
    if jit:
        raise ValueError("jit=True is not supported: it would execute code stored with the weights")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name_or_path == "tiny":
        model = CLIP(**CONFIGS["tiny"])
        return model.eval().to(device), Preprocess(model.visual.input_resolution)
    path = _find(name_or_path, download_root) if name_or_path in SHA256 else name_or_path
    return build(read_state_dict(path), path, device)


def build(state_dict, source, device="cpu"):
    """(CLIP, Preprocess), as `load`, from a state dict; `source` names it in errors."""
    with torch.device("meta"):  # neither spends time on an initialisation nor draws from it
        model = CLIP(**_infer(state_dict, source))
    load_state_dict_into(model.to_empty(device="cpu"), state_dict, source)
    return model.eval().to(device), Preprocess(model.visual.input_resolution)


def load_state_dict_into(model, state_dict, source):
    """Copy all of `state_dict` into `model`.  Raises CheckpointError, naming the file `source` and
    both architectures, if these differ."""
    config = _infer(state_dict, source)
    if config != model.config:
        raise CheckpointError(
            f"{source} holds {describe(config)}, the model is {describe(model.config)}"
        )
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} does not fit {describe(config)}: {reason}") from None


def _infer(state_dict, source):
    try:
        return infer_config(state_dict)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


# ------------------------------------------------------------------------------ downloads


def _find(name, download_root):
    """Path of the weights of one of OpenAI's models; downloads them if no folder has them."""
    file = re.sub("[/@]", "-", name) + ".pt"
    folders = [Path(download_root)] if download_root else []
    folders += [PRETRAINED, CACHE]
    for folder in folders:
        if (folder / file).is_file():
            if _sha256(folder / file) == SHA256[name]:
                return folder / file
            print(f"{folder / file} is not OpenAI's file (its SHA-256 differs): not used")
    target = (Path(download_root) if download_root else CACHE) / file
    _download(URL.format(sha256=SHA256[name], file=file), target, SHA256[name])
    return target


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(url, target, sha256):
    """Download `url` to the path `target`, which exists only once its hash has been verified."""
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part",
                                            dir=target.parent)
        with os.fdopen(descriptor, "wb") as file, urllib.request.urlopen(url, timeout=60) as source:
            size = int(source.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=target.name, unit="B", unit_scale=True) as bar:
                while chunk := source.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if _sha256(part) != sha256:
            raise CheckpointError(f"{url} was not downloaded intact: its SHA-256 is not {sha256}")
        os.chmod(part, 0o644)  # mkstemp's files are private
        os.replace(part, target)
        part = None
    except OSError as error:
        raise CheckpointError(
            f"cannot download {url} ({error}): put that file at {target} or {PRETRAINED}/"
        ) from None
    finally:
        if part is not None:
            os.unlink(part)


# ------------------------------------------------------------------------------ reading files


def read_state_dict(path):
    """CLIP's state dict, on the CPU and in the dtypes of the file, from

    - a TorchScript archive, as OpenAI publishes,
    - a state dict, or a training checkpoint that has one as "state_dict" (torch.save); "module."
      before the names is dropped,
    - Hugging Face's CLIP with a Vision Transformer: model.safetensors, pytorch_model.bin, or the
      folder with either and config.json.

    Raises CheckpointError if the file is missing, damaged, none of these, or would run code.
    """
    return state_dict_of(read_checkpoint(path), path)


def state_dict_of(content, path):
    """The state dict in what `read_checkpoint` gave for `path`, with our names.  Raises
    CheckpointError if there is none."""
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict) or not state_dict:
        raise CheckpointError(f"{path} holds no state dict")
    state_dict = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
    if any(key.startswith("text_model.") for key in state_dict):
        try:
            state_dict = from_hf(state_dict)
        except KeyError as error:
            raise CheckpointError(f"{path} is not CLIP as transformers saves it: {error}") from None
    for key in list(state_dict):  # what archives hold beside the weights
        if key in ("input_resolution", "context_length", "vocab_size") or "attn_mask" in key:
            del state_dict[key]
    if not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{path} holds no state dict: not all of its values are tensors")
    for key, value in state_dict.items():
        if not _is_plain(value) or not (value.is_floating_point() or "num_batches" in key):
            raise CheckpointError(f"{path}: '{key}' is not an ordinary tensor of real numbers")
    return state_dict


def _is_plain(tensor):
    """Whether a tensor is dense, on the CPU, not empty, and no larger than what the file holds for
    it (a view can claim any size)."""
    return (tensor.layout == torch.strided and tensor.device.type == "cpu"
            and not tensor.is_nested and not tensor.is_quantized and tensor.numel() > 0
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def read_checkpoint(path):
    """The whole content (dict) of any file that read_state_dict knows, on the CPU: all entries of a
    training checkpoint, the parameters by name otherwise.  Raises CheckpointError as there."""
    path = Path(path)
    if path.is_dir():
        return _read_hf_folder(path)
    if not path.is_file():
        hint = "" if path.suffix else f", nor a model of that name: there are {', '.join(CONFIGS)}"
        raise CheckpointError(f"{path}: no such file{hint}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        _refuse_inflation(path)
        if _is_torchscript(path):
            return _read_torchscript(path)
        with _numpy_scalars_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols, before the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes
        refused = re.search(r"GLOBAL `?([\w.]+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} was refused: it would run code on loading ({refused[1]})"
            ) from None
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _numpy_scalar(module):
    """What a pickled numpy scalar calls under the name `module`.scalar."""

    def scalar(dtype, data):
        return np.frombuffer(data, dtype)[0]

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


NUMPY_SCALARS = [
    _numpy_scalar("numpy.core.multiarray"),  # as numpy 1 names it
    _numpy_scalar("numpy._core.multiarray"),  # as numpy 2 does
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]


@contextmanager
def _numpy_scalars_allowed():
    # torch.serialization.safe_globals does this, from torch 2.5 on
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(NUMPY_SCALARS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


# ------------------------------------------------------------------------------ TorchScript

STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


def _refuse_inflation(path):
    """Raise CheckpointError for an archive that unpacks to far more than it holds. In torch's, the
    code of a TorchScript model alone is compressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size + MAX_CODE:
            raise CheckpointError(f"{path} was refused: it unpacks to {size / 1e9:.1f} GB")


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path):
    """{name: tensor} of a TorchScript archive, without its code: data.pkl describes a tree of
    modules whose attributes are tensors, modules or plain values."""
    with zipfile.ZipFile(path) as archive:
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


class _TorchScriptUnpickler(pickle.Unpickler):
    """Knows the names that TorchScript writes, and refuses all others."""

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
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.NAMES[f"{module}.{name}"]

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype)
        return self.storages[key]


# ------------------------------------------------------------------------------ Hugging Face

HF_NAMES = {  # OpenAI's: Hugging Face's; a block's names have "blocks.N." in front
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",  # transposed
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",  # transposed
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
HF_TOWERS = {
    "transformer.resblocks.": "text_model",
    "visual.transformer.resblocks.": "vision_model",
}
HF_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = ("text_projection", "visual.proj")


def to_hf(state_dict):
    """A state dict with OpenAI's names -> with those of transformers.CLIPModel.  Raises ValueError
    if the image encoder is a ResNet, which transformers does not have."""
    if "visual.proj" not in state_dict:
        raise ValueError("transformers has CLIP with a Vision Transformer only")
    out = {}
    for key, value in state_dict.items():
        if key in HF_NAMES:
            out[HF_NAMES[key]] = value.T.contiguous() if key in TRANSPOSED else value
            continue
        tower, n, part = re.fullmatch(r"(.*resblocks\.)(\d+)\.(.*)", key).groups()
        block = f"{HF_TOWERS[tower]}.encoder.layers.{n}."
        name, _, kind = part.replace("in_proj_", "in_proj.").rpartition(".")
        if name == "attn.in_proj":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                out[f"{block}self_attn.{letter}_proj.{kind}"] = third.clone()
        else:
            out[f"{block}{HF_BLOCK[name]}.{kind}"] = value
    return out


def from_hf(state_dict):
    """The inverse of to_hf.  Position ids, which older versions of transformers saved, are dropped;
    names that transformers.CLIPModel does not have are kept."""
    names = {theirs: ours for ours, theirs in HF_NAMES.items()}
    towers = {theirs: ours for ours, theirs in HF_TOWERS.items()}
    parts = {theirs: ours for ours, theirs in HF_BLOCK.items()}
    out = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(\w+)\.encoder\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", key)
        if key in names:
            out[names[key]] = value.T if names[key] in TRANSPOSED else value
        elif match:
            tower, n, part, kind = match.groups()
            block = f"{towers[tower]}{n}."
            if part == "self_attn.q_proj":
                three = [state_dict[key.replace("q_proj", f"{c}_proj")] for c in "qkv"]
                out[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                out[f"{block}{parts[part]}.{kind}"] = value
        elif not key.endswith("position_ids"):
            out[key] = value
    return out


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors, not installed") from None
    return load_file(path)


def _read_hf_folder(folder):
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no Hugging Face model: config.json and model.safetensors or "
            "pytorch_model.bin are needed"
        )
    # neither the activation nor the number of heads can be told from the weights
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        towers = [(config.get("text_config") or {}, 512), (config.get("vision_config") or {}, 768)]
        settings = [(part.get("hidden_act", "quick_gelu"), int(part.get("hidden_size", width)),
                     part.get("num_attention_heads")) for part, width in towers]
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json is damaged ({error})") from None
    for activation, width, heads in settings:
        if activation != "quick_gelu":
            raise CheckpointError(f"{folder}: its activation is {activation}, not QuickGELU")
        if heads not in (None, width / HEAD_WIDTH):
            raise CheckpointError(f"{folder}: its attention heads are not {HEAD_WIDTH} wide")
    return read_checkpoint(file)


def save_hf(model, folder):
    """Write `model` as config.json, model.safetensors and preprocessor_config.json to `folder`, for
    transformers.CLIPModel.from_pretrained.  Raises ValueError if it has a ResNet."""
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in to_hf(model.state_dict()).items()}
    config, folder = model.config, Path(folder)
    resolution = config["image_resolution"]

    def tower(width, layers):
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // HEAD_WIDTH,
            "num_hidden_layers": layers,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": config["embed_dim"],
        }

    described = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": tower(config["transformer_width"], config["transformer_layers"])
        | {
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["context_length"],
            "bos_token_id": config["vocab_size"] - 2,
            "eos_token_id": config["vocab_size"] - 1,
        },
        "vision_config": tower(config["vision_width"], config["vision_layers"])
        | {"image_size": resolution, "patch_size": config["vision_patch_size"]},
    }
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resolution},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": resolution, "width": resolution},
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))
