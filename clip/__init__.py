"""CLIP (Radford et al., 2021): the model, its tokenizer, its preprocessing and its weights."""

# ruff: noqa: F401
from .formats import CheckpointError, read_checkpoint, save_hf
from .model import CLIP, convert_weights_to_fp16, infer_config
from .preprocess import Preprocess, normalize
from .tokenizer import SimpleTokenizer, tokenize, tokenize_with_lengths
from .weights import architecture, available_models, build, describe, load
