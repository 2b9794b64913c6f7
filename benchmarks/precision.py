"""What do half weights keep of a fine-tuning step?

    python benchmarks/precision.py [--seeds 3] [--json FILE]

fp32 gradients of our randomly initialised ViT-B/32, its weights rounded to half as OpenAI's are, on
random pictures and captions; then the repository's AdamW on a random sample of the weights, stored
as fp16 (--precision fp16), bf16, or fp32 (all other precisions). AdamW treats every element alone:
a sample shows what happens to all. Prints Markdown tables, mean ± standard deviation over seeds.
"""

import argparse
import json
import math
import sys
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clip
from clip.weights import CONFIGS
from utils.cleaning.text import markdown
from utils.errors import command
from utils.method.losses import pair_losses
from utils.method.optimizer import adamw
from utils.training.precision import clip_gradients
from utils.training.schedule import warmup_cosine

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RATES = (2e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4)
LR, WARMUP, CLIP_GRAD = 2e-7, 500, 10.0  # the authors' rate; the scripts' defaults
STEPS = 4


# ---- gradients of a real model ------------------------------------------------------------------


def random_batch(size):
    """Smooth random pictures (size, 3, 224, 224), normalised, and captions (size, 20) of 6 to 18
    random words."""
    coarse = torch.rand(size, 3, 7, 7)
    images = F.interpolate(coarse, size=224, mode="bilinear").mul(255).byte()
    tokens = torch.randint(320, 49406, (size, 20))
    tokens[:, 0] = 49406
    ends = torch.randint(7, 20, (size, 1))
    position = torch.arange(20)
    tokens = tokens.masked_fill(position == ends, 49407).masked_fill(position > ends, 0)
    return clip.normalize(images, torch.float32), tokens


def losses(model, images, tokens):
    """Losses (B,) of the pairs of a batch."""
    features = (F.normalize(x, dim=1)
                for x in (model.encode_image(images), model.encode_text(tokens)))
    return pair_losses(*features, model.logit_scale)


def sample_gradients(seed, batch_size, num_batches, share):
    """(weights (n,), gradients (num_batches, n), their norms (num_batches,)): a random `share` of
    the weights that --precision fp16 keeps in half, and their gradients in fp32, clipped as a
    whole, on as many batches; the weights stay where they are in between."""
    torch.manual_seed(seed)
    model = clip.convert_weights_to_fp16(clip.CLIP(**CONFIGS["ViT-B/32"]))
    large = [p for p in model.parameters() if p.dtype == torch.float16]
    model.float()
    chosen = [torch.rand(p.shape) < share for p in large]
    gradients, norms = [], []
    for _ in tqdm(range(num_batches), desc=f"seed {seed}, gradients", disable=None):
        model.zero_grad()
        losses(model, *random_batch(batch_size)).mean().backward()
        norms.append(clip_gradients(model, CLIP_GRAD).item())
        gradients.append(torch.cat([p.grad[own] for p, own in zip(large, chosen, strict=True)]))
    weights = torch.cat([p.detach()[own] for p, own in zip(large, chosen, strict=True)])
    return weights, torch.stack(gradients), norms


# ---- what a storage format keeps ----------------------------------------------------------------


class Weights(nn.Module):
    """A model that is nothing but a vector of weights."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values.clone())


def train(weights, gradients, rates, dtype):
    """AdamW with the scripts' defaults on weights (n,) stored as `dtype`: one step per learning
    rate, on gradients (k, n) in turn. Yields after each step the weights before and after it (n,)
    and the second moments (n,)."""
    model = Weights(weights.to(dtype))
    p = model.values
    optimizer = adamw(model, argparse.Namespace(lr=0.0, beta1=0.9, beta2=0.98, eps=1e-6,
                                                weight_decay=0.2))
    for rate, gradient in zip(rates, cycle(gradients), strict=False):
        before = p.detach().clone()
        p.grad = gradient.to(dtype)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        yield before, p.detach(), optimizer.state[p]["exp_avg_sq"]


def spacing(weights, dtype):
    """Distance (n,) fp32 from |w| to the next larger number of `dtype`, one unit in the last place,
    for weights (n,)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(weights.float().abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(weights, info.eps, dtype=torch.float32), exponent)


def share(mask):
    """Percentage of True."""
    return 100 * mask.double().mean().item()


def steps_kept(weights, gradients, rates, dtype):
    """Numbers by name: the share of weights (n,) that the first step and that all steps changed,
    the share of second moments that are zero at the end, and the largest move in a step."""
    start, result, moves = weights.to(dtype), {}, []
    for before, after, second in train(weights, gradients, rates, dtype):
        moves.append((after.float() - before.float()).abs().max().item())
        result.setdefault("changed in step 1 %", share(after != before))
        result["changed in total %"] = share(after != start)
        result["zero v %"] = share(second == 0)
    return {**result, "largest move": max(moves)}


def displacements(weights, gradients, lr, dtype, moments=(1, 4, 20, 100, WARMUP)):
    """Displacements {steps: (n,) fp32} from the start at some moments of the default warm-up."""
    rates = [warmup_cosine(t, lr, WARMUP, 2 * WARMUP) for t in range(max(moments))]
    start = weights.to(dtype).float()
    return {t: after.float() - start
            for t, (_, after, _) in enumerate(train(weights, gradients, rates, dtype), 1)
            if t in moments}


def resemblance(x, reference):
    """Numbers by name: the share of x (n,) that is not zero, its length as a multiple of the
    reference's, its cosine with it, and its projection on it (1 where x is the reference plus noise
    that knows nothing of it)."""
    dot, length = (x.double() @ reference.double()).item(), reference.double().norm().item()
    norm = x.double().norm().item()
    return {"changed %": share(x != 0), "length": norm / length,
            "cosine": dot / (norm * length) if norm else 0.0, "projection": dot / length**2}


# ---- the tables, for one seed -------------------------------------------------------------------


def rate_table(weights, gradients):
    """`STEPS` steps at full rate, and the first ones of the warm-up, in each format."""
    table = {}
    for name, dtype in FORMATS.items():
        for lr in RATES:
            kept = steps_kept(weights, gradients, [lr] * STEPS, dtype)
            half_ulp = share(spacing(weights, dtype) / 2 < lr)
            table[name, f"{lr:g}"] = {"half ulp < lr %": half_ulp, **kept}
        rates = [warmup_cosine(t, LR, WARMUP, 2 * WARMUP) for t in range(STEPS)]
        kept = steps_kept(weights, gradients, rates, dtype)
        half_ulp = share(spacing(weights, dtype) / 2 < rates[-1])
        table[name, f"{LR:g}, warm-up"] = {"half ulp < lr %": half_ulp, **kept}
    return table


def scale_table(weights, gradients):
    """fp16 at the authors' rate, with weights and gradients of other sizes: `STEPS` full steps, and
    how their sum compares with that of fp32 weights."""
    table = {}
    for w, g in ((1, 1), (0.5, 1), (0.25, 1), (1, 0.3), (1, 0.1), (1, 0.03), (1, 0.01)):
        values, slopes, rates = w * weights, g * gradients, [LR] * STEPS
        ends = [list(train(values, slopes, rates, dtype))[-1][1].float() - values
                for dtype in (torch.float16, torch.float32)]
        beside = resemblance(*ends)
        del beside["changed %"]  # is among the others
        table[f"{w:g}", f"{g * CLIP_GRAD:g}"] = {
            **steps_kept(values, slopes, rates, torch.float16), **beside}
    return table


def warmup_table(weights, gradients):
    """Displacement over the default warm-up at the authors' rate, beside that of fp32 weights."""
    table = {}
    for name, g in (("fp16", 1), ("fp16", 0.1), ("bf16", 1)):
        reference, own = (displacements(weights, g * gradients, LR, dtype)
                          for dtype in (torch.float32, FORMATS[name]))
        table |= {(name, f"{g * CLIP_GRAD:g}", str(t)): resemblance(own[t], reference[t])
                  for t in own}
    return table


def autocast_table(weights, gradients):
    """What a forward pass under autocast, which rounds the weights, sees of one fp32 step at full
    rate: from half weights, as published, and from what `WARMUP` such steps have made of them."""
    table = {}
    for lr in (2e-7, 1e-6, 1e-5):
        rates = [lr] * WARMUP
        trained = next(islice(train(weights, gradients, rates, torch.float32), WARMUP - 1, None))[1]
        for state, values in (("as published", weights), ("trained", trained)):
            before, after, _ = next(train(values, gradients, [lr], torch.float32))
            for name in ("bf16", "fp16"):
                seen = after.to(FORMATS[name]).float() - before.to(FORMATS[name]).float()
                table[f"amp_{name}", state, f"{lr:g}"] = resemblance(seen, after - before)
    return table


def logits_table(seed, batch=256, dim=512):
    """The released loss, logits and all in half, against ours of the same half features, fp32 from
    there on: made-up features with the cosines of a trained CLIP (0.2 for pairs, 0.06 for others),
    temperature 100. Then the features move a little: the share of
    losses that stay as they are, and that rightly fall or do not."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    def released(images, texts):
        logits = logit_scale.exp() * images @ texts.T  # half: a scalar does not promote
        target = torch.arange(batch)
        return (F.cross_entropy(logits, target, reduction="none")
                + F.cross_entropy(logits.T, target, reduction="none")).float() / 2

    def ours(images, texts):
        return pair_losses(images, texts, logit_scale)

    logit_scale, common = torch.tensor(math.log(100)), 0.7 * noise(dim)
    content = noise(batch, dim)
    before = [content + common + 2.2 * noise(batch, dim) for _ in range(2)]
    exact = [F.normalize(x.double(), dim=1) for x in before]
    table = {}
    for shift in (1e-5, 1e-4, 1e-3):
        after = [x + shift * x.std() * noise(batch, dim) for x in before]
        moved = [F.normalize(x.double(), dim=1) for x in after]
        lowered = ours(*moved) < ours(*exact)
        for name, loss in (("released", released), ("ours", ours)):
            old, new = (loss(*(x.half() for x in features)) for features in (exact, moved))
            error = (old - ours(*exact)).abs()
            table[name, f"{shift:g}"] = {
                "mean error": error.mean().item(), "largest error": error.max().item(),
                "unchanged %": share(old == new), "right side %": share((new < old) == lowered)}
    return table


TABLES = {
    "rate": (("weights", "lr"), f"{STEPS} steps in each format"),
    "scale": (("weights x", "gradient norm"), f"fp16, {STEPS} steps, lr {LR:g}, beside fp32's"),
    "warm-up": (("weights", "gradient norm", "steps"),
                f"displacement within the warm-up, lr {LR:g}, beside fp32's"),
    "autocast": (("precision", "weights", "lr"), "what autocast sees of one fp32 step"),
    "logits": (("loss", "shift"), "loss of half features"),
}


def measure(seed, args):
    """All tables of one seed: {table: {row: {column: number}}}."""
    weights, gradients, norms = sample_gradients(seed, args.batch_size, args.batches, args.share)
    print(f"seed {seed}: {len(weights):,} weights, median |w| {weights.abs().median():.3g}, "
          f"gradient norms {min(norms):.3g} to {max(norms):.3g} before clipping to {CLIP_GRAD:g}",
          file=sys.stderr)
    return {"rate": rate_table(weights, gradients), "scale": scale_table(weights, gradients),
            "warm-up": warmup_table(weights, gradients),
            "autocast": autocast_table(weights, gradients), "logits": logits_table(seed)}


def over_seeds(keys, tables):
    """A Markdown table from those of all seeds, with mean ± standard deviation."""
    columns = list(next(iter(tables[0].values())))
    rows = []
    for row in tables[0]:
        cells = []
        for column in columns:
            values = [table[row][column] for table in tables]
            spread = f" ± {stdev(values):.1g}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3g}{spread}")
        rows.append([*row, *cells])
    return markdown([*keys, *columns], rows)


@command
def main():
    parser = argparse.ArgumentParser(description="Measure what half weights keep of a step.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches that take turns")
    parser.add_argument("--share", type=float, default=0.01, help="share of the weights to follow")
    parser.add_argument("--json", metavar="FILE", help="also write every number of every seed")
    args = parser.parse_args()
    results = [measure(seed, args) for seed in range(args.seeds)]
    for name, (keys, title) in TABLES.items():
        print(f"\n**{title}**\n\n{over_seeds(keys, [r[name] for r in results])}")
    if args.json:
        plain = [{name: {" ".join(row): numbers for row, numbers in table.items()}
                  for name, table in result.items()} for result in results]
        Path(args.json).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
