"""Every option of every command: its meaning, its default, its check."""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from utils.distributed import launched
from utils.method.optimizer import replays
from utils.method.recipes import RECIPES
from utils.method.weightings import WEIGHTINGS
from utils.reading.layout import DATASETS, SPLITS, split_folder
from utils.reading.noise import KINDS, SEED
from utils.training.checkpoints import options_of

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16", "fp16")
ADAMW = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}  # CLIP's
DEFAULT_MODEL = "ViT-B/32"
SCORES = ("judge", "loss", "cosine", "npc")
NEIGHBOURS = 15  # of a judge that is not the paper's
CLEAN_THRESHOLD, PAPER_CLEAN_THRESHOLD = 0.8, 0.9
OF_THIS_COMMAND = ("resume", "force_resume", "overwrite", "eval", "device", "num_workers",
                   "eval_batch_size")  # options that a checkpoint does not bring along
LR = 1e-5  # of weights that are not half
HALF_LR = {"npc": 2e-7, "clip": 5e-7}  # of commands that train, for half weights: the authors'
OTHERS_NAMES = {"--learning_rate": "--lr", "--model": "--vision_model", "--wd": "--weight_decay"}
ROOT = Path(__file__).resolve().parent

FIRST_STEPS = {
    "npc": """\
Train on noisy pairs:  python main_NPC.py --dataset coco --dataset_root DIR --noise_ratio 0.2
Score a checkpoint:    python main_NPC.py --eval --resume CKPT --dataset coco --dataset_root DIR
Your own pairs:        python dataset/prepare_pairs.py --help, then --dataset pairs
No data at hand?       make demo (a few minutes on a CPU, it draws its own)
All options:           python main_NPC.py --help; how DIR must look: dataset/README.md
"""}
FIRST_STEPS["clip"] = FIRST_STEPS["npc"].replace("main_NPC.py", "main_CLIP.py")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Options with their defaults below a description that keeps its line ends."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with a hint, and whose options of type Path expand ~."""

    def __init__(self, description, usage=None):
        super().__init__(usage=usage, description=description, allow_abbrev=False,
                         formatter_class=Help, fromfile_prefix_chars="@")
        self.register("type", Path, lambda text: Path(path(text)))

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does; @FILE is also looked for beside this module (@configs/...)."""
        words = sys.argv[1:] if args is None else args
        try:
            return super().parse_known_args(map(options_file, words), namespace)
        except UnicodeDecodeError:
            self.error("a file that is given as @FILE is not a text file")

    def convert_arg_line_to_args(self, line):
        """The words of a line of @FILE; # begins a comment."""
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a file that is given as @FILE has the line '{line}': {error}")

    def error(self, message):
        """End the program with one line: the message, what was probably meant, where help is."""
        said, _, offered = message.partition("(choose from")
        words, choices = (re.findall(r"[\w.@/-]+", text) for text in (said, offered))
        files, hint = [], ""
        if said.startswith("unrecognized arguments"):
            files = [f"@{word}" for word in words if os.path.isfile(options_file(f"@{word}")[1:])]
            words = [OTHERS_NAMES.get(word, word) for word in words if word.startswith("-")]
            choices = [*self._option_string_actions]
        near = [match for word in words[-1:] if choices
                for match in difflib.get_close_matches(word, choices, 1)] + files
        if near:
            hint = f"did you mean {near[0]}? "
        elif said.startswith("[Errno"):
            hint = "@FILE is a file of options; a text that begins with @ needs a space before it; "
        self.exit(2, f"error: {message} ({hint}{self.prog} --help lists the options)\n")


def options_file(word):
    """A word of a command line. In @FILE, ~ is expanded, and a file that is not there is looked for
    beside this module."""
    if not word.startswith("@"):
        return word
    file = os.path.expanduser(word[1:])
    return f"@{file if os.path.exists(file) or not (ROOT / file).exists() else ROOT / file}"


# ---- types: each names what it expects, argparse names the option -------------------------------


def number(parse, low, high, expected):
    """An argparse type for finite numbers in [low, high)."""

    def convert(text):
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not low <= value < high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return value

    return convert


natural_int = number(int, 0, float("inf"), "a whole number from 0")
positive_int = number(int, 1, float("inf"), "a whole number from 1")
at_least_two = number(int, 2, float("inf"), "a whole number from 2")
seed = number(int, 0, 2**32, "a whole number from 0 to below 2^32")
natural_float = number(float, 0, float("inf"), "a number from 0")
positive_float = number(float, math.nextafter(0, 1), float("inf"), "a number above 0")
probability = number(float, 0, 1, "a number from 0 to below 1")
ratio = number(float, 0, 1, "a number from 0 to below 1 (0.2 is 20 %)")


def path(text):
    """An argparse type: a path with ~ expanded, or a name, as str."""
    expanded = os.path.expanduser(text)
    if re.match("~(/|$)", expanded):
        raise argparse.ArgumentTypeError(f"'{text}' begins with ~, but HOME is not set")
    return expanded


def device(text):
    """An argparse type: cpu, cuda or cuda:N as a torch.device."""
    try:
        value = torch.device(text)
    except RuntimeError:
        value = None
    if value is None or value.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got '{text}'")
    return value


# ---- options ------------------------------------------------------------------------------------

OPTIONS = {}


def option(name, of=None, **settings):
    """Put an option of all commands, or that of one, in the table; `settings` are argparse's."""
    OPTIONS[name.lstrip("-"), of] = name, settings


option("--dataset", choices=DATASETS, help="""
    how image ids become file names: coco, f30k, cc, or pairs for any collection with an
    image_name.txt; default: pairs where that file is, else coco""")
option("--dataset_root", type=path, default="./dataset/MSCOCO", metavar="DIR", help="""
    folder of the data set, with annotations/ and images/ (dataset/README.md)""")
option("--num_anns", type=positive_int, metavar="N", help="""
    captions per line of train_ids.txt; default: 5 for coco and f30k, 1 for cc, for pairs what the
    two files add up to""")
option("--noise_ratio", type=ratio, default=0.0, metavar="RATIO", help="""
    share of training captions that are shuffled, in [0, 1); a missing caption file of this ratio,
    kind and seed is made""")
option("--noise_kind", choices=KINDS, default="random", help="""
    random: the drawn captions are shuffled, as in the paper; similar: each is exchanged with the
    most similar caption of another image (a near miss)""")
option("--noise_seed", type=seed, metavar="SEED", help="""
    seed of the noise and of the memory bank, to train again on the same noise and bank with another
    --seed; default: --seed""")
option("--context_length", type=at_least_two, default=77, metavar="N", help="""
    longest caption in tokens, with its start and end token; longer ones are cut; at most the
    model's (77 for all published ones)""")
option("--num_workers", type=natural_int, default=min(8, os.cpu_count() or 1), metavar="N", help="""
    processes that read images; 0: the main process reads them, best for very small images""")
option("--data_on", choices=("auto", "device", "workers"), default="auto", help="""
    device: decoded images stay in the memory of the device; workers: worker processes read them in
    each pass; auto: device if they fill at most a third of it, but workers under torchrun and where
    one pass is made""")
option("--image_cache", type=path, default="off", metavar="off|DIR", help="""
    keep the decoded and cropped images in a file in this folder, 0.15 MB each at 224 pixels; later
    passes and runs read the same pixels from there""")
option("--list_items", type=path, metavar="DIR", help="""
    list the distinct training images and captions there, for a judge that is another kind of model
    (--judge_features)""")

option("--vision_model", of="cache", type=path, default="ViT-B/32", metavar="NAME|PATH", help="""
    model whose resolution the images are cut to""")
option("--vision_model", type=path, metavar="NAME|PATH", help="""
    initial model: one of OpenAI's (ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, RN50, RN101,
    RN50x4, RN50x16, RN50x64), tiny (random weights), a checkpoint file, a folder of open_clip or
    transformers, or a model of either on the Hugging Face hub (hf-hub:ORG/NAME, or ORG/NAME where
    that is no path); default: ViT-B/32, or the model in --resume""")
option("--resume", type=path, metavar="CKPT|auto", help="""
    checkpoint to start from; training continues a state of the same script where it stopped; auto:
    the newest intact checkpoint of this experiment, if there is one""")
option("--resume", of="interpolate", type=path, required=True, metavar="CKPT", help="""
    the trained model""")
option("--resume", of="export", type=path, required=True, metavar="CKPT", help="""
    checkpoint to export""")
option("--initial", type=path, required=True, metavar="NAME|PATH", help="""
    the model that --resume was trained from, as for --vision_model in training""")
option("--activation", choices=("quick_gelu", "gelu"), help="""
    activation of the transformers, for files that hold nothing but weights: quick_gelu for OpenAI,
    MetaCLIP and DFN, gelu for LAION and DataComp; default: quick_gelu, and the log says so""")
option("--device", type=device, help="cpu, cuda or cuda:N; default: cuda where there is one")
option("--precision", choices=PRECISIONS, help="""
    fp32; amp_bf16 or amp_fp16: half-precision arithmetic on fp32 weights; fp16: weights and
    optimiser state in half, as the released script runs on a GPU; default: amp_bf16 on cuda, fp32
    on cpu""")

option("--recipe", choices=RECIPES, help="""
    paper: as the paper says; released: as the authors' script does; robust: train on the pairs that
    a better judge finds clean (docs/fidelity.md)""")
option("--weighting", choices=WEIGHTINGS, help=lambda: (  # a script may have added its own by then
    "weight of a pair's loss: "
    + "; ".join(f"{name}: {w.help}" for name, w in WEIGHTINGS.items())
    + "; default: npc, or none for --recipe robust"))
option("--memory", choices=("nearest", "random"), default="nearest", help="""
    memory entries of a batch: the clean pairs nearest to its images and captions, as in the paper,
    or random clean pairs""")
option("--memory_loss_weight", type=natural_float, metavar="X", help="""
    factor of the loss on the memory entries; 0: no such loss; default: 1, or 0 for --recipe
    robust""")
option("--train_on", choices=("all", "clean"), help="""
    draw the batches from all pairs, or from the strict clean set alone (shorter epochs); default:
    all, or clean for --recipe robust""")
option("--clean_threshold", type=probability, metavar="P", help=f"""
    posterior above which a pair is in the strict clean set; raise it when precision is low, lower
    it when the set is small; default: {PAPER_CLEAN_THRESHOLD} with the paper's judge,
    {CLEAN_THRESHOLD} with others""")
option("--min_clean", type=probability, default=0.02, metavar="P", help="""
    smallest share of pairs in the strict clean set; when fewer pass the threshold, the set is this
    share of the pairs, the least suspicious""")

option("--judge_rounds", type=natural_int, metavar="N", help="""
    times that the judge trains on the pairs which it finds clean, then judges again; 0: the initial
    model judges; default: 0, or 2 for --recipe robust""")
option("--judge_steps", type=positive_int, default=32, metavar="K", help="""
    optimiser steps of a round; many more overfit""")
option("--judge_neighbours", type=natural_int, metavar="K", help=f"""
    before the first round a pair must also agree with the K nearest neighbours of its image and
    caption; 0: no such test; default: {NEIGHBOURS} with rounds or for --recipe robust, else 0, the
    paper's""")
option("--search_among", type=at_least_two, metavar="N", help="""
    search neighbours, and find_noise.py its best captions and clean pairs, among N random items:
    the time then grows with the number of pairs, not with its square. 16384 suits a million pairs
    on a CPU; fewer find a little less; default: all items""")
option("--judge_lr", type=positive_float, metavar="LR", help=f"""
    learning rate of the rounds, best the one at which the model is fine-tuned; default: --lr, or
    {LR:g} in commands that do not train""")
option("--judge", type=path, metavar="NAME|PATH", help="""
    model that judges, as for --vision_model; default: the initial model""")
option("--judge_features", type=path, metavar="PATH", help="""
    judge by the features of a model of any kind, in this .npz file or folder
    (docs/finding_noise.md), without rounds""")

option("--score", choices=SCORES, default="judge", help="""
    what makes a pair suspicious: the judge's score; a high loss among the pairs of its batch; a low
    cosine; npc: a low mean weight in an NPC run (--weights)""")
option("--weights", type=path, metavar="FILE", help="""
    weights.npz of an NPC run on the same captions, for --score npc""")
option("--labels", type=path, metavar="FILE", help="""
    decisions.csv of the HTML page, or suspicious_pairs.csv with its column decision filled in:
    prints how many pairs are wrong and how right each --keep_above is; a label overrules what was
    computed""")
option("--wanted_precision", type=probability, default=0.95, metavar="P", help="""
    with --labels: share of right pairs among the kept ones, for which a --keep_above is
    proposed""")
option("--worst", type=positive_int, default=200, metavar="N", help="""
    pairs on the HTML page; the CSV file holds all""")
option("--write_clean", type=path, metavar="DIR", help="""
    also write a data set without the pairs that are probably wrong, whatever --score is, to this
    new folder; images, dev and test split stay the same""")
option("--keep_above", type=probability, default=0.5, metavar="P", help="""
    smallest posterior of being clean that --write_clean keeps; raise it for fewer and cleaner
    pairs""")

option("query", help="a text, which finds images, or an image file, which finds captions")
option("--split", choices=(*SPLITS, "all"), help="""
    split of the data set that is searched; default: all for --dataset pairs, else test""")
option("--top", type=positive_int, default=10, metavar="N", help="results to print and draw")

option("--epochs", type=positive_int, metavar="N", help="""
    passes over the pairs that are trained on; fewer where dev scores fall again at the end;
    default: 10, or 13 for --recipe robust""")
option("--lr", type=natural_float, help="""
    peak learning rate; default: 1e-5, which suits CLIP at any number of pairs, or for --precision
    fp16 the authors' 2e-7 (NPC) and 5e-7 (CLIP), which are too small elsewhere
    (docs/precision.md)""")
option("--warmup", type=natural_int, metavar="STEPS", help="""
    optimiser steps of linear warm-up; default: a tenth of all steps, at most 500 (--recipe
    released: 500)""")
option("--beta1", type=probability, help="""
    AdamW's decay of the mean gradient; CLIP's, seldom changed""")
option("--beta2", type=probability, help="""
    AdamW's decay of the squared gradient; CLIP's, seldom changed""")
option("--eps", type=natural_float, help="""
    AdamW's epsilon; with --precision fp16 the size of a step depends on it as much as on --lr:
    change both together""")
option("--weight_decay", type=natural_float, metavar="X", help="""
    AdamW's decoupled weight decay, on all parameters; a step decays by this times the learning
    rate: at 1e-6 it hardly matters""")
option("--freeze", choices=("none", "image", "text"), default="none", help="""
    tower that keeps its weights, where there are few pairs or only the other tower is new; the
    temperature is always trained""")
option("--accum_steps", type=positive_int, default=1, metavar="N", help="""
    encode a batch in N pieces and recompute each in the backward pass: less memory, the same
    gradients, slower""")
option("--grad_checkpointing", action="store_true", help="""
    keep only the input of each residual block and recompute the rest in the backward pass: less
    memory, the same gradients, slower""")
option("--eager", action="store_true", help="""
    launch each operation of a step by itself, for debugging; default: on a GPU, in amp_bf16 or
    fp32, a step is captured as a CUDA graph for each of a few shapes and then replayed, which takes
    half the time""")
option("--compile", action="store_true", help="""
    have torch.compile fuse what surrounds attention in the towers: a step on one GPU takes a fifth
    less time, the first one half a minute more; needs a C compiler""")
option("--clip_grad", type=natural_float, default=10.0, metavar="X", help="""
    largest norm of the gradient; 0: no clipping; lower it when grad_norm in the log has spikes""")

option("--seed", type=seed, default=SEED, help="""
    seed of the noise, the bank, the order of the pairs and random weights; change it for another
    repetition""")
option("--batch_size", type=at_least_two, metavar="B", help="""
    pairs in a step; every pair is contrasted with the others of its batch, so save memory by
    --accum_steps instead; default: 256, or a sixteenth of fewer than 4096 pairs, at least 8""")
option("--checkpoint_path", type=path, default="./logs", metavar="DIR", help="""
    folder of all experiments, on a disk with room""")
option("--experiments", type=path, default="ex0", metavar="NAME", help="""
    name of this experiment's folder in --checkpoint_path; a new one for each run""")
option("--name", help="""
    name of the method, in checkpoints, options.json and the tables of benchmarks/table.py; default:
    NPC or CLIP, with the recipe where it is not the paper's""")
option("--wandb", metavar="PROJECT", help="""
    also send TensorBoard's curves to this project of Weights & Biases (pip install wandb)""")
option("--display", type=positive_int, metavar="STEPS", help="""
    steps between two lines of the log and points in TensorBoard; default: points every 20 steps, a
    line a minute at most""")
option("--save_every", type=natural_int, default=0, metavar="STEPS", help="""
    save the training state every so many steps too, where an epoch is too long to lose; 0: only at
    the end of an epoch""")
option("--keep_checkpoints", type=natural_int, default=2, metavar="K", help="""
    keep the last K checkpoints beside best.pt (each takes 20 bytes a parameter for NPC in fp32); 0:
    all epochs""")
option("--overwrite", action="store_true", help="""
    delete an earlier run in this experiment's folder, once data and model are read; default: such a
    folder is refused""")
option("--force_resume", action="store_true", help="""
    resume although changed options or data make it another run""")

option("--eval", action="store_true", help="""
    score --resume (or the initial model) on the test split and stop""")
option("--eval_batch_size", type=positive_int, metavar="N", help="""
    images or captions that are encoded at a time outside training; changes speed and memory, never
    a score; default: 64 on a CPU, 512 on a GPU""")
option("--dev_length", type=positive_int, metavar="N", help="""
    score an epoch on the first N dev captions, where scoring takes long; default: all of them""")

option("--format", of="memorybank", choices=("npz", "released"), default="npz", help="""
    npz: ours, with the losses and posteriors; released: the authors' two pickled dictionaries""")
option("--out", of="find_noise", type=path, default="./logs/noise", metavar="DIR", help="""
    folder for suspicious_pairs.csv and suspicious_pairs.html""")
option("--out", of="search", type=path, metavar="FILE", help="""
    contact sheet of the results, a PNG; default: a new file in ./logs/search""")
option("--out", of="interpolate", type=path, metavar="FILE", help="""
    checkpoint to write; default: interpolated.pt beside --resume""")
option("--out", of="export", type=path, required=True, metavar="DIR", help="new folder to write")


# ---- commands -----------------------------------------------------------------------------------

EXAMPLES = {  # first line of each --help
    "npc": "main_NPC.py --recipe robust --dataset_root dataset/mine --experiments mine",
    "clip": "main_CLIP.py --dataset_root dataset/mine --experiments clip",
    "memorybank": "get_memorybank.py --dataset_root dataset/mine --judge_rounds 2",
    "noise": "construct_noise.py --dataset_root dataset/mine --noise_ratio 0.4",
    "cache": "data.py --dataset_root dataset/mine --image_cache DIR",
    "find_noise": "find_noise.py --dataset_root dataset/mine --out logs/noise",
    "search": 'search.py --resume logs/mine/best.pt --dataset_root dataset/mine "a dog"',
    "interpolate": "interpolate.py --resume logs/mine/best.pt --initial ViT-B/32 "
                   "--dataset_root dataset/mine",
    "export": "export_hf.py --resume logs/mine/best.pt --out logs/mine/hf",
}

SET = "dataset dataset_root num_anns noise_ratio noise_kind noise_seed"
DATA = SET + " context_length data_on num_workers image_cache"
MODEL = "vision_model resume activation device precision"
CLEAN = "clean_threshold min_clean"
JUDGE = "judge_rounds judge_steps judge_neighbours search_among judge_lr judge judge_features"
SAVERS = "accum_steps grad_checkpointing"
TRAINING = {
    "run": "experiments batch_size seed checkpoint_path name wandb display save_every "
           "keep_checkpoints overwrite force_resume",
    "optimisation": f"epochs lr warmup {' '.join(ADAMW)} freeze {SAVERS} eager compile clip_grad",
    "evaluation": "eval eval_batch_size dev_length"}
JUDGED = {"clip_grad": 10.0, **ADAMW}  # what trains the judge of other commands
COMMANDS = {  # name: what it does, its options by group, defaults of its own
    "npc": ("Train or evaluate NPC.",
            {"data": DATA, "model": MODEL, **TRAINING,
             "method": f"recipe weighting memory memory_loss_weight train_on {CLEAN}",
             "judge": JUDGE}, {"recipe": "paper", **ADAMW}),
    "clip": ("Train or evaluate the CLIP baseline.",
             {"data": DATA, "model": MODEL, **TRAINING, "method": f"recipe train_on {CLEAN}",
              "judge": JUDGE}, {"recipe": "paper", **ADAMW}),
    "memorybank": ("Build the memory bank of a training set.",
                   {"data": DATA, "model": MODEL, "method": f"recipe weighting format {CLEAN}",
                    "judge": f"{JUDGE} {SAVERS}", "run": "seed batch_size",
                    "evaluation": "eval_batch_size"}, {"recipe": "paper", **JUDGED}),
    "noise": ("Make a noisy caption file.", {"data": SET, "run": "seed"}, {}),
    "cache": ("Decode all images ahead.",
              {"data": f"{SET} context_length num_workers image_cache list_items vision_model",
               "run": "seed", "evaluation": "eval_batch_size dev_length"},
              {"data_on": "workers"}),
    "find_noise": ("Rank the training pairs by how suspicious they are.",
                   {"data": DATA, "model": MODEL,
                    "findings": "out score weights labels wanted_precision worst write_clean "
                                "keep_above",
                    "method": f"recipe {CLEAN}", "judge": f"{JUDGE} {SAVERS}",
                    "run": "seed batch_size", "evaluation": "eval_batch_size"},
                   {"recipe": "robust", **JUDGED}),
    "search": ("Find images by text, or captions by image.",
               {"search": "query split top out", "model": MODEL,
                "data": f"{SET} context_length num_workers image_cache", "run": "seed",
                "evaluation": "eval_batch_size dev_length"},
               {"recipe": "paper", "data_on": "workers"}),
    "interpolate": ("Average the initial model and the trained one.",
                    {"data": DATA, "model": "resume initial activation device precision out",
                     "run": "seed", "evaluation": "eval_batch_size dev_length"},
                    {"recipe": "paper", "vision_model": None}),
    "export": ("Write a checkpoint for transformers.", {"model": "resume activation out"}, {}),
}


def parse_args(command, argv=None):
    """Options of a command, one of `COMMANDS`.

    Returns a namespace with defaults filled in (`device` is a torch.device). Bad values end the
    program with one line on stderr and status 2.
    """
    if command in FIRST_STEPS and not (sys.argv[1:] if argv is None else argv):
        sys.exit(FIRST_STEPS[command].rstrip())
    parser = parser_of(command)
    args = parser.parse_args(argv)
    if command in HALF_LR and args.resume:  # options that are not given are the checkpoint's
        parser.set_defaults(**options_of_checkpoint(parser, args))
        args = parser.parse_args(argv)
    fill_in(parser, command, args)
    return args


def options_of_checkpoint(parser, args):
    """Options of the run that wrote the checkpoint `--resume`, {} where it holds no training state.
    Its folder is that run's, unless another one is given."""
    saved = options_of(args.resume, Path(args.checkpoint_path, args.experiments))
    elsewhere = any(getattr(args, name) != parser.get_default(name)
                    for name in ("checkpoint_path", "experiments"))
    if saved and args.resume != "auto" and not elsewhere:
        folder = Path(args.resume).parent
        if folder.name in ("", ".."):  # as typed where that says enough
            folder = folder.resolve()
        saved |= {"checkpoint_path": str(folder.parent), "experiments": folder.name}
    else:
        saved |= {"checkpoint_path": args.checkpoint_path, "experiments": args.experiments}
    return {name: value for name, value in saved.items()
            if name in args and name not in OF_THIS_COMMAND}


def parser_of(command):
    """The `Parser` of a command."""
    description, groups, defaults = COMMANDS[command]
    parser = Parser(description, f"python {EXAMPLES[command]}")
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            flag, settings = OPTIONS.get((name, command)) or OPTIONS[name, None]
            text = settings["help"]
            group.add_argument(flag, **settings | {"help": text() if callable(text) else text})
    parser.set_defaults(**defaults)
    return parser


def fill_in(parser, command, args):
    """Fill in the options that are not given and depend on others or on the machine; refuse those
    that do not go together."""

    def given(name):
        return getattr(args, name, None)

    def of_recipe(name):
        return lambda: getattr(RECIPES[args.recipe], name)

    if command == "cache":
        args.device = torch.device("cpu")
    if given("judge_features"):
        args.judge_rounds = 0
    defaults = {  # in this order, as some depend on others
        "dataset": lambda: "pairs" if has_image_names(args.dataset_root) else "coco",
        "num_anns": lambda: DATASETS[args.dataset],
        "split": lambda: "all" if args.dataset == "pairs" else "test",
        "noise_seed": lambda: args.seed,
        "device": lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        "vision_model": lambda: DEFAULT_MODEL if args.resume in (None, "auto") else args.resume,
        "precision": lambda: "amp_bf16" if args.device.type == "cuda" else "fp32",
        "eval_batch_size": lambda: 512 if args.device.type == "cuda" else 64,
        "name": lambda: {"paper": command.upper(), "released": f"{command.upper()} released",
                         "robust": "robust"}[args.recipe],
        "batch_size": lambda: min(256, max(8, number_of_pairs(args.dataset_root) // 16)),
        "lr": lambda: HALF_LR[command] if args.precision == "fp16" else LR,
        "judge_lr": lambda: given("lr") or LR,
        **{name: of_recipe(name) for name in ("weighting", "memory_loss_weight", "train_on",
                                              "judge_rounds", "epochs")},
        "judge_neighbours": lambda: (
            NEIGHBOURS if args.judge_rounds or of_recipe("judge_rounds")() else 0),
        "clean_threshold": lambda: (
            CLEAN_THRESHOLD if args.judge_rounds or args.judge_neighbours
            else PAPER_CLEAN_THRESHOLD)}
    for name, default in defaults.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, default())
    if "judge" in args and args.data_on == "auto" and command not in HALF_LR:
        args.data_on = "auto" if args.judge_rounds else "workers"  # which suits a single pass

    if "precision" in args and args.device.type == "cuda":
        index = os.environ.get("LOCAL_RANK") or args.device.index or 0  # torchrun: one per process
        args.device = torch.device("cuda", int(index))
    if given("resume") == "":
        parser.error("--resume '' names no checkpoint")
    if "precision" in args and args.device.type == "cuda":
        if args.device.index >= torch.cuda.device_count():
            parser.error(f"--device {args.device}: torch sees {torch.cuda.device_count()} CUDA "
                         "devices here; --device cpu works everywhere")
    if given("compile") and (launched() > 1 or not replays(args)):
        parser.error("--compile is for steps that are replayed: on one GPU, without torchrun, in "
                     "amp_bf16 or fp32, without --eager")
    if given("wandb") and not find_spec("wandb"):
        parser.error("--wandb needs a package that is not installed here: pip install wandb")
    if command == "cache" and (args.image_cache == "off") == (args.list_items is None):
        parser.error("give one of --image_cache DIR and --list_items DIR")
    if command == "find_noise" and (args.score == "npc") != (args.weights is not None):
        parser.error("--score npc and --weights RUN/weights.npz go together")
    if given("overwrite") and args.resume == "auto":
        parser.error("--overwrite deletes what --resume auto continues; give one of them")
    if given("judge_features") and args.judge:
        parser.error("--judge and --judge_features name two judges; give one")


def has_image_names(dataset_root):
    """Whether an image_name.txt says what the images are called."""
    return (split_folder(dataset_root) / "image_name.txt").exists()


def number_of_pairs(dataset_root):
    """Lines of train_caps.txt; 10^6 where that file is missing, which reading the data reports."""
    path = split_folder(dataset_root) / "train_caps.txt"
    if not os.path.isfile(path):
        return 10**6
    with open(path, "rb") as f:
        return sum(1 for _ in f)
