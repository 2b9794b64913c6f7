"""Find the pairs that are probably wrong.

    python find_noise.py --dataset pairs --dataset_root PATH --out logs/noise
    python find_noise.py --dataset pairs --dataset_root PATH --out logs/noise \\
        --labels decisions.csv --write_clean dataset/mine_cleaned

Ranks all pairs from most to least suspicious. suspicious_pairs.csv lists them.
suspicious_pairs.html shows the worst pairs, each beside what the model would pair it with, and a
random sample of all pairs. Decisions that are made on that page, given as --labels, measure how
many pairs are wrong.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from utils.errors import InputError, command  # isort: skip

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import clip
from data import all_pairs, training_pairs
from params import parse_args
from utils.cleaning.cleaned import write_clean
from utils.cleaning.labels import (
    NAMES,
    cells,
    draw_sample,
    label_findings,
    read_labels,
    text_cell,
)
from utils.cleaning.noise_page import Suspect, noise_page
from utils.cleaning.source import require_unchanged, rows_of, source_of
from utils.distributed import is_main
from utils.files import atomic_write, require_new
from utils.method.building import nearest_clean
from utils.method.features import Features, nearest, normalised, random_rows
from utils.method.judge import doubts, judge_pairs, share_in_words
from utils.method.pairs import fingerprint, first_pairs, for_model
from utils.reading.images import Images
from utils.reading.layout import SPLITS
from utils.scoring.diagnostics import noise_measures
from utils.training.history import mean_weights
from utils.training.run import Run

THUMBNAIL = 160  # pixels
TRAINING = ("train",)
MANY_WRONG = 0.05  # estimated share of wrong pairs from which on unchecked test captions are told
COLUMNS = ("rank", "pair", "row", "place", "score", "posterior", "image", "caption", "best_caption",
           "clean_pair", "clean_image", "clean_caption", "stratum", "stratum_size", "decision")


class Ranking(NamedTuple):
    """order (n,): all pairs from most to least suspicious, `worst` those of the page; score (n,),
    NaN where there is none; answer (n,): 1 labelled wrong, -1 right, 0 not labelled; sample: random
    pairs, as of `draw_sample`."""

    order: np.ndarray
    worst: np.ndarray
    score: np.ndarray
    answer: np.ndarray
    sample: dict


@command
def main(argv=None):
    args = parse_args("find_noise", argv)
    run, out = Run(args), Path(args.out)

    # Files first: a wrong one is told before a model is fetched or an image is read
    source, splits = what_to_judge(args)
    pairs = (training_pairs if splits == TRAINING else all_pairs)(args, None, run.log)
    rows = source and rows_of(args.dataset_root, splits)
    if source and len(rows) != len(pairs):
        raise InputError(f"{pairs.source} has {len(pairs)} pairs, but the rows of {len(rows)} in "
                         f"{source.table} are known; prepare the data set again")
    labels = read_labels(args.labels, pairs)
    w = args.weights and mean_weights(args.weights, pairs)
    model = None
    if not args.judge_features:
        model, preprocess = run.load_model()
        pairs = for_model(pairs, args, preprocess, run.log)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)

    verdict, features = judge_pairs(model, pairs, args, run.precision, run.log)
    if not is_main():
        return
    images, texts = map(normalised, features)
    score = {"judge": verdict.score, "loss": verdict.loss, "cosine": verdict.cosine,
             "npc": w}[args.score]
    suspicion = score if args.score in ("judge", "loss") else -score  # NaN where there is none
    order = np.lexsort((-verdict.loss, -suspicion))  # equal ones by loss; without a score: last
    scored = order[: np.isfinite(suspicion).sum()]
    findings, thresholds = what_is_known(args, pairs, labels, verdict, suspicion, scored,
                                         splits)
    run.log("\n".join([*findings, thresholds]).rstrip())

    # A labelled pair is known: pairs labelled wrong come first, pairs labelled right last
    order = order[np.argsort(-labels.answer[order], kind="stable")]
    answer = labels.answer[order]
    worst = order[(answer > 0) | (answer == 0) & np.isfinite(suspicion[order])]
    worst = worst[: max(args.worst, (answer > 0).sum())]
    ranking = Ranking(order, worst, score, labels.answer,
                      labels.sample or draw_sample(scored, args.seed))

    best_captions, nearest_pair = partners(args, pairs, verdict.clean, images, texts)
    with atomic_write(out / "suspicious_pairs.csv") as f:
        write_table(f, pairs, verdict, ranking, rows, best_captions, nearest_pair)
    by = (f"features {args.judge_features}" if args.judge_features
          else f"model {args.vision_model}")
    about = f"{len(pairs)} pairs by {args.score}, from {pairs.source}; {by}"
    with atomic_write(out / "suspicious_pairs.html") as f:
        shown = suspects(args, pairs, verdict, ranking, images, texts, best_captions)
        f.write(noise_page(shown, args.score, about, findings, verdict, fingerprint(pairs)))
    run.log(f"wrote {out}/suspicious_pairs.csv, all {len(pairs)} pairs, and "
            f"{out}/suspicious_pairs.html, the worst {len(ranking.worst)} and a random "
            f"{len(ranking.sample)}")
    if args.write_clean:
        keep = np.where(labels.answer == 0, verdict.posterior >= args.keep_above, labels.answer < 0)
        write_clean(args, pairs, keep, splits, rows, source, run.log)


def what_to_judge(args):
    """(`Source` of the data set, None without a table; the splits to judge). Pairs of a table are
    judged in all splits, unless the judge knows the training pairs alone."""
    source = None if args.noise_ratio else source_of(args.dataset_root)  # noise is not in the table
    if args.write_clean and is_main():
        require_new("--write_clean", args.write_clean)
        if source:
            require_unchanged(source)
    whole = source and not args.judge_features and args.score != "npc"
    return source, SPLITS if whole else TRAINING


def what_is_known(args, pairs, labels, verdict, suspicion, scored, splits):
    """(lines of text, Markdown table or "") of what is known of all pairs. suspicion (n,); scored:
    the pairs that have a score, from most to least suspicious; splits: those of the pairs."""
    share, n = verdict.wrong_share, len(pairs)
    lines, thresholds = [f"Estimated noise share: {share_in_words(verdict, args)}, the judge's "
                         "guess; labels of the random sample measure it (--labels)."], ""
    lines += doubts(verdict)
    if len(scored) < n:
        lines.append(f"{n - len(scored)} of {n} pairs have no weight in {args.weights}, as "
                     "training never drew them; they come last.")
    if pairs.wrong is not None:
        lines.append(against_injected(suspicion[scored], pairs.wrong[scored], share))
    if args.labels:
        more, thresholds = label_findings(labels, verdict.posterior, args.keep_above,
                                          args.wanted_precision)
        lines += more
    if splits == TRAINING:
        lines.append("Only the training split is judged, neither dev nor test.")
        if not args.noise_ratio and share > MANY_WRONG:  # injected noise spares them
            lines.append("If captions of dev and test come from the same source, as many of them "
                         "are wrong, and every score on them is a score of such captions.")
    return lines, thresholds


def partners(args, pairs, clean, images, texts):
    """(best caption of each distinct image, u str; nearest strict-clean pair (n,) of each pair's
    image) by the judge's `Features`, among `--search_among`; clean (n,) bool. A clean pair is its
    own."""
    nearest_pair = nearest_clean(images, pairs.image_of, clean, most=args.search_among,
                                 seed=args.seed)[pairs.image_of]
    nearest_pair[clean] = np.flatnonzero(clean)
    some = random_rows(len(texts), args.search_among, args.seed)
    keys = Features(texts, chosen=torch.from_numpy(some).to(texts.device))
    best = nearest(images, keys, title="best captions")[1][:, 0].cpu().numpy()
    first = first_pairs(pairs.text_of)
    return [pairs.captions[first[text]] for text in some[best]], nearest_pair


def against_injected(suspicion, wrong, share):
    """A line of text: how well an order by suspicion (n,), the highest first, has the pairs with
    injected noise, wrong (n,) bool, in front."""
    n, num_wrong = len(wrong), int(wrong.sum())
    line = f"Against the injected noise, in {num_wrong} of {n} pairs"
    measures = noise_measures(suspicion, wrong)
    if measures is None:
        return f"{line}: nothing to rank."
    taken = max(1, round(share * n))
    return (f"{line}: AUC {measures['auc']:.3f}, average precision "
            f"{measures['average_precision']:.3f}, mean noise rank "
            f"{measures['mean_noise_rank']:.1f} (optimum {measures['optimum']:.1f}, chance "
            f"{measures['chance']:.1f}), precision of the {taken} most suspicious "
            f"{wrong[:taken].mean():.3f}. Captions that are wrong in train_caps.txt itself count "
            "as right here.")


def write_table(f, pairs, verdict, ranking, rows, best_captions, nearest_pair):
    """Write the CSV of all pairs in order. rows (n, 2): each pair's row and place in the user's
    table, or None; best_captions and nearest_pair as of `partners`."""
    table = csv.writer(f, lineterminator="\n")
    table.writerow(COLUMNS)
    for rank, i in enumerate(map(int, ranking.order), 1):
        score, j = ranking.score[i], nearest_pair[i]
        best = best_captions[pairs.image_of[i]]
        table.writerow((rank, i, *(("", "") if rows is None else rows[i]),
                        "" if np.isnan(score) else f"{score:.6g}", f"{verdict.posterior[i]:.6g}",
                        *cells(pairs, i), text_cell(best), j, *cells(pairs, j),
                        *ranking.sample.get(i, ("", "")), NAMES[ranking.answer[i]]))


def suspects(args, pairs, verdict, ranking, images, texts, best_captions):
    """`Suspect`s of the worst pairs, of the sample and of all labelled pairs, each with the model's
    best caption and its best image among all distinct ones. images (u, D), texts (v, D): normalised
    features; best_captions: u str."""
    worst, sample = ({pair: place for place, pair in enumerate(group, 1)}
                     for group in (ranking.worst.tolist(), ranking.sample))
    chosen = list(worst | sample | dict.fromkeys(np.flatnonzero(ranking.answer).tolist()))
    text_of = torch.from_numpy(pairs.text_of[chosen]).to(texts.device)
    best_images = nearest(texts[text_of], images)[1][:, 0].tolist()
    names = pairs.images.names
    thumbnails = Images(args.dataset_root, names, clip.Preprocess(THUMBNAIL))
    return [Suspect(worst.get(i), sample.get(i),
                    (i, *cells(pairs, i), *ranking.sample.get(i, ("", ""))),
                    NAMES[ranking.answer[i]], float(ranking.score[i]), verdict.posterior[i],
                    names[k], thumbnails[k].numpy(), pairs.captions[i], best_captions[k],
                    thumbnails[image].numpy(), names[image])
            for i, k, image in zip(chosen, pairs.image_of[chosen], best_images, strict=True)]


if __name__ == "__main__":
    main()
