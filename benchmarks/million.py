"""Judging from features: how long find_noise.py and get_memorybank.py take, and how much
memory.

    python benchmarks/million.py [--num_pairs 1000000] [get_memorybank.py's options]

A data set of made-up pairs, five captions an image, and a folder of half-precision features, as
`--judge_features` takes them, are made in the temporary folder: 1.5 GB for a million pairs.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import CAPTIONS, machine
from data import training_pairs
from params import parse_args
from utils.errors import InputError, command
from utils.method.features import write_items
from utils.method.pairs import first_pairs
from utils.reading.layout import split_folder, write_lines, write_split


def make_features(root, n, ratio, seed):
    """Make a data set of n pairs, whose images are one and the same file, and its features in the
    folder items: images of 5,000 kinds, captions like their image. Returns the bytes of both."""
    if n % CAPTIONS:
        raise InputError(f"--num_pairs {n} is no multiple of {CAPTIONS}; give one that is")
    num_images, rng = n // CAPTIONS, np.random.default_rng(seed)
    captions = [f"a photo of something, numbered {i}, beside another thing" for i in range(n)]
    write_split(split_folder(root), "train", range(num_images),
                [captions[k : k + CAPTIONS] for k in range(0, n, CAPTIONS)])
    write_lines(split_folder(root) / "image_name.txt", ["0.jpg"] * num_images)
    (root / "images").mkdir()
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(root / "images/0.jpg")
    args = parse_args("memorybank", ["--dataset_root", str(root), *ratio, "--seed", str(seed)])
    pairs = training_pairs(args, None)
    write_items(pairs, root / "items")
    image_of = np.array([int(pairs.captions[i].split()[5].strip(",")) // CAPTIONS
                         for i in first_pairs(pairs.text_of)])
    kinds = rng.standard_normal((5000, 512), np.float32)
    arrays = [np.lib.format.open_memmap(root / "items" / f"{name}.npy", "w+", np.float16, shape)
              for name, shape in (("images", (num_images, 512)), ("texts", (n, 512)))]
    for rows in np.array_split(np.arange(num_images), -(-num_images // 2**14)):
        kind = kinds[rng.integers(0, len(kinds), len(rows))]
        arrays[0][rows] = kind + rng.standard_normal(kind.shape, np.float32)
    for rows in np.array_split(np.arange(n), -(-n // 2**14)):
        noise = rng.standard_normal((len(rows), 512), np.float32)
        arrays[1][rows] = 0.4 * arrays[0][image_of[rows]].astype(np.float32) + noise
    for array in arrays:
        array.flush()
    return sum(array.nbytes for array in arrays)


def watch(command, path):
    """(seconds, seconds of all its threads, peaks in MB (own memory, pages of files, both)) of a
    command that writes to the file `path`. Raises InputError when it fails."""
    start, before, seen = time.perf_counter(), os.times(), [(0, 0, 0)]
    with open(path, "w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            size = dict(re.findall(r"Rss(Anon|File):\s+(\d+) kB", status))
            own, files = (int(size.get(kind, 0)) * 1024 / 1e6 for kind in ("Anon", "File"))
            seen.append((own, files, own + files))
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        out.seek(0)
        said = out.read()
    if process.returncode:
        raise InputError(f"{command[1]} failed: {said.strip().splitlines()[-1]}")
    after = os.times()
    cpu = sum(getattr(after, of) - getattr(before, of)
              for of in ("children_user", "children_system"))
    return seconds, cpu, np.max(seen, axis=0).tolist()


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_pairs", type=int, default=1_000_000, help="pairs to make")
    parser.add_argument("--noise", type=float, default=0.2, help="share of wrong ones")
    options, words = parser.parse_known_args()
    args = parse_args("memorybank", words)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        ratio = ["--noise_ratio", str(options.noise)]
        size = make_features(root, options.num_pairs, ratio, args.seed)
        print(f"### {options.num_pairs:,} pairs, {options.noise:.0%} noise, {size / 1e6:.0f} MB of "
              f"features; {' '.join(words)}; {machine(args.device)}\n\n"
              "| | s | CPU s | peak MB: own, of files, together |\n|---|--:|--:|--:|", flush=True)
        words += ["--dataset_root", place, *ratio, "--judge_features", str(root / "items")]
        for name, more in (("find_noise.py", ["--out", str(root / "out")]),
                           ("get_memorybank.py", [])):
            seconds, cpu, peaks = watch([sys.executable, name, *words, *more], root / "said.txt")
            print(f"| {name} | {seconds:.0f} | {cpu:.0f} | "
                  f"{', '.join(f'{peak:.0f}' for peak in peaks)} |", flush=True)


if __name__ == "__main__":
    main()
