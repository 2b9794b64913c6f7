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
from utils.training.checkpoints import OF_THIS_COMMAND, options_of

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16", "fp16")
ADAMW = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}  # CLIP's
DEFAULT_MODEL = "ViT-B/32"
SCORES = ("judge", "loss", "cosine", "npc")
NEIGHBOURS = 15  # of any judge but the paper's
CLEAN_THRESHOLD, PAPER_CLEAN_THRESHOLD = 0.8, 0.9
OF_TRAINING = ("compile", "wandb")  # not handed on to --eval, perhaps on another machine
LR = 1e-5
HALF_LR = {"npc": 2e-7, "clip": 5e-7}  # of commands that train, with fp16 weights: the authors'
OTHERS_NAMES = {"--learning_rate": "--lr", "--model": "--vision_model", "--wd": "--weight_decay"}
ROOT = Path(__file__).resolve().parent


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows defaults other than None and keeps the line ends of the description."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line and a hint; options of type Path expand ~."""

    def __init__(self, description, usage=None):
        super().__init__(usage=usage, description=description, allow_abbrev=False,
                         formatter_class=Help, fromfile_prefix_chars="@")
        self.register("type", Path, lambda text: Path(path(text)))

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does; @FILE may also be a path of this repository (@configs/...)."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(map(options_file, words), namespace)

    def convert_arg_line_to_args(self, line):
        """The words of a line of @FILE; # begins a comment."""
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"@FILE has the line '{line}': {error}")

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
            hint = "@FILE is a file of options; put a space before a text that begins with @; "
        self.exit(2, f"error: {message} ({hint}{self.prog} --help lists the options)\n")


def options_file(word):
    """A word of a command line; @FILE with ~ expanded, and as a path of this repository where no
    other file has that path."""
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


def path(text):
    """An argparse type: a path or a name, as str with ~ expanded."""
    expanded = os.path.expanduser(text)
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    if re.match("~(/|$)", expanded):
        raise argparse.ArgumentTypeError(f"'{text}' begins with ~, but HOME is not set")
    return expanded


def device(text):
    """An argparse type: cpu, cuda or cuda:N, as torch.device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got '{text}'")
    return torch.device(text)


# ---- options ------------------------------------------------------------------------------------

OPTIONS = {}


def option(name, of=None, **settings):
    """Put an option in the table, of all commands or `of` one; `settings` are argparse's."""
    OPTIONS[name.lstrip("-"), of] = name, settings


option("--dataset", choices=DATASETS, help="""
    how image ids become file names: coco, f30k, cc, or pairs (any collection with an
    image_name.txt); default: pairs where that file is, else coco""")
option("--dataset_root", type=path, default="./dataset/MSCOCO", metavar="DIR", help="""
    folder of the data set, with annotations/ and images/ (dataset/README.md)""")
option("--num_anns", type=positive_int, metavar="N", help="""
    captions per line of train_ids.txt; default: coco and f30k 5, cc 1, pairs: as the files say""")
option("--noise_ratio", type=probability, default=0.0, metavar="RATIO", help="""
    share of the training captions that are shuffled; a missing caption file is made""")
option("--noise_kind", choices=KINDS, default="random", help="""
    random: shuffle the drawn captions, as in the paper; similar: exchange each with the most
    similar caption of another image (a near miss)""")
option("--noise_seed", type=seed, metavar="SEED", help="""
    seed of the noise and of the memory bank; default: --seed""")
option("--context_length", type=at_least_two, default=77, metavar="N", help="""
    cut captions to N tokens, start and end token included""")
option("--num_workers", type=natural_int, default=min(8, os.cpu_count() or 1), metavar="N", help="""
    processes that read images; 0: the main process reads them, best for very small images""")
option("--data_on", choices=("auto", "device", "workers"), default="auto", help="""
    device: keep decoded images in the device's memory; workers: read images in each pass; auto:
    device for several passes of one process if the images fill at most a third of the memory""")
option("--image_cache", type=path, default="off", metavar="off|DIR", help="""
    keep decoded and cropped images in a file there, for all later passes and runs; 0.15 MB each
    at 224 pixels""")
option("--list_items", type=path, metavar="DIR", help="""
    list the distinct training images and captions there, for --judge_features""")

option("--vision_model", of="cache", type=path, default="ViT-B/32", metavar="NAME|PATH", help="""
    model whose resolution the images are cut to""")
option("--vision_model", type=path, metavar="NAME|PATH", help="""
    initial model: one of OpenAI's (ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, RN50, RN101,
    RN50x4, RN50x16, RN50x64), tiny (random weights), a checkpoint file, a folder of open_clip or
    transformers, or hf-hub:ORG/NAME of the Hugging Face hub; default: ViT-B/32, or the model in
    --resume""")
option("--resume", type=path, metavar="CKPT|auto", help="""
    checkpoint to start from; if it holds a training state, training continues there; auto: the
    newest intact checkpoint of this experiment, if there is one""")
option("--resume", of="interpolate", type=path, required=True, metavar="CKPT", help="""
    the trained model""")
option("--resume", of="export", type=path, required=True, metavar="CKPT", help="""
    checkpoint to export""")
option("--initial", type=path, required=True, metavar="NAME|PATH", help="""
    the model that --resume was trained from, as for --vision_model in training""")
option("--activation", choices=("quick_gelu", "gelu"), help="""
    activation of a model whose file does not say it: quick_gelu for OpenAI, MetaCLIP and DFN, gelu
    for LAION and DataComp; default: quick_gelu""")
option("--device", type=device, help="cpu, cuda or cuda:N; default: cuda where there is one")
option("--precision", choices=PRECISIONS, help="""
    amp_bf16, amp_fp16: half-precision arithmetic on fp32 weights; fp16: weights and optimiser
    state in half, as in the released script; default: amp_bf16 on cuda, fp32 on cpu""")

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
    factor of the loss on the memory entries; default: 1, or 0 for --recipe robust""")
option("--train_on", choices=("all", "clean"), help="""
    all pairs, or the strict clean set alone; default: all, or clean for --recipe robust""")
option("--clean_threshold", type=probability, metavar="P", help=f"""
    a pair is in the strict clean set if its posterior is above P; default: {PAPER_CLEAN_THRESHOLD}
    with the paper's judge, {CLEAN_THRESHOLD} with others""")
option("--min_clean", type=probability, default=0.02, metavar="P", help="""
    smallest share of pairs in the strict clean set; if fewer pass the threshold, the least
    suspicious pairs fill it up""")

option("--judge_rounds", type=natural_int, metavar="N", help="""
    times that the judge trains on the pairs which it finds clean, then judges again; 0: the initial
    model judges; default: 0, or 2 for --recipe robust""")
option("--judge_steps", type=positive_int, default=32, metavar="K", help="""
    optimiser steps of a round; many more overfit""")
option("--judge_neighbours", type=natural_int, metavar="K", help=f"""
    before the first round also compare a pair with the K nearest neighbours of its image and
    caption; 0: off; default: {NEIGHBOURS} with rounds or for --recipe robust, else 0""")
option("--search_among", type=at_least_two, metavar="N", help="""
    search neighbours, and find_noise.py its best captions and clean pairs, among N random items:
    16384 suits a million pairs on a CPU; fewer find a little less; default: all items""")
option("--judge_lr", type=positive_float, metavar="LR", help=f"""
    learning rate of the rounds, best that of fine-tuning; default: --lr, or {LR:g} in commands that
    do not train""")
option("--judge", type=path, metavar="NAME|PATH", help="""
    model that judges, as for --vision_model; default: the initial model""")
option("--judge_features", type=path, metavar="PATH", help="""
    judge by the features of a model of any kind, in this .npz file or folder
    (docs/finding_noise.md), without rounds""")

option("--score", choices=SCORES, default="judge", help="""
    what makes a pair suspicious: the judge's score; a high loss in its batch; a low cosine; npc: a
    low mean weight in an NPC run (--weights)""")
option("--weights", type=path, metavar="FILE", help="""
    weights.npz of an NPC run on the same captions, for --score npc""")
option("--labels", type=path, metavar="FILE", help="""
    decisions.csv of the HTML page, or suspicious_pairs.csv with its column decision filled in; a
    label overrules the judge, and labels tell how many pairs are wrong and which --keep_above is
    right""")
option("--wanted_precision", type=probability, default=0.95, metavar="P", help="""
    with --labels: propose a --keep_above that leaves this share of right pairs""")
option("--worst", type=positive_int, default=200, metavar="N", help="""
    pairs on the HTML page; the CSV file holds all""")
option("--write_clean", type=path, metavar="DIR", help="""
    also write a data set without the pairs that are probably wrong, whatever --score is, to this
    new folder; images, dev and test split stay the same""")
option("--keep_above", type=probability, default=0.5, metavar="P", help="""
    smallest posterior that --write_clean keeps; raise it for fewer and cleaner pairs""")

option("query", help="a text, which finds images, or an image file, which finds captions")
option("--split", choices=(*SPLITS, "all"), help="""
    split of the data set that is searched; default: all for --dataset pairs, else test""")
option("--top", type=positive_int, default=10, metavar="N", help="results to print and draw")

option("--epochs", type=positive_int, metavar="N", help="""
    passes over the pairs that are trained on; default: 10, or 13 for --recipe robust""")
option("--lr", type=natural_float, help="""
    peak learning rate; default: 1e-5, or for --precision fp16 the authors' 2e-7 (NPC) and 5e-7
    (CLIP), which are too small elsewhere (docs/precision.md)""")
option("--warmup", type=natural_int, metavar="STEPS", help="""
    optimiser steps of linear warm-up; default: a tenth of all steps, at most 500 (--recipe
    released: 500)""")
option("--beta1", type=probability, help="AdamW's decay of the mean gradient")
option("--beta2", type=probability, help="AdamW's decay of the squared gradient")
option("--eps", type=natural_float, help="""
    AdamW's epsilon; with --precision fp16 a step depends on it as much as on --lr""")
option("--weight_decay", type=natural_float, metavar="X", help="""
    AdamW's decoupled weight decay, on all parameters""")
option("--freeze", choices=("none", "image", "text"), default="none", help="""
    tower that keeps its weights; the temperature is always trained""")
option("--accum_steps", type=positive_int, default=1, metavar="N", help="""
    encode a batch in N pieces and recompute each in the backward pass: less memory, the same
    gradients, slower""")
option("--grad_checkpointing", action="store_true", help="""
    recompute each residual block in the backward pass: less memory, the same gradients, slower""")
option("--eager", action="store_true", help="""
    do not replay steps as CUDA graphs, for debugging; a step takes twice as long""")
option("--compile", action="store_true", help="""
    torch.compile the towers: a step on one GPU takes a fifth less time, the first one half a minute
    more; needs a C compiler""")
option("--clip_grad", type=natural_float, default=10.0, metavar="X", help="""
    largest norm of the gradient; 0: no clipping""")

option("--seed", type=seed, default=SEED, help="""
    seed of the noise, the bank, the order of the pairs and random weights""")
option("--batch_size", type=at_least_two, metavar="B", help="""
    pairs in a step; each pair is contrasted with the others, so save memory by --accum_steps
    instead; default: 256, or a sixteenth of fewer than 4096 pairs, at least 8""")
option("--checkpoint_path", type=path, default="./logs", metavar="DIR", help="""
    folder of all experiments""")
option("--experiments", type=path, default="ex0", metavar="NAME", help="""
    folder of this run in --checkpoint_path""")
option("--name", help="""
    name of the method in tables; default: NPC or CLIP, with the recipe where it is not the
    paper's""")
option("--wandb", metavar="PROJECT", help="""
    also send TensorBoard's curves to this project of Weights & Biases (pip install wandb)""")
option("--display", type=positive_int, metavar="STEPS", help="""
    steps between two lines of the log and points in TensorBoard; default: points every 20 steps, a
    line a minute at most""")
option("--save_every", type=natural_int, default=0, metavar="STEPS", help="""
    also save the training state every so many steps; 0: only at the end of an epoch""")
option("--keep_checkpoints", type=natural_int, default=2, metavar="K", help="""
    keep the last K checkpoints beside best.pt; 0: all""")
option("--overwrite", action="store_true", help="""
    delete an earlier run in this experiment's folder; default: such a folder is refused""")
option("--force_resume", action="store_true", help="""
    resume although changed options or data make it another run""")

option("--eval", action="store_true", help="""
    score --resume (or the initial model) on the test split and stop""")
option("--eval_batch_size", type=positive_int, metavar="N", help="""
    images or captions that are encoded at a time outside training; changes speed and memory, never
    a score; default: 64 on a CPU, 512 on a GPU""")
option("--dev_length", type=positive_int, metavar="N", help="""
    score an epoch on the first N dev captions; default: all of them""")

option("--format", of="memorybank", choices=("npz", "released"), default="npz", help="""
    npz: ours, with the losses and posteriors; released: the authors' two pickled dictionaries""")
option("--out", of="find_noise", type=path, default="./logs/noise", metavar="DIR", help="""
    folder for suspicious_pairs.csv and suspicious_pairs.html""")
option("--out", of="search", type=path, metavar="FILE", help="""
    PNG file for the pictures that were found; default: a new file in ./logs/search""")
option("--out", of="interpolate", type=path, metavar="FILE", help="""
    checkpoint to write; default: interpolated.pt beside --resume""")
option("--out", of="export", type=path, required=True, metavar="DIR", help="new folder to write")


# ---- commands -----------------------------------------------------------------------------------

FIRST_STEPS = """\
Train on noisy pairs:  python main_NPC.py --dataset coco --dataset_root DIR --noise_ratio 0.2
Score a checkpoint:    python main_NPC.py --eval --resume CKPT
Your own pairs:        docs/own_pairs.md
No data at hand?       make demo (a few minutes on a CPU, it draws its own)
All options:           python main_NPC.py --help; how DIR must look: dataset/README.md"""

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
    if command in HALF_LR and not (sys.argv[1:] if argv is None else argv):
        sys.exit(FIRST_STEPS)
    parser = parser_of(command)
    args = parser.parse_args(argv)
    if command in HALF_LR and args.resume:  # options that are not given are the checkpoint's
        parser.set_defaults(**options_of_checkpoint(parser, args))
        args = parser.parse_args(argv)
    fill_in(parser, command, args)
    return args


def options_of_checkpoint(parser, args):
    """Options of the run that wrote the checkpoint `--resume`, {} if it holds no training state.
    The run goes on in the checkpoint's folder, unless another one is given."""
    saved = options_of(args.resume, Path(args.checkpoint_path, args.experiments))
    others = OF_THIS_COMMAND + (OF_TRAINING if args.eval else ())
    options = {name: value for name, value in saved.items() if name in args and name not in others}
    elsewhere = any(getattr(args, name) != parser.get_default(name)
                    for name in ("checkpoint_path", "experiments"))
    if saved and args.resume != "auto" and not elsewhere:
        folder = Path(args.resume).parent
        if folder.name in ("", ".."):
            folder = folder.resolve()
        options |= {"checkpoint_path": str(folder.parent), "experiments": folder.name}
    return options


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
    """Fill in the defaults that depend on other options or on the machine; refuse options that do
    not go together."""

    def given(name):
        return getattr(args, name, None)

    def of_recipe(name):
        return lambda: getattr(RECIPES[args.recipe], name)

    if command == "cache":
        args.device = torch.device("cpu")
    if given("judge_features"):
        args.judge_rounds = 0
    defaults = {  # in this order, as some depend on others
        "dataset": lambda: (
            "pairs" if (split_folder(args.dataset_root) / "image_name.txt").exists() else "coco"),
        "num_anns": lambda: DATASETS[args.dataset],
        "split": lambda: "all" if args.dataset == "pairs" else "test",
        "noise_seed": lambda: args.seed,
        "device": lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        "vision_model": lambda: DEFAULT_MODEL if args.resume in (None, "auto") else args.resume,
        "precision": lambda: "amp_bf16" if args.device.type == "cuda" else "fp32",
        "eval_batch_size": lambda: 512 if args.device.type == "cuda" else 64,
        "name": lambda: {"paper": command.upper(), "robust": "robust"}.get(
            args.recipe, f"{command.upper()} {args.recipe}"),
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


def number_of_pairs(dataset_root):
    """Lines of train_caps.txt; 10^6 where that file is missing, which reading the data reports."""
    path = split_folder(dataset_root) / "train_caps.txt"
    if not os.path.isfile(path):
        return 10**6
    with open(path, "rb") as f:
        return sum(1 for _ in f)
