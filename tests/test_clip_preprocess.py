"""Preprocessing against the transforms that CLIP's authors published, and on unusual images."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import clip
from utils.reading.images import Images

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def published(resolution):
    return T.Compose(
        [
            T.Resize(resolution, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(resolution),
            lambda image: image.convert("RGB"),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


def picture(mode, width=61, height=40):
    """Smooth colours with noise; alpha, where there is one, varies too."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    channels = [4 * x, 6 * y, 2 * (x + y), 255 - 3 * x]
    rgba = np.stack(channels, axis=-1) + rng.integers(-20, 20, (height, width, 4))
    image = Image.fromarray(rgba.clip(0, 255).astype(np.uint8), "RGBA")
    if mode == "P":
        return image.convert("RGB").quantize(16)
    return (
        image.convert("RGB").convert(mode)
        if mode in ("1", "CMYK", "YCbCr")
        else (image.convert(mode))
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (32, 32), (20, 9), (300, 33)])
def test_equal_to_the_published_transforms(mode, size):
    image = picture(mode, *size)
    out = clip.Preprocess(32)(image)
    assert out.dtype == torch.float32 and out.shape == (3, 32, 32)
    assert torch.equal(out, published(32)(image))


def test_palette_with_transparency():
    buffer = io.BytesIO()
    picture("P").save(buffer, "PNG", transparency=3)
    image = Image.open(buffer)
    assert image.mode == "P"
    assert torch.equal(clip.Preprocess(32)(image), published(32)(image))


def test_squashed_instead_of_cropped(tmp_path):
    """The two have files of their own in the image cache."""
    (tmp_path / "images").mkdir()
    picture("RGB").save(tmp_path / "images" / "a.png")
    expected = np.asarray(picture("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    for preprocess in (clip.Preprocess(32), clip.Preprocess(32, "squash"), clip.Preprocess(32)):
        crop = Images(tmp_path, ["a.png"], preprocess, tmp_path / "cache")[0]
        same = np.array_equal(crop.permute(1, 2, 0), expected)
        assert same == (preprocess.resize == "squash")


def test_crop_and_normalize_are_the_whole():
    preprocess = clip.Preprocess(32)
    image = picture("RGB")
    crop = preprocess.crop(image)
    assert crop.dtype == np.uint8 and crop.shape == (3, 32, 32) and crop.flags.writeable
    batch = torch.from_numpy(np.stack([crop, 255 - crop]))
    out = clip.normalize(batch)
    assert torch.equal(out[0], preprocess(image)) and out.dtype == torch.float32
    assert torch.equal(batch[0], torch.from_numpy(crop))  # not changed in place
    for dtype, error in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)):
        other = clip.normalize(batch, dtype)
        assert other.dtype == dtype
        torch.testing.assert_close(other.double(), out.double(), rtol=0, atol=error)
    mean, std = np.reshape(MEAN, (3, 1, 1)), np.reshape(STD, (3, 1, 1))
    exact = (batch.numpy() / 255 - mean) / std
    np.testing.assert_allclose(clip.normalize(batch, torch.float64).numpy(), exact, rtol=1e-12)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    grey = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0)
    wide = (grey.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")  # 0..65535
    crop = clip.Preprocess(32).crop(Image.frombytes(mode, (64, 64), wide.tobytes()))
    np.testing.assert_array_equal(crop, clip.Preprocess(32).crop(Image.fromarray(grey)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_grey_is_refused(mode):
    """Its white level is anybody's guess: the picture could come out black or white."""
    with pytest.raises(ValueError, match="32 bits a pixel"):
        clip.Preprocess(32).crop(Image.new(mode, (50, 40)))


@pytest.mark.parametrize("mode", ["RGBa", "RGBX", "HSV", "LAB"])
def test_rare_modes(mode):
    out = clip.Preprocess(32)(Image.new(mode, (50, 40)))
    assert out.shape == (3, 32, 32) and out.isfinite().all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    crop = clip.Preprocess(32).crop(Image.open(buffer))
    assert (crop == np.reshape([255, 0, 0], (3, 1, 1))).all()


def test_exif_rotation_is_not_applied():
    image = picture("RGB", 40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    files = io.BytesIO(), io.BytesIO()
    image.save(files[0], "JPEG")
    image.save(files[1], "JPEG", exif=exif)
    plain, turned = map(Image.open, files)
    assert turned.getexif()[0x0112] == 6
    assert torch.equal(clip.Preprocess(32)(turned), clip.Preprocess(32)(plain))


def test_can_be_sent_to_a_worker():
    preprocess = pickle.loads(pickle.dumps(clip.Preprocess(32)))
    assert preprocess.resolution == 32
