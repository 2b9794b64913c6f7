"""Real collections hold every kind of image: each is read from its file as CLIP would see it."""

import time

import numpy as np
import pytest
from PIL import Image

import clip
from utils.reading.images import Images

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


def test_an_animated_png_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    assert read(tmp_path, "x.png").reshape(-1, 3).tolist() == [[255, 0, 0]] * SIZE**2


# ---- the check before training -------------------------------------------------------------------


@pytest.mark.parametrize("mode, form, options", [
    ("RGB", "jpg", {}), ("RGB", "jpg", {"progressive": True}), ("L", "png", {}),
    ("RGB", "webp", {"lossless": True}), ("RGB", "gif", {}), ("RGB", "bmp", {})])
def test_a_file_that_is_cut_short_is_found_wherever_it_is_cut(tmp_path, mode, form, options):
    """And a whole one, or one with bytes behind its end mark, is not."""
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"x.{form}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    whole, images = path.read_bytes(), Images(tmp_path, [path.name])
    for content in (whole, whole + b"\0\0\n"):
        path.write_bytes(content)
        assert images.flaw(0) is None
    for end in (len(whole) // 3, len(whole) // 2, len(whole) - len(whole) // 10):
        path.write_bytes(whole[:end])
        assert images.flaw(0).startswith(f"{path} is not an image or is damaged")


def test_an_end_mark_in_a_thumbnail_is_no_end(tmp_path):
    """Cut behind the thumbnail in its Exif data, a JPEG ends in an end mark."""
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "x.jpg"
    gradient().save(path, exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0\xff\xd9")
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xff\xd9") + 2])
    assert "x.jpg is not an image or is damaged" in Images(tmp_path, ["x.jpg"]).flaw(0)


@pytest.mark.slow
def test_what_checking_an_image_costs(tmp_path):
    (tmp_path / "images").mkdir()
    names, rng = [f"{i}.jpg" for i in range(2000)], np.random.default_rng(0)
    for name in names:
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        small.resize((640, 480)).save(tmp_path / "images" / name, quality=90)
    images, cost = Images(tmp_path, names, clip.Preprocess(224)), {}
    for what, function in (("check", images.flaw), ("decode and crop", images.decode)):
        start = time.process_time()
        for k in range(len(names)):
            function(k)
        cost[what] = (time.process_time() - start) / len(names) * 1e3
        print(f"{what}: {cost[what]:.2f} ms an image")
    assert cost["check"] < cost["decode and crop"] / 10
