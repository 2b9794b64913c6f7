"""How long the published run takes, by its parts: MSCOCO's size, five epochs, nothing but its
pictures made up.

    python benchmarks/epoch.py [--num_images 113287] [--json FILE] [main_NPC.py's options]

Random crops and captions of MSCOCO's lengths train for one real epoch, with checkpoints, dev scores
and a bank that is really built. Reading is measured on a few pictures and multiplied.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clip
from bench import CAPTIONS, clock, make_bank, make_pairs, new_model, write_jpegs
from main_NPC import NPC
from params import parse_args
from utils.errors import command
from utils.method.batches import training_loader
from utils.method.building import bank_of
from utils.method.rounds import judge_pairs
from utils.reading.images import Images, ImagesInMemory
from utils.scoring.retrieval import evaluate
from utils.training.loop import fit
from utils.training.run import Run

EPOCHS, NOISE = 5, 0.2  # of the published run, and its lowest noise
WORDS = "a man riding a wave on top of a surfboard next to two dogs".split()


def read(args, num_images, num_captions, some):
    """Seconds that all images and captions would take, by decoding `some` JPEGs of 640 x 480 and
    tokenising so many captions."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_jpegs(Path(folder), some, args.seed)
        images = ImagesInMemory(Images(folder, names, clip.Preprocess(224)), args.device, args)
        pictures = clock(lambda: images.crops, args.device)
    rng = np.random.default_rng(args.seed)
    captions = [" ".join(rng.choice(WORDS, 10)) for _ in range(some)]
    words = clock(lambda: clip.tokenize(captions), args.device)
    return pictures * num_images / some, words * num_captions / some


def one_epoch(args, run, num_images, num_dev):
    """{part: seconds} of an epoch on so many made-up images, and how many steps it has."""
    seconds, rng = {}, np.random.default_rng(args.seed)
    model = run.precision.prepare(new_model(args))
    resolution = model.visual.input_resolution
    pairs = make_pairs(num_images, resolution, rng, args.device)
    dev = make_pairs(num_dev, resolution, rng, args.device)

    def timed(name, function):
        start = time.perf_counter()
        found = function()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return found

    verdict, features, _ = timed("bank: features and judge", lambda: judge_pairs(
        model, pairs, args, run.precision, lambda _: None))
    # which pairs are clean is made up, as random weights know nothing
    verdict = verdict._replace(clean=rng.random(len(pairs)) < 0.8 * (1 - NOISE))
    timed("bank: entries", lambda: bank_of(verdict, *features, pairs, args, {}))
    timed("dev scores", lambda: evaluate(model, dev, args, run.precision))
    bank = make_bank(pairs, NOISE, rng)
    npc, loader = NPC(model, run, bank), training_loader(args, pairs, bank)
    begun = []  # when each step did; on a GPU none does before the last but one is computed

    def step(batch):
        begun.append(time.perf_counter())
        return npc.step(batch)

    timed("all", lambda: fit(run, model, dev, npc.optimizers, loader, step))
    seconds["steps"] = (begun[-1] - begun[0]) / (len(begun) - 1) * len(begun)
    seconds["checkpoint, logs"] = max(0, seconds.pop("all") - seconds["steps"]
                                      - seconds["dev scores"])
    return seconds, len(loader)


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=113_287, help="training images; MSCOCO's")
    parser.add_argument("--num_dev", type=int, default=5000, help="dev images")
    parser.add_argument("--some", type=int, default=2000, help="images and captions that are read")
    parser.add_argument("--json", help="write the results to this file")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        args = parse_args("npc", ["--vision_model", "ViT-B/32", *words, "--epochs", "1",
                                  "--checkpoint_path", folder])
        run = Run(args, folder=True)
        seconds, steps = one_epoch(args, run, options.num_images, options.num_dev)
    captions = CAPTIONS * options.num_images
    seconds["reading images"], seconds["reading captions"] = read(
        args, options.num_images + options.num_dev, captions, options.some)
    machine = (torch.cuda.get_device_name() if args.device.type == "cuda"
               else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    print(f"\n### {options.num_images:,} images, {captions:,} captions, batch {args.batch_size}, "
          f"{args.vision_model}, {args.precision}, {machine}, torch {torch.__version__}\n\n"
          f"| | s | times | s of {EPOCHS} epochs |\n|---|--:|--:|--:|")
    total = 0
    for name, value in seconds.items():
        times = EPOCHS if name in ("steps", "dev scores", "checkpoint, logs") else 1
        total += times * value
        print(f"| {name} | {value:.2f} | {times} | {times * value:.1f} |")
    print(f"| all | | | {total:.1f} |\n\nA step takes {seconds['steps'] / steps * 1000:.1f} ms, "
          f"{args.batch_size * steps / seconds['steps']:.0f} pairs/s, in {steps} steps; "
          f"{EPOCHS} epochs {total / 60:.1f} minutes.")
    if options.json:
        Path(options.json).write_text(json.dumps({**seconds, "total": total}, indent=1))


if __name__ == "__main__":
    main()
