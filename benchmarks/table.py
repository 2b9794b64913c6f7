"""Turn finished runs into the paper's tables and its figure of R@1 over noise.

    python benchmarks/table.py logs/npc_* logs/clip_* --out logs/tables

A run is a folder in which training has left options.json, log.jsonl and, for NPC, weights.npz, and
in which --eval has left eval_test.json; one without that is left out. A folder of --eval alone
counts as the run whose checkpoint it tested, or as zero-shot where that was not trained on these
data. Runs that differ by nothing but the seed make one row, mean ± standard deviation; beside them
stand the authors' published rows (published.csv, from their README), where the test split has the
size of theirs. Writes tables.md, tables.csv
and r1_over_noise.png.
"""

import csv
import json
import os
import re
import shlex
import sys
from pathlib import Path
from statistics import mean, pvariance, stdev
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from params import Parser
from utils.cleaning.text import markdown
from utils.errors import InputError, command
from utils.files import atomic_write, parsing
from utils.reading.layout import ratio_name
from utils.training.history import read_weights

PUBLISHED = Path(__file__).with_name("published.csv")
METRICS = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
COLUMNS = [*METRICS, "rsum"]
RUN_COLUMNS = ["folder", "noise", "seed", "epochs", "best epoch", "dev mean R@1", "mean w"]
TITLES = {"f30k": "Flickr30K", "cc": "CC120K"}
ROUTINE = {  # options that say where and how fast, but not what is trained; or are columns here
    "dataset", "dataset_root", "num_anns", "noise_ratio", "seed", "noise_seed", "bank",
    "num_workers", "data_on", "image_cache", "eval_batch_size", "dev_length", "resume",
    "force_resume", "device", "accum_steps", "grad_checkpointing", "compile", "checkpoint_path",
    "experiments", "name", "display", "save_every", "keep_checkpoints", "eval",
}
FIRST = ("recipe", "weighting", "memory", "memory_loss_weight", "train_on", "freeze", "epochs",
         "lr")  # options that a method is named by, if they tell it apart
PUBLISHED_IMAGES = {"Flickr30K": 1000, "MSCOCO 1K": 5000, "MSCOCO 5K": 5000, "CC120K": 1000}
STAR = ("\\* The authors' MSCOCO 1K rows repeat image-to-text R@10 in the column of text-to-image "
        "R@10, as their script sums the wrong one; the true values are not known.")


class Run(NamedTuple):
    """A run that was scored. `options` are those of its training, None for a zero-shot model; they
    and `log`, the lines of log.jsonl, are as written. `scores`: {table: {metric: percent}}."""

    folder: Path
    options: dict | None
    name: str
    scores: dict
    log: list
    mean_weight: float | None
    test_images: int | None = None  # in the test split, if that is known


class Row(NamedTuple):
    """A line of a table. `noise` is None for a zero-shot model, `seeds` the number of runs, 0 for
    a published row. `mean` and `std`: {column: percent}; std is None where there is one run."""

    table: str
    noise: float | None
    method: str
    seeds: int
    mean: dict
    std: dict | None = None

    @property
    def label(self):
        return self.method if self.seeds else f"{self.method} (published)"


# ---- reading ------------------------------------------------------------------------------------


def read_json(path, lines=False):
    """The object in a .json file, or the list of those in the lines of a .jsonl file."""
    with parsing(path, "what a run writes", "run it again, or leave its folder out"):
        text = path.read_text(encoding="utf-8")
        objects = [dict(json.loads(part)) for part in (text.splitlines() if lines else [text])]
    return objects if lines else objects[0]


def read_run(folder):
    """The `Run` of a folder, None where it was not scored. Raises InputError when a file of it is
    broken."""
    try:
        return _read_run(Path(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: a .json file of it lacks what every run writes ({error}); "
                         "train or evaluate it again") from error


def _read_run(folder):
    if not (folder / "eval_test.json").exists():
        what = shlex.join(["--resume", str(folder / "best.pt"), "--checkpoint_path",
                           str(folder.parent), "--experiments", folder.name])
        print(f"left out {folder}, which has no eval_test.json; make it with the script and the "
              f"data options of that run and --eval {what}")
        return None
    trained, scored = folder, folder / "options_eval.json"
    evaluated = read_json(scored) if scored.exists() else {}
    if (folder / "options.json").exists():
        options = here = read_json(folder / "options.json")
        resume = evaluated.get("resume")
        if resume and Path(resume).parent.name != folder.name:
            raise InputError(f"{folder}/eval_test.json has the scores of {resume}, which is not "
                             "of that run; evaluate it with --experiments of its own")
    else:
        here = read_json(folder / "options_eval.json")
        trained = Path(here["resume"]).parent if here["resume"] else folder
        options = None
        if (trained / "options.json").exists():
            options = read_json(trained / "options.json")
            if os.path.abspath(options["dataset_root"]) != os.path.abspath(here["dataset_root"]):
                options = None
    log, weights = trained / "log.jsonl", trained / "weights.npz"
    if options:
        options["noise_ratio"], options["seed"] = float(options["noise_ratio"]), options["seed"]
    return Run(folder, options, options["name"] if options else zero_shot_name(here),
               tables_of(here, read_json(folder / "eval_test.json"), folder),
               read_json(log, lines=True) if options and log.exists() else [],
               np.nanmean(read_weights(weights)) if options and weights.exists() else None,
               evaluated.get("test_images"))


def zero_shot_name(options):
    """What to call a model that was not trained on the data."""
    return "zero-shot" + (f" {options['resume']}" if options["resume"] else "")


def tables_of(options, scores, folder):
    """{table: {column: percent}} of the content of an eval_test.json."""
    if options["dataset"] == "coco":
        tables = {f"MSCOCO {size}": scores.get(size, {}) for size in ("1K", "5K")}
    else:
        tables = {TITLES.get(options["dataset"], Path(options["dataset_root"]).name): scores}
    for own in tables.values():
        if missing := [column for column in COLUMNS if column not in own]:
            raise InputError(f"{folder}/eval_test.json lacks {missing[0]}; run --eval again")
        own.update({column: float(own[column]) for column in COLUMNS})
    return tables


def published_rows():
    """The authors' `Row`s. Where t2i R@10 is wrong (see `STAR`), there is no rsum."""
    rows = []
    with open(PUBLISHED, encoding="utf-8", newline="") as f:
        for line in csv.DictReader(f):
            known = {m: float(line[m]) for m in METRICS if not line[m].endswith("*")}
            if len(known) == len(METRICS):
                known["rsum"] = sum(known.values())
            rows.append(Row(line["dataset"], float(line["noise_ratio"]), line["method"], 0, known))
    return rows


def comparable(row, runs):
    """Whether the test split of all runs in a published row's table has the published size."""
    return all(run.test_images == PUBLISHED_IMAGES[row.table]
               for run in runs if row.table in run.scores)


# ---- gathering ----------------------------------------------------------------------------------


def method_names(runs):
    """Name of each run's method: --name, and of the options in which runs of that name differ those
    that it takes to tell them apart."""
    names = []
    for run in runs:
        same_name = [other.options for other in runs if other.name == run.name and other.options]
        keys = telling_apart(same_name) if run.options else ()
        names.append(", ".join([run.name, *(f"{k} {in_name(run.options[k])}" for k in keys)]))
    return names


def telling_apart(options):
    """The names of options, taken in turn, each of which tells dictionaries of options apart that
    those before it do not: a recipe sets several others, which say no more than it does."""
    keys = set.intersection(*map(set, options)) - ROUTINE
    keys = [*(key for key in FIRST if key in keys), *sorted(keys - set(FIRST))]

    def groups(keys):
        return len({tuple(in_name(own[key]) for key in keys) for own in options})

    chosen = []
    for key in keys:
        if groups([*chosen, key]) > groups(chosen):
            chosen.append(key)
    return chosen


def in_name(value):
    """An option's value as text; of a checkpoint its file name, as each seed may have its own."""
    text = str(value)
    return Path(text).name if Path(text).suffix in (".pt", ".pth") else text


def gather(runs):
    """`Row`s of runs, those that differ by the seed in one. Raises InputError when two have the
    same seed, too."""
    groups = {}
    for run, method in zip(runs, method_names(runs), strict=True):
        noise, seed = ((run.options["noise_ratio"], run.options["seed"]) if run.options
                       else (None, str(run.folder)))
        for table, scores in run.scores.items():
            group = groups.setdefault((table, noise, method), {})
            if seed in group:
                raise InputError(f"{group[seed][0]} and {run.folder} are the same experiment with "
                                 f"the same seed {seed}; leave one of them out")
            group[seed] = run.folder, scores
    rows = []
    for key, group in groups.items():
        values = {c: [scores[c] for _, scores in group.values()] for c in COLUMNS}
        std = {c: stdev(v) for c, v in values.items()} if len(group) > 1 else None
        rows.append(Row(*key, len(group), {c: mean(v) for c, v in values.items()}, std))
    return rows


def variances(rows):
    """[(label, noise ratios, variance of i2t R@1 over them)] of a table's methods that have two or
    more: the paper's measure of robustness."""
    over = {}
    for row in rows:
        if row.noise is not None:
            over.setdefault(row.label, {})[row.noise] = row.mean["i2t_R@1"]
    return [(label, sorted(scores), pvariance(scores.values()))
            for label, scores in over.items() if len(scores) > 1]


# ---- writing ------------------------------------------------------------------------------------


def document(tables, runs):
    """All tables as Markdown. tables: {title: [Row]}."""
    parts = []
    for title, rows in tables.items():
        head = ["noise", "method", "seeds", "i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10",
                "rsum"]
        lines = [[noise_name(row), row.label, str(row.seeds or "–"),
                  *(cell(row, column) for column in COLUMNS)] for row in rows]
        parts += [f"### {title}", markdown(head, lines)]
        if any("t2i_R@10" not in row.mean for row in rows):
            parts.append(STAR)
        if found := differences(rows):
            parts.append(markdown(["less the published row", "noise", *head[3:]], found))
        if found := variances(rows):
            parts.append(markdown(["method", "noise ratios", "variance of i2t R@1"],
                                  [[label, ", ".join(map(percent, ratios)), f"{variance:.2f}"]
                                   for label, ratios, variance in found]))
        own = {row.label for row in rows if row.seeds and row.noise is not None}
        if own and not own & {label for label, *_ in found}:
            parts.append("A variance over noise ratios takes runs of two or more of them.")
    parts += ["### Runs", markdown(RUN_COLUMNS, map(run_line, runs))]
    return "\n\n".join(parts) + "\n"


def differences(rows):
    """Cells of our rows less the published ones of their noise and method, where there is one: that
    whose name ours begins with, as npc_released does with NPC."""
    published = {(row.noise, row.method): row.mean for row in rows if not row.seeds}
    lines = []
    for row in rows:
        other = published.get((row.noise, re.match("[A-Za-z]*", row.method)[0].upper()))
        if row.seeds and other:
            lines.append([row.method, noise_name(row), *(
                f"{row.mean[c] - other[c]:+.1f}" if c in other else "–" for c in COLUMNS)])
    return lines


def run_line(run):
    """What a run's log says about it, as text for `RUN_COLUMNS`."""
    if run.options is None:
        return [str(run.folder), *["–"] * (len(RUN_COLUMNS) - 1)]
    best = max(run.log, key=lambda line: (line["dev"]["mean_R1"], line["epoch"]), default=None)
    return [str(run.folder), percent(run.options["noise_ratio"]), str(run.options["seed"]),
            f"{len(run.log)} of {run.options['epochs']}", str(best["epoch"]) if best else "–",
            f"{best['dev']['mean_R1']:.1f}" if best else "–",
            "–" if run.mean_weight is None else f"{run.mean_weight:.3f}"]


def percent(ratio):
    return f"{100 * ratio:g} %"


def noise_name(row):
    if row.noise is None:
        return "–"
    return "real" if row.table == "CC120K" and row.noise == 0 else percent(row.noise)


def cell(row, column):
    if column not in row.mean:
        return f"{row.mean['i2t_R@10']:.1f}\\*" if column == "t2i_R@10" else "–"
    spread = f" ± {row.std[column]:.1f}" if row.std else ""
    return f"{row.mean[column]:.1f}{spread}"


def write_csv(f, tables):
    """The rows with all digits; an unknown value is an empty field."""
    table = csv.writer(f, lineterminator="\n")
    table.writerow(["table", "noise_ratio", "method", "published", "seeds", *COLUMNS,
                    *(f"{column} std" for column in COLUMNS)])
    for rows in tables.values():
        for row in rows:
            noise = "" if row.noise is None else ratio_name(row.noise)
            std = row.std or {}
            table.writerow([row.table, noise, row.method, int(not row.seeds), row.seeds or "",
                            *(digits(row.mean.get(column)) for column in COLUMNS),
                            *(digits(std.get(column)) for column in COLUMNS)])


def digits(value):
    return "" if value is None else f"{value:.6g}"


def figure(tables):
    """R@1 both ways over the noise ratio, a row of plots for each table: a `Figure`."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 3.6 * len(tables)), layout="constrained")
    methods = dict.fromkeys(row.method for rows in tables.values() for row in rows)
    colours = {method: f"C{k}" for k, method in enumerate(sorted(methods, key=str.lower))}
    for (title, rows), axes in zip(tables.items(), fig.subplots(len(tables), 2, squeeze=False),
                                   strict=True):
        for ax, metric, way in zip(axes, ("i2t_R@1", "t2i_R@1"),
                                   ("image-to-text", "text-to-image"), strict=True):
            for label in dict.fromkeys(row.label for row in rows):
                draw(ax, [row for row in rows if row.label == label], metric, colours)
            ax.set(title=title, xlabel="noise (%)", ylabel=f"{way} R@1 (%)")
            ax.grid(alpha=0.3)
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return fig


def draw(ax, rows, metric, colours):
    """One method's R@1 over the noise; a zero-shot model, which has none, as a level."""
    first = rows[0]
    label = first.label.replace("$", r"\$")  # else it is mathematics
    style = {"color": colours[first.method], "label": label}
    values = [row.mean[metric] for row in rows]
    if first.noise is None:
        ax.axhline(values[0], linestyle=":", **style)
        return
    error = [row.std[metric] if row.std else 0 for row in rows]
    ax.errorbar([100 * row.noise for row in rows], values, error if any(error) else None,
                fmt="o-" if first.seeds else "o--", markersize=5, capsize=3,
                markerfacecolor=None if first.seeds else "white", **style)


def write_tables(runs, out, published=True):
    """Write tables.md, tables.csv and the figure of runs to the folder `out`, beside the published
    rows or without them, and print the tables."""
    rows = gather(runs)
    titles = sorted({row.table for row in rows})
    if published:
        rows += [row for row in published_rows() if row.table in titles and comparable(row, runs)]
    rows.sort(key=lambda row: (-1 if row.noise is None else row.noise, row.seeds > 0, row.method))
    tables = {title: [row for row in rows if row.table == title] for title in titles}

    text = document(tables, runs)
    with atomic_write(out / "tables.md") as f:
        f.write(text)
    with atomic_write(out / "tables.csv") as f:
        write_csv(f, tables)
    with atomic_write(out / "r1_over_noise.png", "wb") as f:
        figure(tables).savefig(f, format="png", dpi=150)
    for title in PUBLISHED_IMAGES.keys() & tables.keys():
        if published and all(row.seeds for row in tables[title]):
            print(f"{title} has no published rows beside it, whose {PUBLISHED_IMAGES[title]} test "
                  "images are not those of these runs")
    print(f"{text}\nwrote tables.md, tables.csv and r1_over_noise.png to {out}")


@command
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("logs/tables"), metavar="DIR",
                        help="folder for the tables and the figure (default: %(default)s)")
    parser.add_argument("--no_published", action="store_true",
                        help="leave out the authors' rows; for data of your own in the layout of "
                             "one of their data sets")
    args = parser.parse_intermixed_args(argv)

    folders = {os.path.realpath(folder): folder for folder in args.runs}
    runs = [run for folder in folders.values() if (run := read_run(folder))]
    if not runs:
        raise InputError("no run among these has scores: there is nothing to make tables of")
    write_tables(runs, args.out, not args.no_published)


if __name__ == "__main__":
    main()
