"""CLIP's image preprocessing: bicubic resize of the shorter side, centre crop, RGB, scaling to
[0, 1] and normalisation with the mean and standard deviation of the model's training images.

The resize happens in the image's own mode, the conversion to RGB after it, and EXIF rotation is not
applied: all as in OpenAI's release. Of an animation the current frame is taken, after Image.open
the first.
"""

import functools

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 1000  # long side over short side; a thinner image would fill the memory when resized


def normalize(images, dtype=torch.float32, mean=MEAN, std=STD):
    """(images / 255 - mean) / std as `dtype`, computed in at least float32. images: uint8 (..., 3,
    H, W), on any device; mean and std: of red, green, blue."""
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (_channels(tuple(x), wide, images.device) for x in (mean, std))
    return images.to(wide).div_(255).sub_(mean).div_(std).to(dtype)


@functools.cache
@torch.inference_mode(False)
def _channels(values, dtype, device):
    """Three numbers as a (3, 1, 1) tensor on a device, cached, as a copy to a GPU synchronises."""
    return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)


def check_usable(image):
    """Raise ValueError for a PIL image, not decoded yet, that cannot be used."""
    if image.format == "EPS":
        raise ValueError("EPS, which only Ghostscript can draw")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, without a known value of white; save it with 8 or 16")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too thin")


def to_8_bit(image):
    """A PIL image of 16 bits a pixel -> one of 8 bits, mode "L"; any other image unchanged.
    Pillow's own conversion would clip at 255: a white image."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


class Preprocess:
    """PIL image of any mode and size -> input of a CLIP model.

    preprocess(image): float32 tensor (3, R, R), normalised.
    preprocess.crop(image): uint8 array (3, R, R), RGB, before the normalisation;
    normalize(torch.from_numpy(crop), mean=..., std=...) is preprocess(image) exactly.

    resize: "shortest" resizes the shorter side to R and crops the centre (OpenAI); "squash" resizes
    both sides to R (DFN's largest models). Raises ValueError for another one, or an std of zero.
    """

    def __init__(self, resolution, resize="shortest", mean=MEAN, std=STD):
        if resize not in ("shortest", "squash") or not min(std) > 0:
            raise ValueError(f"image_resize {resize!r} and image_std {std} cannot be used")
        self.resolution, self.resize, self.mean, self.std = resolution, resize, mean, std

    @classmethod
    def of(cls, config):
        """The preprocessing of the model with this `config`."""
        return cls(*(config[f"image_{key}"] for key in ("resolution", "resize", "mean", "std")))

    def crop(self, image):
        """See the class. Raises ValueError for an image that `check_usable` refuses."""
        check_usable(image)
        image = to_8_bit(image)
        size = self.resolution if self.resize == "shortest" else [self.resolution] * 2
        image = TF.resize(image, size, InterpolationMode.BICUBIC)
        image = TF.center_crop(image, self.resolution).convert("RGB")
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def __call__(self, image):
        return normalize(torch.from_numpy(self.crop(image)), mean=self.mean, std=self.std)
