"""Real collections hold every kind of image: each is read from its file as CLIP would see it."""

import numpy as np
import pytest
from PIL import Image

import clip
from data import Images

SIZE = 32


def gradient(width=SIZE, height=SIZE):
    """An RGB picture with a different value everywhere."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([4 * x, 4 * y, 2 * (x + y)], axis=2).astype(np.uint8))


def read(tmp_path, name):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / name).rename(tmp_path / "images" / name)
    return Images(tmp_path, [name], clip.Preprocess(SIZE))[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("mode, form", [
    ("RGB", "png"), ("RGB", "webp"), ("RGBA", "png"), ("RGBA", "webp"), ("L", "png"), ("LA", "png"),
    ("P", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "tiff"), ("CMYK", "jpg")])
def test_every_mode_gives_its_rgb(tmp_path, mode, form):
    image = gradient().convert(mode)
    options = {"lossless": True} if form == "webp" else {"quality": 95} if form == "jpg" else {}
    image.save(tmp_path / f"x.{form}", **options)
    expected = np.asarray(image.convert("RGB")).astype(int)
    crop = read(tmp_path, f"x.{form}")
    assert crop.shape == (SIZE, SIZE, 3)
    assert abs(crop - expected).mean() <= (4 if form == "jpg" else 0)


def test_16_bit_keeps_its_shades(tmp_path):
    values = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.png")
    crop = read(tmp_path, "x.png")
    assert abs(crop - (values / 65535 * 255)[..., None]).max() <= 1


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path, "x.gif").reshape(-1, 3).tolist() == [[255, 0, 0]] * SIZE**2


def test_rotation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by a quarter
    gradient().save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read(tmp_path, "x.png"), np.asarray(gradient()))
