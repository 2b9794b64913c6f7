"""Writes the paper's tables and its figure of R@1 over noise from finished runs.

    python benchmarks/table.py logs/npc_* logs/clip_* --out logs/tables

A run is a folder with the options.json of a training and the eval_test.json of --eval, of any
script. A folder of --eval alone counts as the run whose checkpoint it scored, or as zero-shot where
that was not trained on these data. The --name of a run is the name of its row. Runs of one name and
noise that differ by the seed make one row, mean ± standard deviation. The authors' published rows
(published.csv, from their README) stand beside them where the test split has the published size.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver
from params import Parser
from utils.errors import InputError, command
from utils.files import atomic_write, parsing
from utils.reading.layout import ratio_name

PUBLISHED = Path(__file__).with_name("published.csv")
METRICS = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
COLUMNS = [*METRICS, "rsum"]
HEAD = ["noise", "method", "seeds", "i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rsum"]
TITLES = {"f30k": "Flickr30K", "cc": "CC120K"}
PUBLISHED_IMAGES = {"Flickr30K": 1000, "MSCOCO 1K": 5000, "MSCOCO 5K": 5000, "CC120K": 1000}
WRONG = ("† The authors' MSCOCO 1K rows repeat image-to-text R@10 in the column of text-to-image "
         "R@10, as their script sums the wrong key; the true values are not known.")


class Run(NamedTuple):
    """A run that was scored. noise and seed are None for a zero-shot model. scores: {table:
    {metric: percent}}. log: the lines of log.jsonl. test_images: None if not known."""

    folder: Path
    name: str
    noise: float | None
    seed: int | None
    epochs: int | None
    scores: dict
    log: list
    test_images: int | None


class Row(NamedTuple):
    """A line of a table. noise is None for a zero-shot model. seeds: the number of runs, 0 for a
    published row. mean and std: {column: percent}; std is None where there is one run."""

    table: str
    noise: float | None
    method: str
    seeds: int
    mean: dict
    std: dict | None = None

    @property
    def label(self):
        return self.method if self.seeds else f"{self.method} (published)"

    @property
    def cells(self):
        """The line as text, as `HEAD` has it."""
        real = self.table == "CC120K" and self.noise == 0
        return ["real" if real else percent(self.noise), self.label, str(self.seeds or "–"),
                *map(self.cell, COLUMNS)]

    def cell(self, column):
        if column not in self.mean:
            return f"{self.mean['i2t_R@10']:.1f}†" if column == "t2i_R@10" else "–"
        return f"{self.mean[column]:.1f}" + (f" ± {self.std[column]:.1f}" if self.std else "")


# ---- reading ------------------------------------------------------------------------------------


def read_json(path, lines=False):
    """The object in a .json file, or the list of those in the lines of a .jsonl file."""
    with parsing(path, "what a run writes", "run it again, or leave its folder out"):
        text = path.read_text(encoding="utf-8")
        objects = [dict(json.loads(part)) for part in (text.splitlines() if lines else [text])]
    return objects if lines else objects[0]


def read_run(folder):
    """The `Run` of a folder; None, with a line that says so, where it was not scored. Raises
    InputError when a file of it is broken."""
    folder = Path(folder)
    if not (folder / "eval_test.json").exists():
        print(f"left out {folder}, which has no eval_test.json; score it with --eval --resume "
              f"{shlex.quote(str(folder / 'best.pt'))} --experiments {shlex.quote(folder.name)}")
        return None
    try:
        return scored_run(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: a .json file of it lacks what every run writes ({error}); "
                         "train or evaluate it again") from error


def scored_run(folder):
    """The `Run` of a folder that has scores."""
    here = read_json(folder / "options_eval.json")
    scores = tables_of(here, read_json(folder / "eval_test.json"), folder)
    resume, trained = here["resume"], folder
    if not (folder / "options.json").exists():
        trained = Path(resume).parent if resume else folder
    elif resume != "auto" and Path(resume or "").parent.name != folder.name:
        raise InputError(f"{folder}/eval_test.json has the scores of {resume or 'a model'}, which "
                         "is not of that run; evaluate it with --experiments of its own")
    path = trained / "options.json"
    options = read_json(path) if path.exists() else None
    if not options or len({os.path.abspath(o["dataset_root"]) for o in (options, here)}) > 1:
        name = f"zero-shot {resume}" if resume else "zero-shot"
        return Run(folder, name, None, None, None, scores, [], here.get("test_images"))
    log = trained / "log.jsonl"
    return Run(folder, options["name"], float(options["noise_ratio"]), options["seed"],
               options["epochs"], scores, read_json(log, lines=True) if log.exists() else [],
               here.get("test_images"))


def tables_of(options, scores, folder):
    """{table: {column: percent}} of the content of an eval_test.json."""
    if options["dataset"] == "coco":
        tables = {f"MSCOCO {size}": scores.get(size, {}) for size in ("1K", "5K")}
    else:
        tables = {TITLES.get(options["dataset"], Path(options["dataset_root"]).name): scores}
    for title, own in tables.items():
        if missing := [column for column in COLUMNS if column not in own]:
            raise InputError(f"{folder}/eval_test.json lacks {missing[0]}; run --eval again")
        tables[title] = {column: float(own[column]) for column in COLUMNS}
    return tables


def published_rows():
    """The authors' `Row`s. Where t2i R@10 is wrong (see `WRONG`), there is no rsum."""
    rows = []
    with open(PUBLISHED, encoding="utf-8", newline="") as f:
        for line in csv.DictReader(f):
            known = {m: float(line[m]) for m in METRICS if not line[m].endswith("*")}
            if len(known) == len(METRICS):
                known["rsum"] = sum(known.values())
            rows.append(Row(line["dataset"], float(line["noise_ratio"]), line["method"], 0, known))
    return rows


# ---- gathering ----------------------------------------------------------------------------------


def gather(runs):
    """`Row`s of runs, those that differ by the seed in one. Raises InputError when two have the
    same name, noise and seed."""
    groups = {}
    for run in runs:
        key = str(run.folder) if run.noise is None else run.seed
        for table, scores in run.scores.items():
            group = groups.setdefault((table, run.noise, run.name), {})
            if key in group:
                raise InputError(f"{group[key][0]} and {run.folder} have the same name {run.name}, "
                                 f"noise and seed {run.seed}; leave one of them out, or train "
                                 "different methods with different --name")
            group[key] = run.folder, scores
    rows = []
    for key, group in groups.items():
        values = {c: [scores[c] for _, scores in group.values()] for c in COLUMNS}
        std = {c: stdev(v) for c, v in values.items()} if len(group) > 1 else None
        rows.append(Row(*key, len(group), {c: mean(v) for c, v in values.items()}, std))
    return rows


def differences(rows):
    """Cells of our rows less the published ones of their noise and method: the published method
    with whose name ours begins, as npc_released begins with NPC."""
    published = {(row.noise, row.method): row.mean for row in rows if not row.seeds}
    lines = []
    for row in rows:
        other = published.get((row.noise, re.match("[A-Za-z]*", row.method)[0].upper()))
        if row.seeds and other:
            lines.append([row.method, percent(row.noise), *(
                f"{row.mean[c] - other[c]:+.1f}" if c in other else "–" for c in COLUMNS)])
    return lines


def variances(rows):
    """Lines of the variance of i2t R@1 over the noise ratios, the paper's measure of robustness, of
    the methods that have two or more ratios."""
    over = {}
    for row in rows:
        if row.noise is not None:
            over.setdefault(row.label, {})[row.noise] = row.mean["i2t_R@1"]
    return [[label, ", ".join(map(percent, sorted(scores))), f"{pvariance(scores.values()):.2f}"]
            for label, scores in over.items() if len(scores) > 1]


# ---- writing ------------------------------------------------------------------------------------


def document(tables, runs):
    """All tables as Markdown. tables: {title: [Row]}."""
    parts = []
    for title, rows in tables.items():
        parts += [f"### {title}", driver.table(HEAD, [row.cells for row in rows], left=2)]
        if any("t2i_R@10" not in row.mean for row in rows):
            parts.append(WRONG)
        if found := differences(rows):
            parts.append(driver.table(["less the published row", "noise", *HEAD[3:]], found))
        if found := variances(rows):
            parts.append(driver.table(["method", "noise ratios", "variance of i2t R@1"], found))
    head = ["folder", "noise", "seed", "epochs", "best epoch", "dev mean R@1"]
    return "\n\n".join([*parts, "### Runs", driver.table(head, map(run_cells, runs))]) + "\n"


def run_cells(run):
    """What a run's log says about it, as text."""
    if run.noise is None:
        return [str(run.folder), *["–"] * 5]
    best = max(run.log, key=lambda line: (line["dev"]["mean_R1"], line["epoch"]), default=None)
    return [str(run.folder), percent(run.noise), str(run.seed), f"{len(run.log)} of {run.epochs}",
            *([str(best["epoch"]), f"{best['dev']['mean_R1']:.1f}"] if best else ["–", "–"])]


def percent(ratio):
    return "–" if ratio is None else f"{100 * ratio:g} %"


def write_csv(f, rows):
    """The rows with all digits; an unknown value is an empty field."""
    table = csv.writer(f, lineterminator="\n")
    table.writerow(["table", "noise_ratio", "method", "published", "seeds", *COLUMNS,
                    *(f"{column} std" for column in COLUMNS)])
    for row in rows:
        values = [own.get(column) for own in (row.mean, row.std or {}) for column in COLUMNS]
        table.writerow([row.table, "" if row.noise is None else ratio_name(row.noise), row.method,
                        int(not row.seeds), row.seeds or "",
                        *("" if value is None else f"{value:.6g}" for value in values)])


def figure(tables):
    """R@1 both ways over the noise ratio, a row of plots for each table: a `Figure`."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 3.6 * len(tables)), layout="constrained")
    methods = {row.method for rows in tables.values() for row in rows}
    colours = {method: f"C{k}" for k, method in enumerate(sorted(methods, key=str.lower))}
    for (title, rows), axes in zip(tables.items(), fig.subplots(len(tables), 2, squeeze=False),
                                   strict=True):
        noise = sorted({100 * row.noise for row in rows if row.noise is not None} or {0})
        for ax, metric in zip(axes, ("i2t_R@1", "t2i_R@1"), strict=True):
            for label in dict.fromkeys(row.label for row in rows):
                draw(ax, [row for row in rows if row.label == label], metric, colours)
            ax.set(title=title, xlabel="noise (%)", ylabel=f"{metric.replace('_', ' ')} (%)",
                   xticks=noise, xlim=(noise[0] - 5, noise[-1] + 5))
            ax.grid(alpha=0.3)
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return fig


def draw(ax, rows, metric, colours):
    """Draw one method's R@1 over the noise; a zero-shot model, which has no noise, is a level."""
    first, values = rows[0], [row.mean[metric] for row in rows]
    style = {"color": colours[first.method],
             "label": first.label.replace("$", r"\$")}  # else it is mathematics
    if first.noise is None:
        ax.axhline(values[0], linestyle=":", **style)
        return
    ax.errorbar([100 * row.noise for row in rows], values, capsize=3, markersize=5,
                yerr=[row.std[metric] if row.std else float("nan") for row in rows],
                fmt="o-" if first.seeds else "o--",
                markerfacecolor=None if first.seeds else "white", **style)


def write_tables(runs, out, published=True):
    """Write the tables and the figure of runs to the folder `out`, with the published rows or
    without them, and print the tables."""
    rows = gather(runs)
    titles = sorted({row.table for row in rows})
    for title in titles if published else ():
        images = {run.test_images for run in runs if title in run.scores}
        if images == {PUBLISHED_IMAGES.get(title)}:
            rows += [row for row in published_rows() if row.table == title]
        elif title in PUBLISHED_IMAGES:
            print(f"Published rows of {title} omitted: your test set has "
                  f"{' or '.join(map(str, images))} images, the paper's {PUBLISHED_IMAGES[title]}.")
    rows.sort(key=lambda row: (row.table, -1 if row.noise is None else row.noise, row.seeds > 0,
                               row.method))
    tables = {title: [row for row in rows if row.table == title] for title in titles}
    text = document(tables, runs)
    with atomic_write(out / "tables.md") as f:
        f.write(text)
    with atomic_write(out / "tables.csv") as f:
        write_csv(f, rows)
    with atomic_write(out / "tables.tex") as f:
        f.write("% \\usepackage{booktabs}\n" + "\n\n".join(
            f"% {title}\n" + driver.table(HEAD, [row.cells for row in own], "latex_booktabs", 2)
            for title, own in tables.items()) + "\n")
    driver.save_figure(figure(tables), out / "r1_over_noise")
    print(f"{text}\nwrote tables.md, .csv and .tex, r1_over_noise.png and .pdf to {out}")


@command
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("logs/tables"), metavar="DIR",
                        help="folder for the tables and the figure")
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
