"""Folders that hold a CLIP model, on disk or on the Hugging Face hub.

- transformers': config.json and model.safetensors or pytorch_model.bin, with or without a
  preprocessor_config.json or (transformers 5) a processor_config.json, and a tokenizer.
- open_clip's: open_clip_config.json and open_clip_model.safetensors or open_clip_pytorch_model.bin.

Settings that change the features are read or refused, never ignored.
"""

import json
from pathlib import Path

from safetensors.torch import save

from .formats import (
    CheckpointError,
    read_file,
    refuse_other_model,
    require_file,
    state_dict_of,
    to_hf,
)
from .model import POOLING
from .preprocess import MEAN, STD
from .tokenizer import END, START, default_tokenizer

WAYS = (  # description and weights of a model: safetensors before pickles
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("open_clip_config.json", "open_clip_pytorch_model.bin"),
    ("config.json", "pytorch_model.bin"),
    ("config.json", "pytorch_model.bin.index.json"),
)


def read_checkpoint(path):
    """Content of a file, as from `read_file`, or of a folder, {"state_dict", "config"}, on the CPU.
    Raises CheckpointError for a path that does not exist, is damaged, has another format, would run
    code, or holds a model that cannot be built here."""
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    described, weights = _choose({file.name for file in path.iterdir()}, path)
    try:
        config = SETTINGS_OF[described](path)
        if weights.endswith(".index.json"):
            content = {key: value for name in _shards(path / weights)
                       for key, value in read_file(path / name).items()}
        else:
            content = read_file(path / weights)
        return {"state_dict": state_dict_of(content, path / weights), "config": config}
    except CheckpointError:
        raise
    except Exception as error:  # a value of an unexpected type
        raise CheckpointError(f"{path / described} or a file that goes with it is damaged "
                              f"({error!r:.100})") from None


def _choose(files, where):
    """The first (description, weights) of `WAYS` that the names `files` (set) of a folder hold."""
    for pair in WAYS:
        if files.issuperset(pair):
            return pair
    raise CheckpointError(
        f"{where} holds no model: needed are open_clip_config.json and open_clip_model.safetensors "
        "or open_clip_pytorch_model.bin, or config.json and model.safetensors or pytorch_model.bin"
    )


def _shards(index):
    """Names of the weight files that an index file lists."""
    files = sorted({str(name) for name in _read_json(index)["weight_map"].values()})
    if any(Path(name).name != name for name in files):
        raise CheckpointError(f"{index} names files outside its folder")
    return files


def _read_json(path):
    require_file(path)
    return json.loads(path.read_text(encoding="utf-8"))


def _side(size):
    """Side of a square, given as one number or two."""
    return size[0] if isinstance(size, list) and size == size[:1] * 2 else size


def _three(value):
    """Numbers for red, green and blue, given as one number or three."""
    return (value,) * 3 if isinstance(value, int | float) else tuple(value)


# ------------------------------------------------------------------------------ transformers

PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # of transformers 5, and older
TOKENIZER = ("tokenizer.json", "vocab.json")


def _hf_settings(folder):
    """The `SETTINGS` in a folder of transformers."""
    config = _read_json(folder / "config.json")
    if config["model_type"] != "clip":
        refuse_other_model(folder, f"a model of type {config['model_type']}")
    text, vision = (config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {}
                    for tower in ("text", "vision"))  # in transformers' order
    activation = vision.get("hidden_act", "quick_gelu")
    last = min(text.get("vocab_size", 49408), 49408) - 1  # the end token, a caption's largest id
    for part, key, default, accepted in (
        (text, "hidden_act", "quick_gelu", [activation]),
        (text, "layer_norm_eps", 1e-5, [1e-5]),
        (vision, "layer_norm_eps", 1e-5, [1e-5]),
        (text, "eos_token_id", last, [last, 2]),  # 2, in older files, means the largest id
    ):
        if part.get(key, default) not in accepted:
            refuse_other_model(folder, f"a model with {key} {part.get(key, default)}")
    _check_tokenizer(folder)
    resolution = _side(vision.get("image_size", 224))
    return {
        "activation": activation,
        "vision_heads": vision.get("num_attention_heads", 12),
        "transformer_heads": text.get("num_attention_heads", 8),
        "image_resolution": resolution,
        **_hf_preprocessing(folder, resolution),
    }


def _check_tokenizer(folder):
    """Raise CheckpointError if the folder's tokenizer has other ids than CLIP's."""
    for file in TOKENIZER:
        if (folder / file).exists():
            content = _read_json(folder / file)
            vocabulary = content["model"]["vocab"] if file == "tokenizer.json" else content
            if not default_tokenizer().encoder.items() <= vocabulary.items():
                refuse_other_model(folder, f"a model with a tokenizer of its own ({file})")


def _hf_preprocessing(folder, resolution):
    """The `SETTINGS` of a folder's image processor, {} if it has none. A rescale factor other than
    1 / 255 becomes part of mean and standard deviation."""
    for path in (folder / name for name in PROCESSOR):
        said = _read_json(path) if path.exists() else {}
        if path.name == "processor_config.json":  # older ones hold no image processor
            said = said.get("image_processor")
        if said:
            break
    else:
        return {}
    said = {"do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "crop_size": 224,
            "do_center_crop": True, "do_pad": False, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": MEAN, "image_std": STD,
            "image_processor_type": said.get("feature_extractor_type", "CLIPImageProcessor"),
            } | {key: value for key, value in said.items() if value is not None}
    square = {"height": resolution, "width": resolution}
    squash = said["size"] == square
    accepted = {
        "image_processor_type": ["CLIPImageProcessor", "CLIPImageProcessorFast",
                                 "CLIPImageProcessorPil", "CLIPFeatureExtractor"],
        "do_resize": [True],
        "size": [{"shortest_edge": resolution}, resolution, square],
        "resample": [3],  # bicubic
        "do_center_crop": [True, False] if squash else [True],
        "crop_size": [square, resolution] if said["do_center_crop"] else [said["crop_size"]],
        "do_pad": [False],
    }
    for key, values in accepted.items():
        if said[key] not in values:
            raise CheckpointError(f"{path} has {key} {said[key]}, but supported is "
                                  f"{' or '.join(map(str, values))}; --judge_features takes "
                                  "features from any program")
    scale = 255 * said["rescale_factor"] if said["do_rescale"] else 255
    mean, std = (0, 1) if not said["do_normalize"] else (said["image_mean"], said["image_std"])
    return {
        "image_mean": tuple(x / scale for x in _three(mean)),
        "image_std": tuple(x / scale for x in _three(std)),
        "image_resize": "squash" if squash else "shortest",
    }


def save_hf(model, folder):
    """Write `model` to `folder` for CLIPModel and CLIPProcessor.from_pretrained of transformers.
    CLIP's tokenizer is added if the model has its vocabulary. Raises ValueError for a ResNet."""
    weights, config = to_hf(model.state_dict()), model.config
    resolution, squash = config["image_resolution"], config["image_resize"] == "squash"
    tokenizer = default_tokenizer()

    def tower(name):
        return {
            "hidden_size": config[f"{name}_width"],
            "intermediate_size": config[f"{name}_mlp_width"],
            "num_attention_heads": config[f"{name}_heads"],
            "num_hidden_layers": config[f"{name}_layers"],
            "hidden_act": config["activation"],
            "projection_dim": config["embed_dim"],
        }

    last = min(config["vocab_size"], len(tokenizer.encoder)) - 1
    described = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": tower("transformer")
        | {
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["context_length"],
            "bos_token_id": last - 1,
            "eos_token_id": last,
        },
        "vision_config": tower("vision")
        | {"image_size": resolution, "patch_size": config["vision_patch_size"]},
    }
    square = {"height": resolution, "width": resolution}
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": square if squash else {"shortest_edge": resolution},
        "do_center_crop": not squash,  # all else is CLIPImageProcessor's default
        "crop_size": square,
        "image_mean": config["image_mean"],
        "image_std": config["image_std"],
    }
    files = {"config.json": described, "preprocessor_config.json": preprocessing}
    if config["vocab_size"] >= len(tokenizer.encoder):
        merges = "".join(f"{' '.join(pair)}\n" for pair in tokenizer.ranks)
        files |= {"vocab.json": tokenizer.encoder, "merges.txt": f"#version: 0.2\n{merges}",
                  "tokenizer_config.json": {
                      "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END,
                      "unk_token": END, "pad_token": END,
                      "model_max_length": config["context_length"]}}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors' save_file would give the file to its owner alone
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (folder / name).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------ open_clip

OPEN_CLIP_READ = {  # keys that are read here, known from the weights, or without effect
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size",
                   "patch_dropout"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id",
                 "eos_id"),
}
OPEN_CLIP_USUAL = ("tok", "argmax", "learnable", "linear", "default")  # values of other keys


def _open_clip_settings(folder):
    """The `SETTINGS` in a folder of open_clip."""
    config = _read_json(folder / "open_clip_config.json")
    model, images = config["model_cfg"], config.get("preprocess_cfg") or {}
    vision, text = model["vision_cfg"], model["text_cfg"]
    images = {key: value for key, value in images.items() if value is not None}
    for part, read in OPEN_CLIP_READ.items():
        for key, value in model[part].items():
            if key not in read and value and value not in OPEN_CLIP_USUAL:
                refuse_other_model(folder, f"a model with {key} {value} in its {part}")
    for key, accepted in (("interpolation", ("bicubic", "random")), ("mode", ("RGB",))):
        if images.get(key, accepted[0]) not in accepted:
            refuse_other_model(folder, f"a model with {key} {images[key]} of images")
    width = vision.get("width", 768) * (POOLING if isinstance(vision.get("layers"), list) else 1)
    return {
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_heads": width // vision.get("head_width", 64),
        "transformer_heads": text.get("heads", 8),
        "image_resolution": _side(vision.get("image_size", 224)),
    } | {
        f"image_{ours}": read(images[theirs]) for ours, theirs, read in (
            ("mean", "mean", _three), ("std", "std", _three), ("resize", "resize_mode", str))
        if theirs in images
    }


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
        files = {file.rfilename for file in hub.model_info(name, timeout=10).siblings}
        described, weights = _choose(files, name)
        for file in sorted({described, *PROCESSOR, *TOKENIZER} & files):
            hub.hf_hub_download(name, file)
        path = Path(hub.hf_hub_download(name, weights))
        if weights.endswith(".index.json"):
            for file in _shards(path):
                hub.hf_hub_download(name, file)
        return path.parent
    except CheckpointError:
        raise
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        raise CheckpointError(
            f"{name}: no such file or folder, and no such model on {hub.constants.ENDPOINT} "
            "(for a private or gated one: hf auth login)") from None
    except Exception as error:  # no network, the hub is down, the disk is full
        for file in SETTINGS_OF:
            if isinstance(path := hub.try_to_load_from_cache(name, file), str):
                return Path(path).parent
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{name}: no such file or folder, and it cannot be downloaded from "
                              f"{hub.constants.ENDPOINT} ({reason})") from None


SETTINGS_OF = {"open_clip_config.json": _open_clip_settings, "config.json": _hf_settings}
