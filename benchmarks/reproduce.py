"""Trains and tests the runs of a table of the paper, and sets them beside the published scores.

    python benchmarks/reproduce.py --dataset f30k --dataset_root dataset/Flickr30K
    python benchmarks/reproduce.py --dataset scenes    # on drawings: minutes on a CPU

A method is a file of options, configs/NAME.args or NAME.args in the working folder. Its first line
may name the script that trains it, "# script: mine.py" (default: main_NPC.py), which is looked for
beside the file, in the working folder and in the repository. Each run is tested at its best epoch
and at its last one. Finished runs are skipped, and a stopped one is continued. Options that are not
listed below go to every run. For the job array of a cluster, --print lists the commands:

    python benchmarks/reproduce.py --dataset f30k --dataset_root DIR --print > jobs.txt
    sed -n "${SLURM_ARRAY_TASK_ID}p" jobs.txt | bash
    python benchmarks/reproduce.py --dataset f30k --dataset_root DIR --table
"""

import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver, table
from benchmarks.driver import ROOT, Job
from params import Parser, positive_int, probability
from utils.errors import InputError, command
from utils.reading.layout import ratio_name, read_captions, split_folder
from utils.reading.noise import SEED

NOISE = {"coco": (0.0, 0.2, 0.4, 0.5, 0.6), "f30k": (0.0, 0.2, 0.4, 0.6), "cc": (0.0,),
         "scenes": (0.0, 0.4)}
ROOTS = {"coco": "dataset/MSCOCO", "f30k": "dataset/Flickr30K", "cc": "dataset/CC120K"}
BEST = "best"  # subfolder of a run with the scores of best.pt; the run's own are of its last epoch
SCENES = ["--precision", "fp32", "--batch_size", str(driver.BATCH), "--lr", str(driver.LR),
          "--epochs", "3", "--warmup", "4", "--num_workers", "0", "--device", "cpu"]


def find(name, folders, what):
    """The file `name`, an absolute path or one in the first of `folders` that has it."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{what}: {name} is not in {', '.join(str(f.resolve()) for f in folders)}")


def config_of(method):
    """(script, file of options) of a method."""
    config = find(f"{method.removesuffix('.args')}.args", [Path("."), ROOT / "configs"],
                  "--methods")
    header = re.match(r"#\s*script:\s*(.+)", config.read_text(encoding="utf-8"))
    script = header[1].strip() if header else "main_NPC.py"
    return find(script, [config.parent, Path("."), ROOT], f"{config}, line 1"), config


def make_job(args, more, method, noise, seed):
    """The `Job` of a method, a noise ratio and a seed; `more` are options of every run."""
    script, config = config_of(method)
    run = f"{args.dataset}_{config.stem}_{ratio_name(noise)}_seed{seed}"
    data = "pairs" if args.dataset == "scenes" else args.dataset
    words = [script.resolve(), f"@{config.resolve()}", "--dataset", data, "--dataset_root",
             args.dataset_root, "--noise_ratio", ratio_name(noise), "--seed", seed,
             "--checkpoint_path", args.out, *more]
    folder = args.out / run
    return Job(run, folder, [
        [*words, "--experiments", run, "--resume", "auto"],
        [*words, "--experiments", run, "--eval", "--resume", "auto"],
        [*words, "--experiments", f"{run}/{BEST}", "--eval", "--resume", folder / "best.pt"],
    ], folder, resumed=True)


def scored(job):
    """Whether both of its tests have written their scores."""
    return all((job.folder / test / "eval_test.json").exists() for test in (".", BEST))


def finished(job):
    """Whether the run of a job is finished. Raises InputError where other commands finished it."""
    if (job.folder / "commands.txt").exists() and not job.finished:
        raise InputError(f"{job.folder} was made with other options, see commands.txt in it; "
                         "repeat these, give another --out, or delete the folder")
    return scored(job)


def make_table(jobs, args):
    """Write and print the tables of the finished runs: `best.pt` and the last epoch."""
    runs = []
    for job in filter(scored, jobs):
        last, best = table.read_run(job.folder), table.read_run(job.folder / BEST)
        runs += [best, last._replace(name=f"{last.name}, last epoch")]
    print(f"{len(runs) // 2} of {len(jobs)} runs are finished")
    if runs:
        table.write_tables(runs, args.out / f"table_{args.dataset}")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dataset", choices=NOISE, required=True, help="whose table")
    parser.add_argument("--dataset_root", metavar="DIR",
                        help="folder of the data set (docs/reproduce.md)")
    parser.add_argument("--methods", nargs="+", default=["npc_released", "clip_released"],
                        help="names or paths of files of options")
    parser.add_argument("--noise", nargs="+", type=probability, default=None, metavar="RATIO",
                        help="noise ratios; default: those of the published table")
    parser.add_argument("--seeds", type=positive_int, default=1,
                        help=f"repetitions, from --seed {SEED} on, each with noise, bank and order "
                             "of its own")
    parser.add_argument("--out", type=Path, default=Path("logs/reproduce"), metavar="DIR",
                        help="folder of all runs and of the table")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true",
                      help="print the commands of the runs that are left, a line each, and stop")
    what.add_argument("--table", action="store_true",
                      help="make the table of the runs that are finished, and stop")
    args, more = parser.parse_known_args(argv)
    for option in ("--seed", "--noise_ratio", "--experiments", "--checkpoint_path", "--resume"):
        if option in more:
            parser.error(f"{option} is set for each run; give --seeds, --noise or --out")
    if args.dataset == "scenes":
        scenes = driver.pretraining(args.out / "scenes", 0, source=2000)
        args.dataset_root = args.out / "scenes" / driver.DRAWN
        more = ["--vision_model", args.out / "scenes/pretrained/best.pt", *SCENES, *more]
    elif not args.dataset_root:
        parser.error("--dataset_root is missing: the folder of the data set; with make, "
                     f"ROOT={ROOTS[args.dataset]}")
    else:
        read_captions(split_folder(args.dataset_root) / "train_caps.txt")

    jobs = [make_job(args, more, method, noise, seed)
            for seed in range(SEED, SEED + args.seeds)
            for noise in (args.noise or NOISE[args.dataset]) for method in args.methods]
    left = [job for job in jobs if not finished(job)]
    if args.print:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--print | head` ends it
        for job in left:
            print(job.text.strip().replace("\n", " && "))
        return
    if left and not args.table:
        if args.dataset == "scenes":
            driver.run_jobs([scenes])
        print(f"{len(left)} of {len(jobs)} runs are left")
        driver.run_jobs(left)
    make_table(jobs, args)


if __name__ == "__main__":
    main()
