"""Write a checkpoint as a folder that transformers or open_clip loads.

    python export_hf.py --resume logs/ex0/best.pt --out logs/ex0/hf
    python export_hf.py --resume logs/ex0/best.pt --out logs/ex0/open_clip --format open_clip

then in Python CLIPModel.from_pretrained("logs/ex0/hf"), Vision Transformers only, or
open_clip.create_model_and_transforms("local-dir:logs/ex0/open_clip"). The tokenizer is CLIP's own:
for transformers take it from openai/clip-vit-base-patch32.
"""

import clip
from params import parse_args
from utils.errors import InputError, command
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
