"""Measures how long the published run takes, by its parts: five epochs of MSCOCO's size.

    python benchmarks/epoch.py [--measured 8192] [--json FILE] [main_NPC.py's options]

Random crops and captions of MSCOCO's lengths train for two real epochs, with checkpoints, dev
scores and a bank that is really built. They are as many as MSCOCO's, or as many as --measured says;
the seconds of what grows with their number are then multiplied. Nothing is read from disk.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench
from benchmarks.bench import CAPTIONS
from benchmarks.driver import table
from main_NPC import NPC
from params import parse_args
from utils.errors import command
from utils.method.batches import training_loader
from utils.method.building import bank_of
from utils.method.judge import judge_pairs
from utils.training.loop import fit
from utils.training.run import Run

EPOCHS, NOISE = 5, 0.2  # of the published run, and its lowest noise
FEATURES, ENTRIES = "bank: features and judge", "bank: entries"
BETWEEN = "between epochs: checkpoint, dev scores"


def two_epochs(args, run, num_images, num_dev):
    """{part: seconds} of two epochs on so many made-up images, and how many steps it has."""
    seconds, rng = {}, np.random.default_rng(args.seed)
    model = run.precision.prepare(bench.new_model(args))
    resolution = model.visual.input_resolution
    pairs = bench.make_pairs(num_images, resolution, rng, args.device)
    dev = bench.make_pairs(num_dev, resolution, rng, args.device)

    def timed(name, function):
        start = time.perf_counter()
        found = function()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return found

    verdict, features = timed(FEATURES, lambda: judge_pairs(
        model, pairs, args, run.precision, lambda _: None))
    # which pairs are clean is made up, as random weights know nothing
    verdict = verdict._replace(clean=rng.random(len(pairs)) < 0.8 * (1 - NOISE))
    timed(ENTRIES, lambda: bank_of(verdict, *features, pairs, args))
    bank = bench.make_bank(pairs, NOISE, rng)
    npc, loader = NPC(model, run, bank), training_loader(args, pairs, bank)
    begun = []  # when each step did; on a GPU none does before the last but one is computed
    memory = loader.dataset.memory  # of each batch asked for once
    loader.dataset.memory = lambda indices: begun.append(time.perf_counter()) or memory(indices)
    start = time.perf_counter()
    fit(run, model, dev, npc.optimizers, loader, npc.step)
    end, n = time.perf_counter(), len(loader)
    step = (begun[-1] - begun[n]) / (n - 1)  # in the second epoch, when most shapes have been met
    seconds |= {"before the first step: dev scores": begun[0] - start, "steps": step * n,
                "meeting shapes for the first time": begun[n - 1] - begun[0] - step * (n - 1),
                BETWEEN: begun[n] - begun[n - 1] - step,
                "after the last epoch: the same": end - begun[-1] - step}
    return seconds, len(loader)


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=113_287, help="training images; MSCOCO's")
    parser.add_argument("--measured", type=int, help="how many of these are used; default: all")
    parser.add_argument("--num_dev", type=int, default=5000, help="dev images")
    parser.add_argument("--json", help="write the results to this file")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        bench.make_empty_set(folder)
        args = parse_args("npc", ["--dataset_root", folder, "--vision_model", "ViT-B/32", *words,
                                  "--epochs", "2", "--checkpoint_path", folder])
        run = Run(args, folder=True)
        measured = options.measured or options.num_images
        seconds, steps = two_epochs(args, run, measured, options.num_dev)
    captions, scale = CAPTIONS * options.num_images, options.num_images / measured
    factors = {"steps": EPOCHS * scale, BETWEEN: EPOCHS - 1, FEATURES: scale, ENTRIES: scale**2}
    total = sum(value * factors.get(name, 1) for name, value in seconds.items())
    rows = [[name, f"{value:.3f}", f"{factors.get(name, 1):.1f}",
             f"{value * factors.get(name, 1):.1f}"] for name, value in seconds.items()]
    head = [f"{measured:,} images", "s", "times", f"s of {EPOCHS} epochs"]
    print(f"\n### {options.num_images:,} images, {captions:,} captions, batch {args.batch_size}, "
          f"{args.vision_model}, {args.precision}, {bench.machine(args.device)}\n\n"
          f"{table(head, [*rows, ['all', '', '', f'{total:.1f}']])}\n\n"
          f"A step takes {seconds['steps'] / steps * 1000:.1f} ms, "
          f"{args.batch_size * steps / seconds['steps']:.0f} pairs/s; {EPOCHS} epochs take "
          f"{total / 60:.1f} minutes.")
    if options.json:
        Path(options.json).write_text(json.dumps({**seconds, "total": total}, indent=1))


if __name__ == "__main__":
    main()
