"""Write a checkpoint as a Hugging Face folder, which transformers.CLIPModel.from_pretrained loads.

    python export_hf.py --resume logs/ex0/best.pt --out logs/ex0/hf

The tokenizer is CLIP's own: take it from openai/clip-vit-base-patch32. Vision Transformers only.
"""

from pathlib import Path

import clip
from params import parse_args
from utils.errors import InputError, command
from utils.files import require_new


@command
def main(argv=None):
    args = parse_args("export", argv)
    model, _ = clip.load(args.resume, device="cpu")
    out = Path(args.out)
    require_new("--out", out)
    try:
        clip.save_hf(model, out)
    except ValueError as error:  # a ResNet
        raise InputError(f"{args.resume}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    print(f"wrote {out}: {clip.describe(model.config)}, config.json, model.safetensors, "
          "preprocessor_config.json")


if __name__ == "__main__":
    main()
