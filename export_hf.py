"""Write a checkpoint as a folder that transformers or open_clip loads.

    python export_hf.py --resume logs/ex0/best.pt --out logs/ex0/hf
    python export_hf.py --resume logs/ex0/best.pt --out logs/ex0/open_clip --format open_clip

then in Python CLIPModel and CLIPProcessor.from_pretrained("logs/ex0/hf"), Vision Transformers only,
or open_clip.create_model_and_transforms and get_tokenizer("local-dir:logs/ex0/open_clip").
transformers does two things otherwise than we: it leaves curly quotes, HTML entities and broken
Unicode as they are (html.unescape and ftfy.fix_text mend them), and converts an image to RGB before
it resizes it, which matters where there is transparency.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from utils.errors import InputError, command  # first: Ctrl-C ends in a line  # isort: skip

import clip
from params import parse_args
from utils.files import new_folder


@command
def main(argv=None):
    args = parse_args("export", argv)
    model, _ = clip.load(args.resume, device="cpu", activation=args.activation)
    save = {"transformers": clip.save_hf, "open_clip": clip.save_open_clip}[args.format]
    with new_folder("--out", args.out) as folder:
        try:
            save(model, folder)
        except ValueError as error:  # a ResNet
            raise InputError(f"{args.resume}: {error}; use --format open_clip") from error
    print(f"wrote {args.out}: {clip.describe(model.config)}, for {args.format}")


if __name__ == "__main__":
    main()
