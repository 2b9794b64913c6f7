"""Every option of every command: its meaning, its default, its check."""

import argparse
import difflib
import os
import re
import shlex
import sys

from utils.method.recipes import RECIPES
from utils.method.weightings import WEIGHTINGS
from utils.reading.layout import DATASETS, SPLITS, split_folder
from utils.reading.noise import KINDS, SEED

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16", "fp16")
ADAMW = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}  # CLIP's
SCORES = ("judge", "loss", "cosine", "npc")
NEIGHBOURS = 15  # of a judge that is not the paper's
CLEAN_THRESHOLD, PAPER_CLEAN_THRESHOLD = 0.8, 0.9
HALF_LR = {"npc": 2e-7, "clip": 5e-7}  # of commands that train, for half weights: the authors'


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
    """argparse whose errors are one line, with the nearest option or choice to a mistyped one."""

    def __init__(self, description, usage=None):
        super().__init__(usage=usage, description=description, allow_abbrev=False,
                         formatter_class=Help, fromfile_prefix_chars="@")

    def convert_arg_line_to_args(self, line):
        """The words of a line of a file of options, @FILE; # begins a comment."""
        return shlex.split(line, comments=True)

    def error(self, message):
        said, _, offered = message.partition("(choose from")
        words, choices = re.findall(r"[\w.@/-]+", said), re.findall(r"[\w.@/-]+", offered)
        if said.startswith("unrecognized arguments"):
            choices = list(self._option_string_actions)
        near = [match for word in reversed(words) if word not in choices
                for match in difflib.get_close_matches(word, choices, 1)]
        hint = f"did you mean {near[0]}? " if near else ""
        self.exit(2, f"error: {message} ({hint}{self.prog} --help lists the options)\n")


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
probability = number(float, 0, 1, "a number from 0 to below 1")
ratio = number(float, 0, 1, "a number from 0 to below 1 (0.2 is 20 %)")


def device(text):
    """An argparse type: cpu, cuda or cuda:N as a torch.device."""
    import torch

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
    image_name.txt; without it pairs where that file is, else coco""")
option("--dataset_root", default="./dataset/MSCOCO", help="""
    folder of the data set, with annotations/ and images/ (dataset/README.md)""")
option("--num_anns", type=positive_int, help="""
    captions per line of train_ids.txt; without it 5 for coco and f30k, 1 for cc, whatever fits for
    pairs""")
option("--noise_ratio", type=ratio, default=0.0, help="""
    share of training captions that are shuffled, in [0, 1); the caption file of this ratio, kind
    and seed is made when it is missing""")
option("--noise_kind", choices=KINDS, default="random", help="""
    random: the drawn captions are shuffled, as in the paper; similar: each changes places with the
    most similar one of another image, a near miss, as mistakes often are""")
option("--noise_seed", type=seed, help="""
    seed of the noise and of the memory bank; without it --seed. Give that of another run to repeat
    its training alone, on the same noise and bank""")
option("--context_length", type=at_least_two, default=77, help="""
    longest caption in tokens, both end marks included; longer ones are cut; at most the model's (77
    for all published ones)""")
option("--num_workers", type=natural_int, default=min(8, os.cpu_count() or 1), help="""
    processes that read images; 0 reads in the main process, which is best for very small images""")
option("--data_on", choices=("auto", "device", "workers"), default="auto", help="""
    where the decoded images stay between steps and passes: in the memory of the device, or nowhere,
    and worker processes read them each time; auto: on the device if they fill at most a third of
    it, else with workers, as always under torchrun or where one pass is made""")
option("--image_cache", default="off", metavar="off|DIR", help="""
    keep the decoded and cropped images in a file in this folder, 0.15 MB each at 224 pixels; later
    passes and runs read them from there, bit for bit the same""")
option("--cache", dest="image_cache", metavar="DIR", default="off", help="""
    folder of the image cache: 0.15 MB an image at 224 pixels""")
option("--list_items", metavar="DIR", help="""
    list the distinct training images and captions there, for a model of another kind that is to
    judge them (--judge_features)""")

option("--vision_model", of="cache", default="ViT-B/32", metavar="NAME|PATH", help="""
    model whose resolution the images are cut to""")
option("--vision_model", metavar="NAME|PATH", help="""
    initial model: one of OpenAI's (ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, RN50, RN101,
    RN50x4, RN50x16, RN50x64), tiny (random weights), a checkpoint file, a folder of open_clip or
    transformers, or a model of either on the Hugging Face hub (hf-hub:ORG/NAME, or ORG/NAME where
    that is no path); default: ViT-B/32, or the model in --resume""")
option("--resume", metavar="CKPT", help="""
    checkpoint to start from; in training, a state of the same script is continued where it stopped,
    and auto is the newest intact one of this experiment, if there is any""")
option("--resume", of="interpolate", required=True, metavar="CKPT", help="the trained model")
option("--resume", of="export", required=True, metavar="CKPT", help="checkpoint to export")
option("--initial", required=True, metavar="NAME|PATH", help="""
    the model that it started from, as for --vision_model in training""")
option("--activation", choices=("quick_gelu", "gelu"), help="""
    of the model's transformers, where a file holds nothing but weights; OpenAI's, MetaCLIP's and
    DFN's models have quick_gelu, LAION's and DataComp's gelu; without it quick_gelu, and the log
    says so""")
option("--device", type=device, help="cpu or cuda; without it cuda where there is one")
option("--precision", choices=PRECISIONS, help="""
    fp32; amp_bf16 or amp_fp16: half-precision arithmetic on fp32 weights; fp16: weights and
    optimiser state in half, as the released script runs on a GPU. Without it amp_bf16 on cuda, fp32
    on cpu""")

option("--recipe", choices=RECIPES, help="""
    follow the paper; what the authors' released script does; or robust, training on what a better
    judge finds clean (docs/fidelity.md)""")
option("--weighting", choices=WEIGHTINGS, help=lambda: (  # of the table as it is by then
    "weight of a pair's loss: "
    + "; ".join(f"{name}: {w.help}" for name, w in WEIGHTINGS.items())
    + "; without it npc, or none for --recipe robust"))
option("--memory", choices=("nearest", "random"), default="nearest", help="""
    memory entries of a batch: the clean pairs nearest to its images and captions, as in the paper,
    or clean pairs by chance""")
option("--memory_loss_weight", type=natural_float, help="""
    factor of the loss on the memory entries; 0 turns it off; without it 1, or 0 for --recipe
    robust""")
option("--train_on", choices=("all", "clean"), help="""
    draw the batches from all pairs or from the strict clean set alone, whose epochs are shorter;
    without it all, or clean for --recipe robust""")
option("--clean_threshold", type=probability, help=f"""
    posterior above which a pair is in the strict clean set; raise it when precision is low, lower
    it when the set is small; without it {PAPER_CLEAN_THRESHOLD} with the paper's judge,
    {CLEAN_THRESHOLD} with others""")
option("--min_clean", type=probability, default=0.02, help="""
    smallest share of pairs in the strict clean set: when fewer pass the threshold, it is made of
    the least suspicious pairs instead""")

option("--judge_rounds", type=natural_int, metavar="N", help="""
    times that the judge learns from the pairs which it finds clean, then judges again; 0: the
    initial model judges; without it 0, or 2 for --recipe robust""")
option("--judge_steps", type=positive_int, default=32, metavar="K", help="""
    optimiser steps of a round; many more overfit""")
option("--judge_neighbours", type=natural_int, metavar="K", help=f"""
    before the first round a pair must also agree with the K nearest neighbours of its image and
    caption; 0: not; without it {NEIGHBOURS} with rounds or for --recipe robust, else 0, the
    paper's""")
option("--search_among", type=at_least_two, metavar="N", help="""
    look for these neighbours, and find_noise.py for its best captions and clean pairs, among N
    random items, so that the time grows with the number of pairs rather than its square: 16384 for
    a million pairs on a CPU; fewer find a little less; without it among all""")
option("--judge_lr", type=natural_float, metavar="LR", help="""
    learning rate of the rounds; without it that from 1e-6 to 1e-3 which works best on images held
    out""")
option("--judge", metavar="NAME|PATH", help="""
    another model that judges, as for --vision_model; without it the initial model""")
option("--judge_features", metavar="PATH", help="""
    judge by the features of a model of any kind, in this .npz file or folder
    (docs/finding_noise.md); no model is asked and there are no rounds then""")

option("--score", choices=SCORES, default="judge", help="""
    what makes a pair suspicious: what the judge says; a high loss among the pairs of its batch; a
    low cosine; a low mean weight in an NPC run (--weights)""")
option("--weights", metavar="FILE", help="""
    weights.npz of an NPC run on the same captions, for --score npc""")
option("--labels", metavar="FILE", help="""
    decisions.csv of the HTML page, or suspicious_pairs.csv with its column decision filled in: says
    how many pairs are wrong and how right each --keep_above is, and overrules what was computed""")
option("--wanted_precision", type=probability, default=0.95, help="""
    with --labels: share of right pairs among those kept, for which a --keep_above is proposed""")
option("--worst", type=positive_int, default=200, help="""
    pairs on the HTML page; the CSV file holds all""")
option("--write_clean", metavar="DIR", help="""
    also make a data set in this new folder, without the pairs that are probably wrong, whatever
    --score is, and with the same images, dev and test split""")
option("--keep_above", type=probability, default=0.5, help="""
    smallest posterior of being clean that --write_clean keeps; raise it for fewer and cleaner
    pairs""")

option("query", help="a text, which finds images, or an image file, which finds captions")
option("--split", choices=(*SPLITS, "all"), help="""
    split of the data set that is searched; without it all for --dataset pairs, else test""")
option("--top", type=positive_int, default=10, help="results to show and draw")

option("--epochs", type=positive_int, default=10, help="""
    passes over the pairs that are trained on; fewer where dev scores fall again at the end""")
option("--lr", type=natural_float, help="""
    peak learning rate; without it 1e-5, which suits CLIP at any number of pairs, or for --precision
    fp16 the authors' 2e-7 (NPC) and 5e-7 (CLIP), which are too small elsewhere
    (docs/precision.md)""")
option("--warmup", type=natural_int, help="""
    optimiser steps of linear warm-up; without it 500, but at most a tenth of all steps unless
    --recipe released""")
option("--beta1", type=probability, help="""
    AdamW's decay of the mean gradient; CLIP's, seldom changed""")
option("--beta2", type=probability, help="""
    AdamW's decay of the squared gradient; CLIP's, seldom changed""")
option("--eps", type=natural_float, help="""
    AdamW's epsilon; with --precision fp16 it sets the step as much as --lr does, so that both
    change together""")
option("--weight_decay", type=natural_float, help="""
    AdamW's decoupled weight decay, on all parameters; a step decays by this times the learning
    rate: at 1e-6 it hardly matters""")
option("--freeze", choices=("none", "image", "text"), default="none", help="""
    tower that keeps its weights, where there are few pairs or the other tower alone is new; the
    temperature is trained in any case""")
option("--accum_steps", type=positive_int, default=1, help="""
    encode a batch in so many pieces and compute each again in the backward pass: less memory, the
    same gradients, slower""")
option("--grad_checkpointing", action="store_true", help="""
    keep only the input of each residual block and compute the rest again in the backward pass: less
    memory, the same gradients, slower""")
option("--eager", action="store_true", help="""
    launch each operation of a step by itself, for debugging; without it a step on a GPU, in
    amp_bf16 or fp32, is captured as a CUDA graph for each of a few shapes and then replayed, which
    takes half the time""")
option("--compile", action="store_true", help="""
    also have torch.compile fuse what surrounds attention in the towers: a step on a GPU takes a
    fifth less, the first one half a minute more; it needs a C compiler""")
option("--clip_grad", type=natural_float, default=10.0, help="""
    largest norm of the gradient; 0 leaves it alone; lower it when grad_norm in the log has
    spikes""")

option("--seed", type=seed, default=SEED, help="""
    seed of the noise, the bank, the order of the pairs and random weights; change it for another
    repetition of all of it""")
option("--batch_size", type=at_least_two, help="""
    pairs in a step; every pair is contrasted with the others of its batch; for less memory rather
    use --accum_steps; without it 256, or for fewer than 4096 pairs a sixteenth of them, at least
    8""")
option("--checkpoint_path", default="./logs", help="""
    folder of all experiments; one on a disk with room""")
option("--experiments", default="ex0", help="""
    name of this experiment's folder in it; a new one for each run""")
option("--name", help="name that is stored in the checkpoints, and shown by benchmarks/table.py")
option("--display", type=positive_int, default=20, help="""
    steps between two lines of the log and points in TensorBoard, which an epoch's end also
    gives""")
option("--save_every", type=natural_int, default=0, metavar="STEPS", help="""
    save the training state every so many steps too, where an epoch is too long to lose; 0: at each
    epoch's end alone""")
option("--keep_checkpoints", type=natural_int, default=2, metavar="K", help="""
    keep the last K checkpoints beside best.pt (each takes 20 bytes a parameter for NPC in fp32); 0:
    all epochs""")
option("--overwrite", action="store_true", help="""
    delete what an earlier run has left in that folder, once data and model are read; without it
    such a folder is refused""")
option("--force_resume", action="store_true", help="""
    resume although options or data that make it another run changed, when you mean it""")

option("--eval", action="store_true", help="""
    score --resume (or the initial model) on the test split and stop""")
option("--eval_batch_size", type=positive_int, help="""
    images or captions that are encoded at a time outside training; changes speed and memory, never
    a score; without it 64 on a CPU, 512 on a GPU""")
option("--dev_length", type=positive_int, help="""
    use only so many dev captions for choosing the best epoch, where scoring takes long; without it
    all of them""")

option("--format", of="memorybank", choices=("npz", "released"), default="npz", help="""
    npz: ours, with the losses and posteriors; released: the authors' two pickled dictionaries""")
option("--out", of="find_noise", default="./logs/noise", metavar="DIR", help="""
    folder for suspicious_pairs.csv and suspicious_pairs.html""")
option("--out", of="search", metavar="FILE", help="""
    contact sheet of the results, a PNG; without it a new file in ./logs/search for each query""")
option("--out", of="interpolate", metavar="FILE", help="""
    checkpoint to write; without it interpolated.pt beside --resume""")
option("--out", of="export", required=True, metavar="DIR", help="new folder to write")


# ---- commands -----------------------------------------------------------------------------------

EXAMPLES = {  # first line of each --help
    "npc": "main_NPC.py --recipe robust --dataset_root dataset/mine --experiments mine",
    "clip": "main_CLIP.py --dataset_root dataset/mine --experiments clip",
    "memorybank": "get_memorybank.py --dataset_root dataset/mine --judge_rounds 2",
    "noise": "construct_noise.py --dataset_root dataset/mine --noise_ratio 0.4",
    "cache": "data.py --dataset_root dataset/mine --cache DIR",
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
    "run": "experiments batch_size seed checkpoint_path name display save_every keep_checkpoints "
           "overwrite force_resume",
    "optimisation": f"epochs lr warmup {' '.join(ADAMW)} freeze {SAVERS} eager compile clip_grad",
    "evaluation": "eval eval_batch_size dev_length"}
JUDGED = {"clip_grad": 10.0, **ADAMW}  # what trains the judge of other commands
COMMANDS = {  # name: what it does, its options by group, defaults of its own
    "npc": ("Train or evaluate NPC.",
            {"data": DATA, "model": MODEL, **TRAINING,
             "method": f"recipe weighting memory memory_loss_weight train_on {CLEAN}",
             "judge": JUDGE}, {"name": "NPC", "recipe": "paper", **ADAMW}),
    "clip": ("Train or evaluate the CLIP baseline.",
             {"data": DATA, "model": MODEL, **TRAINING, "method": f"recipe train_on {CLEAN}",
              "judge": JUDGE}, {"name": "CLIP", "recipe": "paper", **ADAMW}),
    "memorybank": ("Build the memory bank of a training set.",
                   {"data": DATA, "model": MODEL, "method": f"recipe format {CLEAN}",
                    "judge": f"{JUDGE} {SAVERS}", "run": "seed batch_size",
                    "evaluation": "eval_batch_size"}, {"recipe": "paper", **JUDGED}),
    "noise": ("Make a noisy caption file.", {"data": SET, "run": "seed"}, {}),
    "cache": ("Decode all images ahead.",
              {"data": f"{SET} context_length num_workers cache list_items vision_model",
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
    fill_in(parser, command, args)
    return args


def help_first(command, name):
    """Answer `--help`, or no options at all, before the script called `name` imports what takes
    seconds, if it is the one that runs."""
    if name == "__main__" and ({"-h", "--help"} & {*sys.argv} or not sys.argv[1:]):
        parse_args(command)


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
    """Options that depend on others or on the machine, where they are not given."""
    import torch

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
        "precision": lambda: "amp_bf16" if args.device.type == "cuda" else "fp32",
        "eval_batch_size": lambda: 512 if args.device.type == "cuda" else 64,
        "batch_size": lambda: min(256, max(8, number_of_pairs(args.dataset_root) // 16)),
        "lr": lambda: HALF_LR[command] if args.precision == "fp16" else 1e-5,
        **{name: of_recipe(name) for name in ("weighting", "memory_loss_weight", "train_on",
                                              "judge_rounds")},
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

    if given("resume") == "":
        parser.error("--resume '' names no checkpoint")
    if "precision" in args and args.device.type == "cuda":
        if (args.device.index or 0) >= torch.cuda.device_count():
            parser.error(f"--device {args.device}: torch sees {torch.cuda.device_count()} CUDA "
                         "devices here; --device cpu works everywhere")
    if given("compile"):
        from utils.method.optimizer import replays

        if not replays(args):
            parser.error("--compile is for steps that are replayed: on a GPU, in amp_bf16 or fp32, "
                         "without --eager")
    if command == "cache" and (args.image_cache == "off") == (args.list_items is None):
        parser.error("give one of --cache DIR and --list_items DIR")
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
    """Lines of train_caps.txt; without that file, of which reading the data will tell, plenty."""
    path = split_folder(dataset_root) / "train_caps.txt"
    if not os.path.isfile(path):
        return 10**6
    with open(path, "rb") as f:
        return sum(1 for _ in f)
