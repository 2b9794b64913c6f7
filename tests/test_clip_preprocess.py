"""Images as CLIP sees them, of every kind that real collections hold: against the transforms that
CLIP's authors published, from memory and from files; and files that are cut short."""

import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import clip
from utils.reading.images import Images

SIZE = 32
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def published(image):
    transform = T.Compose([T.Resize(SIZE, interpolation=T.InterpolationMode.BICUBIC),
                           T.CenterCrop(SIZE), lambda image: image.convert("RGB"), T.ToTensor(),
                           T.Normalize(MEAN, STD)])
    return transform(image)


def picture(mode, width=61, height=40):
    """Smooth colours with noise; alpha, where there is one, varies too."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    channels = [4 * x, 6 * y, 2 * (x + y), 255 - 3 * x]
    rgba = np.stack(channels, axis=-1) + rng.integers(-20, 20, (height, width, 4))
    image = Image.fromarray(rgba.clip(0, 255).astype(np.uint8), "RGBA")
    if mode == "P":
        return image.convert("RGB").quantize(16)
    return (image.convert("RGB") if mode in ("1", "CMYK", "YCbCr") else image).convert(mode)


def read(folder, image, name, **options):
    """The crop of an image that was saved in a file, read as training reads it."""
    (folder / "images").mkdir(exist_ok=True)
    image.save(folder / "images" / name, **options)
    return Images(folder, [name], clip.Preprocess(SIZE))[0]


# ---- in memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (32, 32), (20, 9), (300, 33)])
def test_equal_to_the_published_transforms(mode, size):
    image = picture(mode, *size)
    out = clip.Preprocess(SIZE)(image)
    assert out.dtype == torch.float32 and out.shape == (3, SIZE, SIZE)
    assert torch.equal(out, published(image))


def test_crop_and_normalize_are_the_whole():
    preprocess = pickle.loads(pickle.dumps(clip.Preprocess(SIZE)))  # as a worker gets it
    image = picture("RGB")
    crop = preprocess.crop(image)
    assert crop.dtype == np.uint8 and crop.shape == (3, SIZE, SIZE) and crop.flags.writeable
    batch = torch.from_numpy(np.stack([crop, 255 - crop]))
    out = clip.normalize(batch)
    assert torch.equal(out[0], preprocess(image)) and out.dtype == torch.float32
    assert torch.equal(batch[0], torch.from_numpy(crop))  # not changed in place
    for dtype, error in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)):
        other = clip.normalize(batch, dtype)
        assert other.dtype == dtype
        torch.testing.assert_close(other.double(), out.double(), rtol=0, atol=error)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    grey = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0)
    wide = (grey.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")  # 0..65535
    crop = clip.Preprocess(SIZE).crop(Image.frombytes(mode, (64, 64), wide.tobytes()))
    np.testing.assert_array_equal(crop, clip.Preprocess(SIZE).crop(Image.fromarray(grey)))


@pytest.mark.parametrize("mode", ["I", "F", "RGBa", "RGBX", "HSV", "LAB"])
def test_rare_modes_are_read_unless_their_white_is_unknown(mode):
    """Of 32 bits a pixel nobody knows the white level: the picture could come out black."""
    image = Image.new(mode, (50, 40))
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match="32 bits a pixel"):
            clip.Preprocess(SIZE).crop(image)
    else:
        assert clip.Preprocess(SIZE)(image).isfinite().all()


# ---- from files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, name, options", [
    ("RGB", "x.png", {}), ("RGB", "x.webp", {"lossless": True}), ("RGBA", "x.png", {}),
    ("RGBA", "x.webp", {"lossless": True}), ("L", "x.png", {}), ("LA", "x.png", {}),
    ("P", "x.png", {}), ("P", "x.png", {"transparency": 3}), ("P", "x.gif", {}),
    ("1", "x.png", {}), ("CMYK", "x.tiff", {}), ("CMYK", "x.jpg", {}), ("RGB", "x.jpg", {})])
def test_every_format_gives_its_rgb(tmp_path, mode, name, options):
    crop = read(tmp_path, picture(mode), name, **options)
    with Image.open(tmp_path / "images" / name) as image:
        assert torch.equal(clip.normalize(crop), published(image))


def test_16_bit_files_keep_their_shades(tmp_path):
    values = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    crop = read(tmp_path, Image.fromarray(values.astype(np.uint16)), "x.png")
    assert abs(crop.numpy() - values / 65535 * 255).max() <= 1


@pytest.mark.parametrize("name", ["x.gif", "x.png"])
def test_animation_gives_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (SIZE, SIZE), color) for color in ("red", "blue")]
    crop = read(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    assert (crop == torch.tensor([255, 0, 0])[:, None, None]).all()


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_rotation_in_exif_is_not_applied(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by a quarter
    turned = read(tmp_path, picture("RGB", 40, 40), name, exif=exif)
    assert torch.equal(turned, read(tmp_path, picture("RGB", 40, 40), f"plain_{name}"))


def test_squashed_instead_of_cropped(tmp_path):
    """The two have files of their own in the image cache."""
    read(tmp_path, picture("RGB"), "a.png")
    expected = np.asarray(picture("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    for resize in ("shortest", "squash", "shortest"):
        preprocess = clip.Preprocess(SIZE, resize)
        crop = Images(tmp_path, ["a.png"], preprocess, tmp_path / "cache")[0]
        assert np.array_equal(crop.permute(1, 2, 0), expected) == (resize == "squash")


# ---- the check before training -------------------------------------------------------------------


@pytest.mark.parametrize("mode, name, options", [
    ("RGB", "x.jpg", {}), ("RGB", "x.jpg", {"progressive": True}), ("L", "x.png", {}),
    ("RGB", "x.webp", {"lossless": True}), ("RGB", "x.gif", {}), ("RGB", "x.bmp", {})])
def test_a_file_that_is_cut_short_is_found_wherever_it_is_cut(tmp_path, mode, name, options):
    """And a whole one, or one with bytes behind its end mark, is not."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    read(tmp_path, Image.fromarray(noise).convert(mode), name, **options)
    path, images = tmp_path / "images" / name, Images(tmp_path, [name])
    whole = path.read_bytes()
    for content in (whole, whole + b"\0\0\n"):
        path.write_bytes(content)
        assert images.flaw(0) is None
    for end in (len(whole) // 3, len(whole) // 2, len(whole) - len(whole) // 10):
        path.write_bytes(whole[:end])
        assert images.flaw(0).startswith(f"{path} is not an image or is damaged")


def test_an_end_mark_in_a_thumbnail_is_no_end(tmp_path):
    """Cut behind the thumbnail in its Exif data, a JPEG ends in an end mark."""
    read(tmp_path, picture("RGB"), "x.jpg", exif=b"Exif\0\0II*\0\x08" + b"\0" * 9 + b"\xff\xd9")
    path = tmp_path / "images" / "x.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xff\xd9") + 2])
    assert "x.jpg is not an image or is damaged" in Images(tmp_path, ["x.jpg"]).flaw(0)


@pytest.mark.slow
def test_what_checking_an_image_costs(tmp_path):
    names, rng = [f"{i}.jpg" for i in range(2000)], np.random.default_rng(0)
    (tmp_path / "images").mkdir()
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
