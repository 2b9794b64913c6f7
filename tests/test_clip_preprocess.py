"""Images as CLIP sees them, of every kind that real collections hold: against the transforms that
CLIP's authors published, from memory and from files; and files that are cut short. Captions:
against known ids and open_clip's tokenizer; against transformers' in test_clip_formats.py."""

import html
import pickle
import time

import ftfy
import numpy as np
import pytest
import regex
import torch
from PIL import Image
from torchvision import transforms as T

import clip
from clip.preprocess import MEAN, STD
from clip.tokenizer import clean_text
from utils.reading.images import Images

SIZE = 32


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
def test_16_bit_grey_is_scaled_not_clipped(mode, tmp_path):
    grey = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0)
    wide = (grey.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")  # 0..65535
    image = Image.frombytes(mode, (64, 64), wide.tobytes())
    expected = clip.Preprocess(SIZE).crop(Image.fromarray(grey))
    np.testing.assert_array_equal(clip.Preprocess(SIZE).crop(image), expected)
    np.testing.assert_array_equal(read(tmp_path, image, "x.tiff"), expected)


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


# ---- captions ------------------------------------------------------------------------------------

TEXTS = [
    "a photo of a cat", "A man's dog didn't run; they'll've I'd we're I'm 'TIS", "", "   ",
    "Crème brûlée, naïve façade, ÀÉÎÕÜ Straße İstanbul, cafe\u0301", "tabs\tand\nnew lines\r\n  x ",
    "Tom &amp; Jerry &lt;3 &amp;amp; &eacute;t&eacute; &#39;quoted&#39;", "x < y &amp;amp; z",
    "emoji 😀👩‍👩‍👧 ❤️ 🇫🇷 flags", "一只猫坐在垫子上。日本語のテキスト 한국어",
    "numbers 1234567890 3.14 1,000 ½ ² Ⅳ", "a" * 60,
    "punctuation!!! ... ??? --- ((())) [x] {y} <z> a_b #tag @user $5 100%",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "“curly quotes” ‘single’ – en — em … ellipsis ﬁ ligature", "schÃ¶n mis-decoded â€œtextâ€",
    "кошка на ковре, γάτα, قطة", "zero\u200bwidth \u00a0nbsp \ufeffbom",
    "\x1b[31mred\x1b[0m control\x07s", "photograph bicycles zxqj mississippi banana woman's",
]


def ids(text):
    return clip.SimpleTokenizer().encode(text)


def test_known_ids():
    known = {"a photo of a cat": [320, 1125, 539, 320, 2368], "a diagram": [320, 22697],
             "a dog": [320, 1929], "hello world!": [3306, 1002, 256]}
    for text, expected in known.items():
        row = clip.tokenize(text)[0].tolist()
        assert row[: len(expected) + 2] == [49406, *expected, 49407]
        assert row[len(expected) + 2 :] == [0] * (75 - len(expected))


def test_against_open_clip():
    """It cleans texts of entities and broken Unicode, too."""
    theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
    assert list(clip.SimpleTokenizer().encoder)[:-2] == list(theirs.encoder)[:-2]
    for text in TEXTS:
        assert ids(text) == theirs.encode(text), text
    assert ids("Tom &amp;amp; Jerry") == ids("tom & jerry") == ids("TOM  &amp;\n JERRY ")
    assert ids("schÃ¶n") == ids("schön") and ids("a <|endoftext|> b") == [320, 49407, *ids("b")]


def test_the_shortcut_for_ascii_changes_nothing():
    for text in [*TEXTS, "".join(map(chr, range(32, 127))), "x < y > z", "'' `` \"\"", "it\\'s"]:
        slow = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean_text(text) == regex.sub(r"\s+", " ", slow.strip()).strip().lower()


def test_too_long():
    fits, over = "dog " * 75, "dog " * 76
    assert clip.tokenize(fits)[0].tolist() == [49406, *[1929] * 75, 49407]
    with pytest.raises(RuntimeError, match="78 tokens.*77.*dog dog"):
        clip.tokenize(["a cat", over])
    cut = clip.tokenize(["a cat", over], truncate=True)
    assert cut[1].tolist() == [49406, *[1929] * 75, 49407]
    assert torch.equal(cut[:1], clip.tokenize("a cat"))


def test_texts_and_lengths():
    tokens, lengths = clip.tokenize_with_lengths(["", "a cat", "a photo of a cat"], 5)
    assert lengths.tolist() == [2, 4, 7] and lengths.dtype == torch.int64
    assert tokens.dtype == torch.int32 and tokens.tolist() == [
        [49406, 49407, 0, 0, 0], [49406, 320, 2368, 49407, 0], [49406, 320, 1125, 539, 49407]]
    assert clip.tokenize([]).shape == (0, 77) and clip.tokenize([]).dtype == torch.int32
    for texts in (("a cat",), iter(["a cat"])):
        assert torch.equal(clip.tokenize(texts), clip.tokenize("a cat"))
    for texts in ([1, 2], [b"bytes"]):
        with pytest.raises(TypeError, match="str"):
            clip.tokenize(texts)
    with pytest.raises(ValueError, match="context_length"):
        clip.tokenize("a cat", context_length=1)
