"""How fast, against what: our code and the released procedure, interleaved in one process.

    python benchmarks/bench.py [--only step bank eval loader] [--against nothing] [--json FILE]
    python benchmarks/bench.py --only save [--checkpoint_path FOLDER]

The released side is a literal transcription: every model pass for itself, captions padded to 77
tokens, each image once per caption, the state dict copied entry by entry, ranks by two argsorts.
"""

import argparse
import copy
import ctypes
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.training.saver import Saver

import clip
from main_CLIP import Baseline
from main_NPC import NPC
from params import parse_args
from utils.errors import command
from utils.method.batches import Batches
from utils.method.building import build_bank
from utils.method.memorybank import MemoryBank
from utils.method.optimizer import replays
from utils.method.pairs import Pairs
from utils.reading.images import Images, ImagesInMemory
from utils.scoring.retrieval import recalls
from utils.training import checkpoints
from utils.training.history import History
from utils.training.replay import Replay
from utils.training.run import Run

CAPTIONS = 5  # an image
RECALL = 0.85  # assumed share of the right pairs in the strict clean set
PEAKS = {"H100": 989, "H200": 989, "A100": 312}  # TFLOP/s in half, dense, as NVIDIA says


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


def write_jpegs(root, count, seed):
    """Names of new JPEGs below root/images: smooth textures of 640 x 480 pixels, which make files
    of about the size of COCO's."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir()
    names = [f"{i}.jpg" for i in range(count)]
    for name in names:
        small = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(root / "images" / name, quality=90)
    return names


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


@torch.no_grad()
def released_features(model, pairs, args):
    """Features of every pair, its image and its full-length caption encoded for each caption."""
    images, texts = [], []
    for rows in np.array_split(np.arange(len(pairs)), -(-len(pairs) // args.eval_batch_size)):
        crops = pairs.images.take(pairs.image_of[rows]).to(args.device)
        images.append(model.encode_image(clip.normalize(crops, model.dtype)))
        texts.append(model.encode_text(pairs.tokens[pairs.text_of[rows]].to(args.device)))
    return torch.cat(images), torch.cat(texts)


def released_metric(images, texts, num_anns):
    """The six recalls from two dense rank matrices, each by two argsorts."""
    scores = torch.cat([(image @ texts.T)[None] for image in images])
    label = torch.eye(len(images)).repeat_interleave(num_anns, dim=1)
    results = []
    for matrix, mask in ((scores, label), (scores.T, label.T)):
        ranks = mask * ((-matrix).argsort().argsort() + 1)
        ranks[ranks == 0] = 1e9
        best = ranks.min(dim=1).values
        results += [100 * (best <= k).float().mean().item() for k in (1, 5, 10)]
    return results


class ReleasedPairs(Dataset):
    """One item a pair: three images, each read, decoded and preprocessed for itself."""

    def __init__(self, pairs, bank):
        self.pairs, self.bank = pairs, bank

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        pairs, images = self.pairs, self.pairs.images
        entries = (i, self.bank.image_entry[pairs.image_of[i]], self.bank.caption_entry[i])
        return [images.preprocess(Image.open(images.folder / images.names[pairs.image_of[e]]))
                for e in entries]


# ---- measuring -----------------------------------------------------------------------------------


class Peak:
    """Largest memory in MB during the block: allocated on a GPU, resident above the start on a
    CPU."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.value, self.stop = 0, threading.Event()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what the call before has freed is not reused
            self.base = resident()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def _watch(self):
        while not self.stop.wait(0.01):
            self.value = max(self.value, resident() - self.base)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.value = torch.cuda.max_memory_allocated() / 1e6
        else:
            self.stop.set()
            self.thread.join()


def resident():
    """Resident memory of this process in MB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def machine(device):
    """What it is measured on."""
    chip = (torch.cuda.get_device_name() if device.type == "cuda"
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    return f"{chip}, torch {torch.__version__}, Python {platform.python_version()}"


def clock(function, device, steps=1):
    """Seconds that each of `steps` calls in a row takes: by CUDA events on a GPU, which is not
    waited for in between."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / steps
    start = time.perf_counter()
    for _ in range(steps):
        function()
    return (time.perf_counter() - start) / steps


def compare(contenders, device, rounds, prepare=lambda: None, steps=1, warm_up=None):
    """{name: {seconds of a call in each round, and of the same calls again, memory in MB,
    floating-point operations}} of functions that run in turn, `steps` calls each, round by round.

    prepare() comes before each round. A first one is not timed, but its operations are counted; on
    a GPU warm_up() follows, which meets what is captured and compiled. Memory is the largest.
    """
    results = {name: {"seconds": [], "again": [], "memory": 0} for name in contenders}
    prepare()
    for name, function in contenders.items():
        with (Peak(device) as peak, FlopCounterMode(display=False) as counter,
              torch.compiler.set_stance("force_eager")):  # the counter sees no compiled code
            function()
        results[name] |= {"memory": peak.value, "flops": counter.get_total_flops()}
    if warm_up:
        warm_up()
    for _ in range(rounds):
        prepare()
        for name, function in contenders.items():
            with Peak(device) as peak:
                results[name]["seconds"].append(clock(function, device, steps))
                if warm_up:
                    results[name]["again"].append(clock(function, device, steps))
            results[name]["memory"] = max(results[name]["memory"], peak.value)
    return results


def ratio(results, name, reference):
    """Median (and lowest, highest) over the rounds of the time of one contender over another's.

    Within a round, so that a machine which is slower for a while is so for both.
    """
    ratios = [a / b for a, b in zip(results[name]["seconds"], results[reference]["seconds"],
                                    strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def matrix_rate(device, dtype):
    """Floating-point operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = min(clock(lambda: a @ a, device) for _ in range(10))
    return 2 * side**3 / best


def busy(function):
    """Seconds that a GPU computes during a call."""
    function()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def time_shares(function, device, most=6):
    """The operations that take most of a call's time, as text: "aten::mm 53 %, ..."."""
    with profile() as profiler:
        clock(function, device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in profiler.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:most]
    return ", ".join(f"{key} {times[key] / sum(times.values()):.0%}" for key in largest)


def show(title, results):
    """Print one comparison as a Markdown table; ratios are to the first contender."""
    reference = next(iter(results))
    print(f"\n### {title}\n\n| | s: median (spread) | of {reference} | peak MB |")
    print("|---|--:|--:|--:|")
    for name, r in results.items():
        t = r["seconds"]
        middle, low, high = ratio(results, name, reference)
        print(f"| {name} | {statistics.median(t):.4f} ({min(t):.4f}-{max(t):.4f}) | {middle:.3f} "
              f"({low:.3f}-{high:.3f}) | {r['memory']:.0f} |", flush=True)


def show_gpu(results, batch_size, rate):
    """Print what a GPU makes of the time of each contender. rate: that of a large product."""
    name = torch.cuda.get_device_name()
    peak = next((1e12 * peak for key, peak in PEAKS.items() if key in name), None)
    share = "of its peak" if peak else "of the matrix rate"
    print(f"\n| | ms | the same batches again | pairs/s | TFLOP/s | {share} | GPU idle |\n"
          "|---|--:|--:|--:|--:|--:|--:|")
    for name, r in results.items():
        seconds = statistics.median(r["seconds"])
        done = r["flops"] / seconds
        print(f"| {name} | {1000 * seconds:.1f} | {1000 * statistics.median(r['again']):.1f} | "
              f"{batch_size / seconds:.0f} | {done / 1e12:.1f} | "
              f"{done / (peak or rate):.1%} | {max(0, 1 - r['busy'] / seconds):.0%} |", flush=True)
    print(f"\nA matrix product of 8192 x 8192 runs at {rate / 1e12:.0f} TFLOP/s.")


# ---- what is measured ----------------------------------------------------------------------------


def bench_step(options, noise):
    """Our steps against the released one and one plain CLIP step, which is also a step of --recipe
    robust, on the same batches."""
    args, device = options.run, options.run.device
    steps = options.steps or (10 if device.type == "cuda" else 1)
    run = Run(args)
    released_run = Run(parse_args("npc", [*options.words, "--recipe", "released"]))
    model = run.precision.prepare(new_model(args))
    rng = np.random.default_rng(args.seed)
    pairs = make_pairs(max(256, 16 * args.batch_size), model.visual.input_resolution, rng, device)
    bank = make_bank(pairs, noise, rng)
    few = replays(args)
    with_bank, without = Batches(pairs, bank, few_shapes=few), Batches(pairs, few_shapes=few)
    drawn, sizes, rates = {}, [], []

    def draw():
        rates.append(matrix_rate(device, options.compute_dtype))
        batches = [rng.permutation(len(pairs))[: args.batch_size] for _ in range(steps)]
        drawn.update(npc=[with_bank[batch].to(device) for batch in batches],
                     clip=[without[batch].to(device) for batch in batches],
                     released=[load_released(pairs, bank, batch, args) for batch in batches])
        sizes.extend((step.images.total / args.batch_size, step.texts.total / args.batch_size,
                      step.texts.items.shape[1]) for step in drawn["npc"])

    def on(kind, step):
        turn = itertools.count()
        return lambda: step(drawn[kind][next(turn) % steps])

    draw()
    difference = None
    if options.against == "released" and args.precision == "fp32":  # one step each, from the same A
        ours_released = NPC(copy.deepcopy(model), released_run, bank)
        ours_released.step(drawn["npc"][0])
        released = ReleasedStep(copy.deepcopy(model), args)
        released(drawn["released"][0])
        difference = max((p - q).abs().max().item() for p, q in zip(
            ours_released.A.parameters(), released.A.parameters(), strict=True))
        del ours_released, released

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

    results = compare(contenders, device, options.rounds, draw, steps,
                      warm_up if device.type == "cuda" else None)
    u_image, u_text, length = np.mean(sizes, axis=0)
    image_share = tower_cost(model, args, int(length))
    u = image_share * u_image + (1 - image_share) * u_text
    seconds = statistics.median(results["ours, --recipe paper"]["seconds"])
    clip_steps = ratio(results, "ours, --recipe paper", "plain CLIP step, ours")
    allowed = 1.15 * (2 + 4 * u) / 3
    flops = results["ours, --recipe paper"]["flops"]
    rate = statistics.median(rates)
    show(f"Training step, {noise:.0%} noise, batch {args.batch_size}", results)
    if device.type == "cuda":
        for name, function in contenders.items():
            results[name]["busy"] = busy(function)
        show_gpu(results, args.batch_size, rate)
    print(f"\nu is {u_image:.2f} for images, {u_text:.2f} for captions, {u:.2f} weighted by cost "
          f"(an image is {image_share:.0%} of a pair); captions are cut at {length:.0f} tokens. "
          f"Ours (paper) costs {clip_steps[0]:.2f} ({clip_steps[1]:.2f}-{clip_steps[2]:.2f}) plain "
          f"CLIP steps, where 1.15 (2 + 4u)/3 is {allowed:.2f}. Ours does "
          f"{args.batch_size / seconds:.1f} pairs/s. Floor: {flops / rate:.3f} s "
          f"({flops / 1e9:.0f} GFLOP at the measured matrix rate). Its time goes to "
          f"{time_shares(contenders['ours, --recipe paper'], device)}.")
    if difference is not None:
        print("After one step from the same weights, the parameters of the released recipe and of "
              f"the transcription differ by {difference:.1e} at most.")
    return {**results, "u_image": u_image, "u_text": u_text, "u": u, "clip_steps": clip_steps,
            "allowed_clip_steps": allowed, "floor": flops / rate,
            "difference": difference}


def bench_bank(options):
    """The memory bank: our build, and of the released one only its two passes over all captions."""
    args = options.run
    run = Run(args)
    model = run.precision.prepare(new_model(args))
    rng = np.random.default_rng(args.seed)
    pairs = make_pairs(options.bank_images, model.visual.input_resolution, rng, args.device)

    def ours():
        build_bank(model, pairs, args, run.precision, log=lambda message: None)

    def released():
        for _ in range(2):
            with run.precision.autocast():
                released_features(model, pairs, args)

    contenders = {"ours, whole bank": ours}
    if options.against == "released":
        contenders = {"released, both passes": released, **contenders}
    results = compare(contenders, args.device, options.rounds)
    flops = results["ours, whole bank"]["flops"]
    floor = flops / matrix_rate(args.device, options.compute_dtype)
    show(f"Memory bank of {len(pairs)} pairs", results)
    print(f"\nFloor: {floor:.3f} s ({flops / 1e9:.0f} GFLOP at the measured matrix rate).")
    return {**results, "floor": floor}


def bench_eval(options):
    """The metric on 5,000 images x 25,000 captions: ours, and two argsorts of the dense matrix."""
    device = options.run.device
    generator = torch.Generator().manual_seed(options.run.seed)
    images = F.normalize(torch.randn(5000, 512, generator=generator), dim=1)
    noise = torch.randn(25000, 512, generator=generator)
    texts = F.normalize(images.repeat_interleave(CAPTIONS, dim=0) + 0.35 * noise, dim=1)
    image_of = torch.arange(25000) // CAPTIONS
    images, texts, image_of = images.to(device), texts.to(device), image_of.to(device)
    scores = {}
    contenders = {"ours": lambda: scores.update(ours=recalls(images, texts, image_of))}
    if options.against == "released":
        contenders = {"released": lambda: scores.update(
            released=released_metric(images.cpu(), texts.cpu(), CAPTIONS)), **contenders}
    results = compare(contenders, device, options.rounds)
    show("Metric, 5,000 x 25,000", results)
    if "released" in scores:
        same = np.abs(np.array(list(scores["ours"].values())[:6]) - scores["released"]).max()
        print(f"\nThe six recalls differ by {same:.1e} points at most.")
    return results


def bench_loader(options):
    """Reading a step's images: ours without and with a warm cache or from memory, and three decodes
    a pair."""
    args = options.run
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = write_jpegs(root, options.loader_images, args.seed)
        size = sum((root / "images" / name).stat().st_size for name in names) / len(names)
        preprocess = clip.Preprocess(224)
        n = len(names) * CAPTIONS
        cached = Images(root, names, preprocess, str(root / "cache"))
        for k in range(len(names)):
            cached[k]
        pairs = {cache: Pairs(images, names, np.arange(n) // CAPTIONS, [""] * n, np.arange(n),
                                   caption_tokens(n, rng), root)
                 for cache, images in (("off", Images(root, names, preprocess)),
                                       ("warm", cached),
                                       ("memory", ImagesInMemory(cached, args.device, args)))}
        pairs["memory"].images.take(np.arange(1))  # reads them all
        bank = make_bank(pairs["off"], 0.2, rng)
        batches = rng.permutation(n)[: n // args.batch_size * args.batch_size]
        batches = batches.reshape(-1, args.batch_size).tolist()[:4]

        def ours(cache):
            workers = 0 if cache == "memory" else args.num_workers
            loader = DataLoader(Batches(pairs[cache], bank), sampler=batches,
                                batch_size=None, num_workers=workers)
            return lambda: [step.images.items for step in loader]

        contenders = {"ours, no cache": ours("off"), "ours, warm cache": ours("warm"),
                      "ours, in memory": ours("memory")}
        if options.against == "released":
            loader = DataLoader(ReleasedPairs(pairs["off"], bank), batch_sampler=batches,
                                num_workers=args.num_workers)
            contenders = {"three decodes a pair": lambda: list(loader), **contenders}
        results = compare(contenders, torch.device("cpu"), options.rounds)
    show(f"Loader, 20% noise, {len(batches)} steps of {args.batch_size}, {args.num_workers} "
         "workers", results)
    print(f"\n{len(names)} synthetic JPEGs of 640 x 480, {size / 1e3:.0f} kB each.")
    return results


def bench_save(options):
    """How long training stands still for a checkpoint of NPC, in a folder below --checkpoint_path:
    written at once, and copied, to be written while training goes on."""
    args = options.run
    with tempfile.TemporaryDirectory(dir=args.checkpoint_path) as folder:
        args.checkpoint_path = folder
        run = Run(args, folder=True)
        A = run.precision.prepare(new_model(args))
        pairs = make_pairs(args.batch_size, A.visual.input_resolution, np.random.default_rng(0),
                           args.device)
        bank = MemoryBank(np.arange(args.batch_size) * CAPTIONS, np.arange(len(pairs)))
        npc = NPC(A, run, bank)
        npc.step(Batches(pairs, bank)[np.arange(args.batch_size)].to(args.device))
        saver = Saver(run, A, npc.optimizers, History(run, pairs, 1), "")
        path = run.folder / "step1.pt"
        contenders = {"written at once": lambda: checkpoints.save(path, saver.state(0, 1)),
                      "copied, written behind": lambda: saver.save(path.name, 0, 1)}
        with saver.thread:
            results = compare(contenders, args.device, options.rounds, saver.wait)
        show(f"A checkpoint of {path.stat().st_size / 1e6:.0f} MB", results)
    return results


def tower_cost(model, args, length):
    """FLOPs of an image / FLOPs of an image and a caption of `length` tokens."""
    shape = (1, 3, model.visual.input_resolution, model.visual.input_resolution)
    costs = []
    for encoder, items in ((model.encode_image, torch.zeros(shape, device=args.device)),
                           (model.encode_text, torch.ones(1, length, dtype=torch.int32,
                                                          device=args.device))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(items)
        costs.append(counter.get_total_flops())
    return costs[0] / sum(costs)


def new_model(args):
    """A model with random weights, of the architecture of `--vision_model`."""
    torch.manual_seed(args.seed)
    return clip.CLIP(**clip.architecture(args.vision_model)).to(args.device).eval()


BENCHES = {"bank": bench_bank, "eval": bench_eval, "loader": bench_loader,
           "save": bench_save}


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other options are "
                                     "main_NPC.py's: --batch_size, --device, --precision, ...")
    parser.add_argument("--only", nargs="+", choices=("step", *BENCHES),
                        default=["step", "bank", "eval", "loader"], help="what to measure")
    parser.add_argument("--against", choices=("released", "nothing"), default="released",
                        help="time the released procedure beside ours, or not")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.2, 0.6],
                        help="noise ratios of the steps")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=None,
                        help="steps of a round, in a row as in training; without it 10 on a GPU, 1 "
                             "on a CPU")
    parser.add_argument("--bank_images", type=int, default=60,
                        help="images of the bank, 5 pairs each")
    parser.add_argument("--loader_images", type=int, default=600, help="images of the loader")
    parser.add_argument("--json", help="write the results to this file")
    options, words = parser.parse_known_args()
    options.words = ["--vision_model", "ViT-B/32", "--lr", "2e-7", *words]
    options.run = parse_args("npc", options.words)
    amp = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16, "fp16": torch.float16}
    options.compute_dtype = amp.get(options.run.precision, torch.float32)
    print(f"{options.run.vision_model}, random weights, {options.run.precision}, "
          f"{machine(options.run.device)}, {options.rounds} rounds")

    results = {}
    if "step" in options.only:
        results["step"] = {str(noise): bench_step(options, noise) for noise in options.noise}
    for name, bench in BENCHES.items():
        if name in options.only:
            results[name] = bench(options)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1, default=float))


if __name__ == "__main__":
    main()
