"""CLIP (Radford et al., 2021): the model, its tokenizer, its preprocessing and its weights."""

from .model import CLIP, convert_weights_to_fp16, infer_config
from .preprocess import Preprocess, normalize
from .tokenizer import SimpleTokenizer, tokenize, tokenize_with_lengths
from .weights import (
    CheckpointError,
    architecture,
    available_models,
    build,
    describe,
    from_hf,
    load,
    load_state_dict_into,
    read_checkpoint,
    read_state_dict,
    save_hf,
    state_dict_of,
    to_hf,
)

__all__ = [
    "CLIP",
    "CheckpointError",
    "Preprocess",
    "SimpleTokenizer",
    "architecture",
    "available_models",
    "build",
    "convert_weights_to_fp16",
    "describe",
    "from_hf",
    "infer_config",
    "load",
    "load_state_dict_into",
    "normalize",
    "read_checkpoint",
    "read_state_dict",
    "save_hf",
    "state_dict_of",
    "to_hf",
    "tokenize",
    "tokenize_with_lengths",
]
