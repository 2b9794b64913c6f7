"""Real collections hold every kind of image: each is read from its file as CLIP would see it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import clip
from data import Images
from utils.errors import InputError

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


def chunk(kind, data, checksum=None):
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(before=b"", behind=b""):
    """Bytes of `gradient` with chunks before and behind its pixels."""
    buffer = io.BytesIO()
    gradient().save(buffer, "PNG")
    whole = buffer.getvalue()
    pixels = whole.index(b"IDAT") - 4
    return whole[:pixels] + before + whole[pixels:-12] + behind + whole[-12:]


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("damage", [
    chunk(b"tEXt", b"Software\0x", checksum=1), chunk(b"gAMA", b"\0"), chunk(b"cHRM", b"\0" * 5),
    chunk(b"sRGB", b""), chunk(b"pHYs", b"\0"), chunk(b"iCCP", b"x\0\0no profile"),
    chunk(b"iTXt", b"no text"), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
    chunk(b"acTL", b"\0")], ids=lambda data: data[4:8].decode())
def test_metadata_that_is_damaged_hides_no_picture(tmp_path, damage, where):
    (tmp_path / "x.png").write_bytes(png(**{where: damage}))
    assert np.array_equal(read(tmp_path, "x.png"), np.asarray(gradient()))


def test_a_png_may_end_in_its_metadata_but_not_in_its_pixels(tmp_path):
    whole = png(behind=chunk(b"tEXt", b"Comment\0" + b"x" * 100))
    text = whole.index(b"tEXt")
    for end in (text - 2, text + 4, text + 50):
        (tmp_path / "x.png").write_bytes(whole[:end])
        assert np.array_equal(read(tmp_path, "x.png"), np.asarray(gradient()))
    for end in (whole.index(b"IDAT") + 40, text - 40):
        (tmp_path / "y.png").write_bytes(whole[:end])
        with pytest.raises(InputError, match="y.png is not an image or is damaged"):
            read(tmp_path, "y.png")


def test_an_animated_png_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    assert read(tmp_path, "x.png").reshape(-1, 3).tolist() == [[255, 0, 0]] * SIZE**2
