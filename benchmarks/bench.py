"""Measures a training step: ours beside the released procedure, interleaved in one process.

    python benchmarks/bench.py [--noise 0.2 0.6] [--against nothing] [--json FILE]

The released side is a literal transcription: each model pass by itself, captions padded to 77
tokens, each image once per caption, the state dict copied entry by entry.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import clip
from benchmarks.driver import table
from main_CLIP import Baseline
from main_NPC import NPC
from params import parse_args
from utils.errors import command
from utils.method.batches import Batches
from utils.method.memorybank import MemoryBank
from utils.method.optimizer import replays
from utils.method.pairs import Pairs
from utils.reading.images import ImagesInMemory
from utils.reading.layout import split_folder
from utils.training.replay import Replay
from utils.training.run import Run

CAPTIONS = 5  # an image
RECALL = 0.85  # assumed share of the right pairs in the strict clean set


# ---- data as a real run has it -------------------------------------------------------------------


def caption_tokens(n, rng):
    """n captions of COCO's length, (n, 77) int32: 10.5 words on average, a word or so more as
    tokens, both end marks; a long tail up to 50 tokens."""
    lengths = np.clip(np.round(2 + rng.gamma(20, 11.5 / 20, n) + rng.exponential(1, n)), 7, 50)
    tokens = np.zeros((n, 77), np.int32)
    for row, length in zip(tokens, lengths.astype(int), strict=True):
        row[0], row[length - 1] = 49406, 49407
        row[1 : length - 1] = rng.integers(1, 49000, length - 2)
    return torch.from_numpy(tokens)


def make_pairs(num_images, resolution, rng, device):
    """Pairs of random images in the device's memory, with five captions each."""
    crops = torch.randint(0, 256, (num_images, 3, resolution, resolution), dtype=torch.uint8,
                          device=device)
    images, n = ImagesInMemory(crops, device), num_images * CAPTIONS
    return Pairs(images, list(map(str, range(num_images))), np.arange(n) // CAPTIONS,
                      [str(i) for i in range(n)], np.arange(n), caption_tokens(n, rng), Path("-"))


def make_empty_set(root):
    """Make the folders of a data set, which a run asks for, without any pair."""
    split_folder(root).mkdir(parents=True)
    (Path(root) / "images").mkdir()


def make_bank(pairs, noise, rng):
    """A bank like one built at a noise ratio: RECALL of the right pairs are clean and their own
    entries; other captions find a clean pair anywhere, images one of their own if they have any."""
    n = len(pairs)
    clean = (rng.random(n) > noise) & (rng.random(n) < RECALL)
    anywhere = rng.choice(np.flatnonzero(clean), n)
    caption_entry = np.where(clean, np.arange(n), anywhere)
    own = clean.reshape(-1, CAPTIONS)
    first = np.arange(len(own)) * CAPTIONS + own.argmax(axis=1)
    return MemoryBank(np.where(own.any(axis=1), first, anywhere[::CAPTIONS]), caption_entry)


# ---- the released procedure ----------------------------------------------------------------------


class ReleasedStep:
    """The released training step: six forward passes, three backward passes, nothing shared. Its
    weights are half on a GPU, as in that script, unless --precision is fp32; of a copy of A."""

    def __init__(self, A, args):
        if args.device.type == "cuda" and args.precision != "fp32":
            A = clip.convert_weights_to_fp16(copy.deepcopy(A))
        self.A, self.siamese = A, copy.deepcopy(A)
        options = {"lr": args.lr, "betas": (args.beta1, args.beta2), "eps": args.eps,
                   "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.AdamW(A.parameters(), **options)
        self.siamese_optimizer = torch.optim.AdamW(self.siamese.parameters(), **options)

    def losses(self, model, inputs):
        per_image, per_text = model(*inputs)
        target = torch.arange(len(per_image), device=per_image.device)
        return (F.cross_entropy(per_image, target, reduction="none")
                + F.cross_entropy(per_text, target, reduction="none")) / 2

    def __call__(self, inputs):
        A, siamese = self.A, self.siamese
        batch, memory_i, memory_t = inputs
        for name, value in A.state_dict().items():
            siamese.state_dict()[name].copy_(value)
        siamese.eval()
        with torch.no_grad():
            before_i, before_t = self.losses(siamese, memory_i), self.losses(siamese, memory_t)
        siamese_loss = 2 * self.losses(siamese, batch).mean()
        loss = self.losses(A, batch).mean()
        self.siamese_optimizer.zero_grad()
        siamese_loss.backward(retain_graph=True)
        siamese_loss.backward()
        self.siamese_optimizer.step()
        with torch.no_grad():
            r = (before_i / self.losses(siamese, memory_i)
                 + before_t / self.losses(siamese, memory_t)) / 2
        w = torch.where(r < 1, torch.tanh(r), 1)
        total = w.mean() * loss + (before_i + before_t).mean()
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(A.parameters(), 10)
        self.optimizer.step()


def load_released(pairs, bank, batch, args):
    """A released step's three lists of pairs as normalised images and full-length tokens."""
    entries = (batch, bank.image_entry[pairs.image_of[batch]], bank.caption_entry[batch])
    return [(clip.normalize(pairs.images.take(pairs.image_of[e]).to(args.device)),
             pairs.tokens[pairs.text_of[e]].to(args.device)) for e in entries]


# ---- measuring -----------------------------------------------------------------------------------


def machine(device):
    """What it is measured on."""
    chip = (torch.cuda.get_device_name() if device.type == "cuda"
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    return f"{chip}, torch {torch.__version__}, Python {platform.python_version()}"


def compare(contenders, device, rounds, prepare, steps, warm_up):
    """{name: numbers} of functions that run in turn, `steps` calls each, round by round.

    The numbers are `seconds` of a call in each round and on a GPU `memory`, the peak in MB. A GPU
    is waited for after the last call of a turn alone. prepare() comes before each round. A first
    round is not timed; on a GPU warm_up() follows, which meets what is captured and compiled.
    """
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    results = {name: {"seconds": [], "memory": None} for name in contenders}
    prepare()
    for function in contenders.values():
        function()
    if on_gpu:
        warm_up()
    for _ in range(rounds):
        prepare()
        for name, function in contenders.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            wait()
            start = time.perf_counter()
            for _ in range(steps):
                function()
            wait()
            results[name]["seconds"].append((time.perf_counter() - start) / steps)
            if on_gpu:
                results[name]["memory"] = torch.cuda.max_memory_allocated() / 1e6
    return results


def ratio(results, name, reference):
    """Median, lowest and highest over the rounds of the time of one contender over another's. The
    two times are of one round, so that a machine which is slower for a while is so for both."""
    ratios = [a / b for a, b in zip(results[name]["seconds"], results[reference]["seconds"],
                                    strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def show(title, results, batch_size):
    """Print the numbers as a Markdown table; ratios are to the first contender."""
    reference, rows = next(iter(results)), []
    for name, r in results.items():
        t, (middle, low, high) = 1000 * np.array(r["seconds"]), ratio(results, name, reference)
        rows.append([name, f"{np.median(t):.1f} ({t.min():.1f}-{t.max():.1f})",
                     f"{middle:.3f} ({low:.3f}-{high:.3f})",
                     f"{1000 * batch_size / np.median(t):.1f}",
                     f"{r['memory']:.0f}" if r["memory"] else "–"])
    head = ["", "ms: median (spread)", f"of {reference}", "pairs/s", "peak MB"]
    print(f"\n### {title}\n\n{table(head, rows)}", flush=True)


# ---- what is measured ----------------------------------------------------------------------------


def bench_step(options, noise):
    """Our steps against the released one and one plain CLIP step, which is also a step of --recipe
    robust, on the same batches."""
    args, device = options.run, options.run.device
    steps = 10 if device.type == "cuda" else 1  # of a round, in a row as in training
    run = Run(args)
    released_run = Run(parse_args("npc", [*options.words, "--recipe", "released"]))
    model = run.precision.prepare(new_model(args))
    rng = np.random.default_rng(args.seed)
    pairs = make_pairs(max(256, 16 * args.batch_size), model.visual.input_resolution, rng, device)
    bank = make_bank(pairs, noise, rng)
    few = replays(args)
    with_bank, without = Batches(pairs, bank, few_shapes=few), Batches(pairs, few_shapes=few)
    drawn, sizes = {}, []

    def draw():
        batches = [rng.permutation(len(pairs))[: args.batch_size] for _ in range(steps)]
        drawn.update(npc=[with_bank[batch].to(device) for batch in batches],
                     clip=[without[batch].to(device) for batch in batches],
                     released=[load_released(pairs, bank, batch, args) for batch in batches])
        sizes.extend((step.images.total / args.batch_size, step.texts.total / args.batch_size,
                      step.texts.items.shape[1]) for step in drawn["npc"])

    def on(kind, step):
        turn = itertools.count()
        return lambda: step(drawn[kind][next(turn) % steps])

    # All train the same A, one after the other: only what each needs beside it is held for it
    methods = {"ours, --recipe paper": NPC(model, run, bank),
               "plain CLIP step, ours": Baseline(model, run),
               "ours, --recipe released": NPC(model, released_run, bank)}
    contenders = {name: on("clip" if isinstance(method, Baseline) else "npc",
                           Replay(method.step, print) if few else method.step)
                  for name, method in methods.items()}
    ours = list(contenders.values())
    if options.against == "released":
        released = ReleasedStep(model, args)
        contenders = {"released step": on("released", lambda step: released(step)
                                          or model.zero_grad()), **contenders}

    def warm_up():
        for _ in range(60 // steps):  # most shapes are met twice
            draw()
            for function in ours * steps:
                function()

    results = compare(contenders, device, options.rounds, draw, steps, warm_up)
    show(f"Training step, {noise:.0%} noise, batch {args.batch_size}", results, args.batch_size)
    u_image, u_text, length = np.mean(sizes, axis=0)
    clip_steps = ratio(results, "ours, --recipe paper", "plain CLIP step, ours")
    print(f"\nDistinct items of batch and memory over the batch size: {u_image:.2f} images, "
          f"{u_text:.2f} captions. Captions are cut at {length:.0f} tokens. Ours (paper) costs "
          "{:.2f} ({:.2f}-{:.2f}) plain CLIP steps.".format(*clip_steps))
    return {**results, "u_image": u_image, "u_text": u_text, "clip_steps": clip_steps}


def new_model(args):
    """A model with random weights, of the architecture of `--vision_model`."""
    torch.manual_seed(args.seed)
    return clip.CLIP(**clip.architecture(args.vision_model)).to(args.device).eval()


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other options are "
                                     "main_NPC.py's: --batch_size, --device, --precision, ...")
    parser.add_argument("--only", choices=("step",), default="step",
                        help="what to measure: a training step")
    parser.add_argument("--against", choices=("released", "nothing"), default="released",
                        help="time the released procedure beside ours, or not")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.2, 0.6],
                        help="noise ratios of the steps")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--json", help="write the results to this file")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as root:
        make_empty_set(root)
        options.words = ["--dataset_root", root, "--vision_model", "ViT-B/32", "--lr", "2e-7",
                         *words]
        options.run = parse_args("npc", options.words)
        print(f"{options.run.vision_model}, random weights, {options.run.precision}, "
              f"{machine(options.run.device)}, {options.rounds} rounds")
        results = {"step": {str(noise): bench_step(options, noise) for noise in options.noise}}
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1, default=float))


if __name__ == "__main__":
    main()
