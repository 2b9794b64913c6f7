"""Write a checkpoint as a folder for transformers.

    python export_hf.py --resume logs/ex0/best.pt --out logs/ex0/hf

CLIPModel and CLIPProcessor.from_pretrained("logs/ex0/hf") load it. transformers has Vision
Transformers only. Its preprocessing differs from CLIP's in four points:

- It converts an image to RGB before the resize; CLIP does after it. Only transparent and palette
  images differ.
- Its resize of a uint8 tensor rounds differently from Pillow's: some values differ by 1 of 255.
- Its centre crop rounds an odd margin down; CLIP rounds half a pixel to the even number. The crops
  are one pixel apart where the resized image is 3, 7, 11, ... pixels longer than the crop.
- It keeps HTML entities and broken Unicode in captions; html.unescape and ftfy.fix_text repair
  them.

open_clip needs no export: create_model_and_transforms("ViT-B-32-quickgelu",
pretrained="logs/ex0/best.pt") loads a checkpoint of this project, ResNets too.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import command  # isort: skip

import clip
from params import parse_args
from utils.files import new_folder


@command
def main(argv=None):
    args = parse_args("export", argv)
    model, _ = clip.load(args.resume, device="cpu", activation=args.activation)
    with new_folder("--out", args.out) as folder:
        clip.save_hf(model, folder)
    print(f"wrote {args.out}: {clip.describe(model.config)}, for transformers")


if __name__ == "__main__":
    main()
