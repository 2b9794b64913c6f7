"""The synthetic scenes: captions are true, images show them, files follow the layout."""

import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import make_scenes as ms
from utils.errors import InputError

PLAIN_WORD = {synonym: word for word, synonym in ms.SYNONYMS.items()}
COUNTS = {"train": 12, "dev": 6, "test": 6}
PER_CAPTION = {"train": 1, "dev": ms.CAPTIONS, "test": ms.CAPTIONS}  # lines of an id


def parse(caption):
    """A scene from a caption; None for what it leaves out."""
    things, said = [], {}
    kinds = (ms.SHAPES, ms.COLORS, ms.RADII, ms.RELATIONS, ms.BACKGROUNDS, ms.PATTERNS)
    names = ("shape", "color", "size", "relation", "background", "pattern")
    for word in caption.split():
        word = PLAIN_WORD.get(word, word)
        said |= {name: word for name, kind in zip(names, kinds, strict=True) if word in kind}
        if word in ms.SHAPES:
            things.append(ms.Thing(*(said.pop(name, None) for name in names[:3])))
    return ms.Scene(*things, **said)


def agree(said, scene):
    """Whether a parsed caption says nothing but what holds of a scene told in the same order."""
    pairs = zip((*said.first, *said.second), (*scene.first, *scene.second), strict=True)
    return said[2:] == scene[2:] and all(word in (None, truth) for word, truth in pairs)


def read_set(root):
    """{split: (ids, captions)} and the names, as lines of the files."""
    folder = root / "annotations" / "scan_split"

    def lines(name):
        return (folder / name).read_text().splitlines()

    splits = {s: (lines(f"{s}_ids.txt"), lines(f"{s}_caps.txt")) for s in COUNTS}
    return splits, lines("image_name.txt")


@pytest.fixture(scope="module", params=ms.DOMAINS)
def drawn(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    ms.make_scenes(root, request.param, **COUNTS, seed=3)
    return request.param, root


@pytest.mark.parametrize("domain", ms.DOMAINS.values(), ids=ms.DOMAINS)
def test_captions_are_true_and_differ(domain):
    rng = random.Random(0)
    for scene in ms.sample_scenes(300, rng):
        captions = ms.describe(scene, domain, rng)
        assert len(captions) == len(set(captions)) == ms.CAPTIONS
        for caption in captions:
            said = parse(caption)
            assert agree(said, scene) or agree(said, scene.swapped()), (caption, scene)


def test_source_captions_are_complete_and_target_ones_vary():
    rng = random.Random(1)
    scenes = ms.sample_scenes(200, rng)
    told = {
        name: [parse(c) for s in scenes for c in ms.describe(s, domain, rng)]
        for name, domain in ms.DOMAINS.items()
    }
    assert told["source"] == [scene for scene in scenes for _ in range(ms.CAPTIONS)]
    gaps = [None in said.first or None in said.second for said in told["target"]]
    assert 0.1 < np.mean(gaps) < 0.9


def test_article_fits_the_word():
    scene = ms.Scene(
        ms.Thing("ring", "orange", "small"), ms.Thing("star", "red", "large"),
        "left", "teal", "plain",
    )
    domain = ms.DOMAINS["source"]._replace(omit_size=1.0)
    for caption in ms.describe(scene, domain, random.Random(0)):
        assert "an orange ring" in caption and "of a red star" in caption


def test_no_two_scenes_show_the_same():
    scenes = ms.sample_scenes(20_000, random.Random(0))
    assert len({min(scene, scene.swapped()) for scene in scenes}) == len(scenes)


def test_colors_stand_out_from_the_background():
    assert all(len(ms.visible_colors(background)) >= 5 for background in ms.BACKGROUNDS)
    for scene in ms.sample_scenes(500, random.Random(0)):
        assert scene.first.color != scene.second.color
        assert scene.first.shape != scene.second.shape
        for thing, shade in product(scene[:2], ms.BACKGROUNDS[scene.background]):
            gap = np.subtract(ms.COLORS[thing.color], shade)
            assert np.linalg.norm(gap) >= ms.CONTRAST


def test_shapes_fit_their_half():
    assert max(ms.RADII.values()) < ms.CANVAS // 4
    for outline in ms.SHAPES.values():
        assert np.abs(outline).max() <= 1
    half = ms.PIXELS // 2
    domain = ms.DOMAINS["source"]
    for i, relation in enumerate(["left", "right", "above", "below"] * 25):
        things = [ms.Thing(s, c, "large") for s, c in (("square", "red"), ("cross", "white"))]
        scene = ms.Scene(*things, relation, "navy", "plain")
        pixels = np.asarray(ms.paint(scene, domain, random.Random(i)))
        if relation in ("left", "right"):
            pixels = pixels.swapaxes(0, 1)
        halves = [pixels[:half], pixels[half:]]
        first, second = halves if relation in ("left", "above") else halves[::-1]
        assert not (first == ms.COLORS["white"]).all(-1).any()
        assert not (second == ms.COLORS["red"]).all(-1).any()


def test_images_show_what_captions_say(drawn):
    domain, root = drawn
    wash = ms.DOMAINS[domain].wash
    splits, names = read_set(root)
    palette = {name: ms.washed(color, wash) for name, color in ms.COLORS.items()}
    checked = 0
    for split, (ids, captions) in splits.items():
        ids = [i for i in ids for _ in range(ms.CAPTIONS // PER_CAPTION[split])]
        for image_id, caption in zip(ids, captions, strict=True):
            said = parse(caption)
            colors = said.first.color, said.second.color
            if None in colors:
                continue
            shades = [ms.washed(shade, wash) for shade in ms.BACKGROUNDS[said.background]]
            known = np.array([palette[colors[0]], palette[colors[1]], *shades])
            pixels = np.asarray(Image.open(root / "images" / names[int(image_id)]), float)
            nearest = np.linalg.norm(pixels[:, :, None] - known, axis=-1).argmin(-1)
            down, across = np.subtract(
                *(np.argwhere(nearest == k).mean(0) for k in (0, 1))
            )  # from the second object to the first
            far = {"left": -across, "right": across, "above": -down, "below": down}
            assert max(far, key=far.get) == said.relation, caption
            assert np.isin(nearest, (2, 3)).mean() > 0.4, caption
            checked += 1
    assert checked > 60


def test_layout(drawn):
    _, root = drawn
    splits, names = read_set(root)
    assert names == [f"{i:06d}.png" for i in range(sum(COUNTS.values()))]
    image_ids = {}
    for split, count in COUNTS.items():
        ids, captions = splits[split]
        image_ids[split] = list(dict.fromkeys(map(int, ids)))
        repeats = PER_CAPTION[split]
        assert list(map(int, ids)) == [i for i in image_ids[split] for _ in range(repeats)]
        assert len(image_ids[split]) == count and len(captions) == count * ms.CAPTIONS
    assert sorted(sum(image_ids.values(), [])) == list(range(len(names)))
    for split, ids in image_ids.items():
        assert max(ids) - min(ids) >= COUNTS[split], f"the ids of {split} do not interleave"
    for name in names:
        with Image.open(root / "images" / name) as image:
            assert (image.mode, image.size) == ("RGB", (ms.PIXELS, ms.PIXELS))


def test_same_seed_same_files(tmp_path, drawn):
    domain, root = drawn

    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    ms.make_scenes(tmp_path, domain, **COUNTS, seed=4)
    assert contents(tmp_path) != contents(root)
    ms.make_scenes(tmp_path, domain, **COUNTS, seed=3)
    assert contents(tmp_path) == contents(root)


@pytest.mark.parametrize("option, value", [("--domain", "photo"), ("--dev", "0"),
                                           ("--train", str(ms.MOST)), ("--seed", "1" * 5000)])
def test_bad_arguments(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        ms.main(["--out", str(tmp_path / "set"), option, value])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and option in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_out_is_a_file(tmp_path):
    (tmp_path / "set").write_text("kept")
    with pytest.raises(InputError, match="cannot write"):
        ms.make_scenes(tmp_path / "set", "source", 1, 1, 1, 0)
    assert (tmp_path / "set").read_text() == "kept"


def test_command_line(tmp_path):
    command = [sys.executable, str(Path(ms.__file__)), "--out", "set", "--domain", "source",
               "--train", "3", "--dev", "1", "--test", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "set: 3 train, 1 dev and 2 test images of the source domain, 5 captions each\n"
    )
    assert len(list((tmp_path / "set" / "images").iterdir())) == 6
