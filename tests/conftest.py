"""Small data sets in the three layouts of the released data, made on the fly."""

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from clip.preprocess import MEAN, STD
from params import parse_args
from utils.method.pairs import Pairs

torch.set_num_threads(1)
settings.register_profile("any machine, however busy", deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("any machine, however busy")

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 220),
           "yellow": (230, 220, 40), "white": (250, 250, 250), "brown": (120, 80, 40)}
PLACES = ("left", "right", "top", "bottom")
TEMPLATES = ("a {c} bar at the {p}", "the {p} of the picture is {c}", "{c} paint, {p} side",
             "something {c} ({p})", "grey, but {c} at the {p}: café")
NUM_IMAGES = {"train": 12, "dev": 4, "test": 6}
NUM_ANNS = {"coco": 5, "f30k": 5, "cc": 1}
ROOT = Path(__file__).resolve().parents[1]
CACHES = re.compile(r"/(__pycache__|\.pytest_cache|pytest-cache-files|\.hypothesis)\b")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def keep_checkout(event, arguments):
    """Audit hook of all processes of the tests that lets none of them write into the checkout,
    where users have files of their own."""
    if event == "os.mkdir" or event == "open" and arguments[2] and arguments[2] & WRITES:
        path = os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else os.devnull
        if not CACHES.search(path) and os.path.realpath(path).startswith(f"{ROOT}/"):
            raise PermissionError(f"a test writes {path} into the checkout")


sys.addaudithook(keep_checkout)


def image_ids(layout):
    """Ids of the images by split. They do not start from 0, and those of the splits interleave."""
    numbers = np.random.default_rng(5).permutation(np.arange(3, 40)).tolist()
    spell = {"coco": "{}", "f30k": "{}", "cc": "x{}-b"}[layout].format
    return {split: [spell(numbers.pop()) for _ in range(n)] for split, n in NUM_IMAGES.items()}


def file_name(layout, image_id):
    """Where the image of an id lies below images/."""
    if layout == "cc":
        return f"{image_id}.jpg"
    number = int(image_id)
    if layout == "coco":
        return "COCO_2014_" + str(number).zfill(12) + ".jpg"
    return f"{number * 7}_{number:x}.{'png' if number % 4 == 0 else 'jpg'}"


def draw(path, colour, place, shade):
    """A grey picture of 40 x 36 with a coloured bar at one of its sides."""
    picture = np.full((36, 40, 3), shade, np.uint8)
    side = {"left": np.s_[:, :12], "right": np.s_[:, -12:], "top": np.s_[:12],
            "bottom": np.s_[-12:]}[place]
    picture[side] = COLOURS[colour]
    Image.fromarray(picture).save(path)


def make_dataset(root, layout):
    """Write a valid data set to the folder `root`; returns what is in it and the options that
    select it."""
    root, ids, captions = Path(root), image_ids(layout), {}
    split_folder = root / "annotations" / "scan_split"
    split_folder.mkdir(parents=True)
    (root / "images").mkdir()
    num_anns = NUM_ANNS[layout]
    for split in ids:
        captions[split] = []
        for k, image_id in enumerate(ids[split]):
            colour, place = list(COLOURS)[k % 6], PLACES[(k // 6 + k) % 4]
            draw(root / "images" / file_name(layout, image_id), colour, place, 80 + 10 * len(split))
            captions[split] += [TEMPLATES[(a + k) % 5].format(c=colour, p=place)
                                for a in range(num_anns)]
        repeat = 1 if split == "train" else num_anns
        lines = [i for i in ids[split] for _ in range(repeat)]
        write_lines(split_folder / f"{split}_ids.txt", lines)
        write_lines(split_folder / f"{split}_caps.txt", captions[split])
    if layout == "f30k":
        write_lines(split_folder / "image_name.txt", [file_name(layout, str(i)) for i in range(45)])
    return describe(root, layout)


def describe(root, layout):
    """A data set that `make_dataset` has written, or a copy of one."""
    split_folder = Path(root) / "annotations" / "scan_split"
    return SimpleNamespace(
        root=Path(root), layout=layout, num_anns=NUM_ANNS[layout], ids=image_ids(layout),
        split_folder=split_folder,
        name=lambda image_id: file_name(layout, image_id),
        lines=lambda file: (split_folder / file).read_text(encoding="utf-8").splitlines(),
        options=["--dataset", layout, "--dataset_root", str(root)])


def write_lines(path, lines):
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def tree(folder):
    """Relative paths of all files below `folder`."""
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if not p.is_dir()}


def banks(root):
    """{name: path} of the memory banks below a data set, by their names without model, kind of
    noise, seed and hash."""
    found = {}
    for path in sorted(Path(root).glob("annotations/*/*_mbank_*.npz")):
        name = re.sub(r"(_random|_similar)?_seed\d+_[0-9a-f]{8}\.npz$", "", path.name)
        assert name != path.name
        found[re.sub(r"_mbank_(?!features)[^_]+", "_mbank", name)] = path
    return found


def options(dataset, *more, command="npc"):
    """The namespace of options of a command on a data set: small batches, no worker processes."""
    return parse_args(command, [*dataset.options, "--num_workers", "0", "--device", "cpu",
                                "--batch_size", "4", *map(str, more)])


def parsed(command="npc", **values):
    """The namespace of options of a command, which are given as keywords; None: as by default."""
    words = []
    for name, value in values.items():
        if value is True:
            words += [f"--{name}"]
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return parse_args(command, words)


# ---- features without a model -------------------------------------------------------------------


class Lookup:
    """A model whose features are given: image k is a picture of value k, caption k has token k+1.
    It counts what it encodes."""

    dtype, config = torch.float64, {"activation": "quick_gelu"}
    image_mean, image_std = MEAN, STD

    def __init__(self, images, texts, scale=1.0):
        self.images, self.texts = images, texts
        self.logit_scale = torch.tensor(scale, dtype=torch.float64)
        self.encoded = {"images": 0, "texts": 0}

    def eval(self):
        return self

    def state_dict(self):
        return {"images": self.images, "texts": self.texts}

    def encode_image(self, pictures):
        self.encoded["images"] += len(pictures)
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (MEAN, STD))
        values = (pictures[:, :, 0, 0] * std + mean) * 255
        return self.images[values.mean(dim=1).round().long()]

    def encode_text(self, tokens):
        self.encoded["texts"] += len(tokens)
        return self.texts[tokens[:, 1].long() - 1]


class Watched:
    """Features that know how many of their rows were taken at a time."""

    def __init__(self, features):
        self.features, self.most = features, 0
        self.dtype, self.device, self.shape = features.dtype, features.device, features.shape

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        rows = self.features[index]
        self.most = max(self.most, len(rows))
        return rows


def pairs_for(image_of, text_of):
    n = max(image_of) + 1
    tokens = torch.tensor([[49406, k + 1, 49407, 0] for k in range(max(text_of) + 1)])
    pictures = [torch.full((3, 2, 2), k, dtype=torch.uint8) for k in range(n)]
    captions = [f"caption {k}" for k in text_of]
    return Pairs(pictures, [str(k) for k in range(n)], np.array(image_of), captions,
                 np.array(text_of), tokens.int(), Path("0.4_noise_train_caps.txt"))


# ---- fixtures -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """The data set of each layout, shared by all tests: not to be changed."""
    return {layout: make_dataset(tmp_path_factory.mktemp(layout), layout) for layout in NUM_ANNS}


@pytest.fixture
def dataset(datasets, tmp_path):
    """Function: a fresh copy, which a test may change, of a layout's data set."""

    def copy(layout="f30k"):
        root = tmp_path / f"data_{layout}"
        shutil.copytree(datasets[layout].root, root)
        return describe(root, layout)

    return copy


@pytest.fixture
def refusal(capsys):
    """Function: run a command, by its `main`, that must refuse its options or files; returns the
    one line with which it does."""

    def run(main, argv):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return run
