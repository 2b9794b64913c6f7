"""Draw a synthetic image-caption set, in the layout of Flickr30K, for the demo and the tests.

Each image shows two shapes, one beside or above the other, on a patterned background; each of its
five captions is true of it. The source domain is for pre-training a small CLIP, and the target
domain, with other colours and other words, is for fine-tuning it:

    python dataset/make_scenes.py --out scenes/source --domain source --train 6000
    python dataset/make_scenes.py --out scenes/target --domain target
"""

import sys

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from utils.errors import InputError, command  # isort: skip

import math
import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from params import Parser, path, positive_int
from utils.reading.layout import split_folder, write_lines, write_split


class Domain(NamedTuple):
    """What sets one domain apart from the other: these values are the gap between the two."""

    templates: tuple[str, ...]  # five or more; each caption of an image uses another one
    stripe_axis: int  # the direction in which the stripes alternate: 0 is down, 1 is across
    wash: float = 0.0  # how far each colour moves to TINT: 0 is saturated, 1 is TINT itself
    noise: float = 0.0  # standard deviation of the pixel noise, where white is 255
    synonym: float = 0.0  # chance that a word gives way to its synonym, where it has one
    swap: float = 0.0  # chance that a caption starts from the second object
    omit_size: float = 0.0  # chance that a caption leaves out the size of an object
    omit_color: float = 0.0  # chance that a caption leaves out the colour of an object


DOMAINS = {
    "source": Domain(
        templates=(
            "{first} {relation} {second} on a {background} background",
            "on a {background} background there is {first} {relation} {second}",
            "{first} is {relation} {second} and the background is {background}",
            "an image of {first} {relation} {second} on a {background} background",
            "the background is {background} and {first} is {relation} {second}",
            "a {background} background with {first} {relation} {second}",
        ), stripe_axis=0),
    "target": Domain(
        templates=(
            "we can see {first} {relation} {second} over a {background} backdrop",
            "{first} sits {relation} {second} in front of a {background} wall",
            "this {background} picture shows {first} placed {relation} {second}",
            "somebody drew {first} {relation} {second} across a {background} page",
            "behind is a {background} surface where {first} lies {relation} {second}",
        ), stripe_axis=1, wash=0.25, noise=12.0, synonym=0.4, swap=0.5, omit_size=0.3,
        omit_color=0.15),
}
TINT = (235, 205, 170)  # the warm colour to which a washed-out palette fades
SYNONYMS = {
    "circle": "disc", "square": "box", "diamond": "rhombus", "cross": "plus", "ring": "hoop",
    "purple": "violet", "pink": "rose", "cyan": "turquoise", "small": "tiny", "large": "huge",
    "striped": "lined", "dotted": "spotted",
}

COLORS = {
    "red": (225, 25, 25), "green": (30, 170, 40), "blue": (30, 60, 235), "yellow": (250, 230, 30),
    "purple": (145, 30, 190), "orange": (255, 135, 0), "cyan": (40, 225, 240),
    "pink": (255, 140, 195), "brown": (125, 70, 25), "white": (255, 255, 255),
}
BACKGROUNDS = {  # the ground, and the shade of the pattern on it
    "gray": ((120, 120, 120), (165, 165, 165)), "beige": ((225, 205, 165), (190, 165, 120)),
    "navy": ((10, 15, 80), (55, 65, 135)), "olive": ((105, 110, 25), (145, 150, 70)),
    "teal": ((0, 105, 110), (60, 150, 155)), "maroon": ((90, 5, 30), (140, 55, 75)),
}
CONTRAST = 75  # least RGB distance from an object's colour to both shades of its background
PATTERNS = ("plain", "striped", "dotted", "checkered")
RELATIONS = {  # the words, the opposite, the axis (0 is across), the side of the first object
    "left": ("to the left of", "right", 0, -1),
    "right": ("to the right of", "left", 0, 1),
    "above": ("above", "below", 1, -1),
    "below": ("below", "above", 1, 1),
}

PIXELS = 32  # the side of an image
SCALE = 3  # it is drawn this much larger, then averaged down
CANVAS = PIXELS * SCALE
RADII = {"small": 12, "large": 21}  # on the canvas; an object keeps to its half of the canvas
JITTER = 6  # an object lies at most this far from its place on the canvas, along each axis
CAPTIONS = 5  # per image
MOST = 100_000  # images in a set; there are nearly a million distinct scenes


def _arc(count, *radii):
    """`count` points round the origin, clockwise from the top, which take turns with `radii`."""
    turns = [(2 * math.pi * i / count, radii[i % len(radii)]) for i in range(count)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in turns]


_BAR = 0.33  # half the breadth of a cross's bars
SHAPES = {  # outlines within the square from -1 to 1
    "circle": _arc(36, 1),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "star": _arc(10, 1, 0.42),
    "cross": [
        (-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR),
        (_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR),
    ],
    "ring": [*_arc(36, 1), (0, -1), (0, -0.55), *reversed(_arc(36, 0.55))],
    "hexagon": [(y, x) for x, y in _arc(6, 1)],
}


class Thing(NamedTuple):
    """One object: keys of `SHAPES`, `COLORS` and `RADII`."""

    shape: str
    color: str
    size: str


class Scene(NamedTuple):
    """What an image shows: `first` is `relation` (a key of `RELATIONS`) `second`."""

    first: Thing
    second: Thing
    relation: str
    background: str
    pattern: str

    def swapped(self):
        """The same scene, told from its second object."""
        opposite = RELATIONS[self.relation][1]
        return self._replace(first=self.second, second=self.first, relation=opposite)


@cache
def visible_colors(background):
    """The colours that stand out from both shades of `background`."""
    return [name for name, color in COLORS.items()
            if min(math.dist(color, shade) for shade in BACKGROUNDS[background]) >= CONTRAST]


def sample_scenes(count, rng):
    """`count` distinct scenes: no two of them show the same, also when told the other way round."""
    scenes, seen = [], set()
    while len(scenes) < count:
        background = rng.choice(list(BACKGROUNDS))
        shapes = rng.sample(list(SHAPES), 2)
        colors = rng.sample(visible_colors(background), 2)
        sizes = rng.choices(list(RADII), k=2)
        first, second = map(Thing, shapes, colors, sizes)
        relation, pattern = rng.choice(list(RELATIONS)), rng.choice(PATTERNS)
        scene = Scene(first, second, relation, background, pattern)
        if scene not in seen:
            seen |= {scene, scene.swapped()}
            scenes.append(scene)
    return scenes


def washed(color, wash):
    """`color`, moved to `TINT` by the fraction `wash`; RGB from 0 to 255."""
    return tuple(round(c + wash * (t - c)) for c, t in zip(color, TINT, strict=True))


@cache
def _pattern_mask(pattern, stripe_axis):
    """Where the second shade of a background goes: 255 there, else 0; "L", on the canvas."""
    y, x = grid = np.indices((CANVAS, CANVAS))
    mask = {"plain": np.zeros_like(x), "striped": grid[stripe_axis] // 9 % 2,
            "dotted": np.hypot(x % 16 - 7.5, y % 16 - 7.5) < 5,
            "checkered": (x // 16 + y // 16) % 2}[pattern]
    return Image.fromarray(mask.astype(np.uint8) * 255)


def paint(scene, domain, rng):
    """The image of `scene`, RGB, `PIXELS` x `PIXELS`; `rng` sets the exact places and the noise."""
    ground, shade = (washed(color, domain.wash) for color in BACKGROUNDS[scene.background])
    image = Image.new("RGB", (CANVAS, CANVAS), ground)
    image.paste(shade, mask=_pattern_mask(scene.pattern, domain.stripe_axis))
    pen = ImageDraw.Draw(image)
    _, _, axis, first_side = RELATIONS[scene.relation]
    for thing, side in ((scene.first, first_side), (scene.second, -first_side)):
        radius = RADII[thing.size]
        room = min(JITTER, CANVAS // 4 - radius - 1)  # so that it stays in its half
        center = [CANVAS // 2 + rng.randint(-JITTER, JITTER)] * 2
        center[axis] = CANVAS // 2 + side * CANVAS // 4 + rng.randint(-room, room)
        outline = [(center[0] + radius * x, center[1] + radius * y) for x, y in SHAPES[thing.shape]]
        pen.polygon(outline, fill=washed(COLORS[thing.color], domain.wash))
    pixels = np.asarray(image.reduce(SCALE), dtype=float)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, domain.noise, pixels.shape)
    return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


def describe(scene, domain, rng):
    """`CAPTIONS` captions of `scene`, all different, in the words of `domain`."""

    def say(word):
        return SYNONYMS.get(word, word) if rng.random() < domain.synonym else word

    def name(thing):
        words = [say(thing.shape)]
        if rng.random() >= domain.omit_color:
            words.insert(0, say(thing.color))
        if rng.random() >= domain.omit_size:
            words.insert(0, say(thing.size))
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    captions = []
    for template in rng.sample(domain.templates, CAPTIONS):
        told = scene.swapped() if rng.random() < domain.swap else scene
        captions.append(template.format(
            first=name(told.first), relation=RELATIONS[told.relation][0], second=name(told.second),
            background=f"{say(told.pattern)} {told.background}"))
    return captions


def make_scenes(out, domain, train, dev, test, seed):
    """Draw a set of `train` + `dev` + `test` distinct scenes into the folder `out`.

    Writes `images/*.png` and `annotations/scan_split/`, over those of an earlier call. The ids of
    the three splits interleave. The same arguments give the same files, bit for bit.

    domain: a key of `DOMAINS`. train, dev, test: images in each split, `MOST` in all at most.
    seed: any integer; the two domains draw different scenes from the same seed. Raises InputError
    when there are more than `MOST` or `out` is not writable.
    """
    out, counts = Path(out), {"train": train, "dev": dev, "test": test}
    total = sum(counts.values())
    if total > MOST:
        raise InputError(f"--train, --dev and --test ask for {total} images: {MOST} at most")

    rng = random.Random(f"{domain} {seed}")
    names = [f"{i:06d}.png" for i in range(total)]
    write_lines(split_folder(out) / "image_name.txt", names)
    (out / "images").mkdir(exist_ok=True)
    captions = []
    for name, scene in zip(names, sample_scenes(total, rng), strict=True):
        paint(scene, DOMAINS[domain], rng).save(out / "images" / name)
        captions.append(describe(scene, DOMAINS[domain], rng))

    shuffled = iter(rng.sample(range(total), total))
    for split, count in counts.items():
        ids = sorted(next(shuffled) for _ in range(count))
        write_split(split_folder(out), split, ids, [captions[i] for i in ids])


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=path, metavar="DIR", required=True, help="folder of the set")
    add("--domain", choices=DOMAINS, default="target", help="which palette and which words")
    for split, count, use in (("train", 400, "training"), ("dev", 100, "validation"),
                              ("test", 300, "testing")):
        add(f"--{split}", metavar="N", type=positive_int, default=count, help=f"images for {use}")
    add("--seed", metavar="S", type=int, default=0, help="the same seed gives the same files")
    args = parser.parse_args(argv)
    make_scenes(**vars(args))
    print(f"{args.out}: {args.train} train, {args.dev} dev and {args.test} test images of the "
          f"{args.domain} domain, {CAPTIONS} captions each")


if __name__ == "__main__":
    main()
