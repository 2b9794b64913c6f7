"""The synthetic scenes: captions are true, images show them, files follow the layout."""

import random
import re
from itertools import product

import numpy as np
import pytest
from PIL import Image

from dataset import make_scenes as ms

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


@pytest.mark.parametrize("domain", ms.DOMAINS)
def test_captions_are_true_and_differ(domain):
    """Those of the source are complete and in order; those of the target leave words out."""
    rng, gaps = random.Random(0), []
    for scene in ms.sample_scenes(300, rng):
        captions = ms.describe(scene, ms.DOMAINS[domain], rng)
        assert len(captions) == len(set(captions)) == ms.CAPTIONS
        for caption in captions:
            said = parse(caption)
            assert agree(said, scene) or agree(said, scene.swapped()), (caption, scene)
            assert domain == "target" or said == scene
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
            gaps.append(None in said.first or None in said.second)
    assert domain == "source" or 0.1 < np.mean(gaps) < 0.9


def test_scenes_differ_and_their_colors_stand_out():
    scenes = ms.sample_scenes(20_000, random.Random(0))
    assert len({min(scene, scene.swapped()) for scene in scenes}) == len(scenes)
    assert all(len(ms.visible_colors(background)) >= 5 for background in ms.BACKGROUNDS)
    for scene in scenes[:500]:
        assert scene.first.color != scene.second.color
        assert scene.first.shape != scene.second.shape
        for thing, shade in product(scene[:2], ms.BACKGROUNDS[scene.background]):
            gap = np.subtract(ms.COLORS[thing.color], shade)
            assert np.linalg.norm(gap) >= ms.CONTRAST


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
    for seed in (4, 3):
        ms.make_scenes(tmp_path, domain, **COUNTS, seed=seed)
        contents = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}
                    for folder in (tmp_path, root)]
        assert (contents[0] == contents[1]) == (seed == 3)


@pytest.mark.parametrize("option, value", [("--domain", "photo"), ("--dev", "0"),
                                           ("--train", str(ms.MOST)), ("--seed", "1" * 5000),
                                           ("--out", "file")])
def test_bad_arguments(tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        ms.main(["--out", "set", option, value])
    error = capsys.readouterr().err
    assert (option if option != "--out" else "cannot write") in error and error.count("\n") == 1
    assert stop.value.code == 2 and not (tmp_path / "set").exists()
    assert (tmp_path / "file").read_text() == "kept"
