"""`--precision`: what is stored in half, and how AdamW steps there."""

import json
import math

import pytest
import torch
from conftest import parsed

import clip
import main_CLIP
import main_NPC
from params import PRECISIONS
from utils.errors import InputError
from utils.method.optimizer import adamw, clip_gradients

ARGS = parsed("clip", lr=1e-5, device="cpu")
HALF_TOO = {torch.float16, torch.float32}


class Weights(torch.nn.Module):
    """A model that is nothing but a vector of weights."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(values)


def run(main, data, folder, *more):
    """Run a command on `data`, writing to `folder`/ex0, and return that."""
    main([*data.options, "--num_workers", "0", "--device", "cpu", "--batch_size", "6",
          "--checkpoint_path", str(folder), *map(str, more)])
    return folder / "ex0"


def trained(main, data, folder, precision):
    """The checkpoint of the tiny model after an epoch of two steps."""
    folder = run(main, data, folder, "--vision_model", "tiny", "--precision", precision, "--epochs",
                 1, "--warmup", 1, "--lr", 1e-5)
    return torch.load(folder / "epoch1.pt", weights_only=True)


def dtypes(tensors):
    return {x.dtype for x in tensors}


# ---- the commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_baseline_trains_and_stores_what_the_precision_says(datasets, tmp_path, precision):
    checkpoint = trained(main_CLIP.main, datasets["cc"], tmp_path, precision)
    weights, states = checkpoint["state_dict"], checkpoint["optimizer"]["state"].values()
    assert all(w.isfinite().all() for w in weights.values())
    expected = HALF_TOO if precision == "fp16" else {torch.float32}
    assert dtypes(weights.values()) == expected
    for moment in ("exp_avg", "exp_avg_sq"):
        assert dtypes(state[moment] for state in states) == expected


def test_npc_in_fp16_keeps_both_optimisers_in_half(dataset, tmp_path):
    data = dataset("cc")
    torch.manual_seed(99)
    start = clip.convert_weights_to_fp16(clip.load("tiny", "cpu")[0]).state_dict()
    large = [name for name, w in start.items() if w.dtype == torch.float16]
    assert "visual.proj" in large
    for name in ("logit_scale", "token_embedding.weight", "visual.class_embedding",
                 "visual.ln_pre.weight"):
        assert name not in large

    checkpoint = trained(main_NPC.main, data, tmp_path, "fp16")
    for name in ("optimizer", "siamese_optimizer"):
        states = checkpoint[name]["state"].values()
        assert dtypes(state["exp_avg_sq"] for state in states) == HALF_TOO
        assert any(state["exp_avg"].any() for state in states)
    assert any((checkpoint["state_dict"][name] != start[name]).any() for name in large)
    assert list(data.root.glob("annotations/frozen_memory_bank/*"))


def test_half_checkpoint_loads_and_scores_in_every_precision(datasets, tmp_path):
    """As the authors' own: half weights, and nothing of ours beside them."""
    torch.manual_seed(0)
    model = clip.convert_weights_to_fp16(clip.load("tiny", "cpu")[0])
    stored, path = model.state_dict(), tmp_path / "npc_coco_60.pt"
    torch.save({"epoch": 3, "name": "NPC", "state_dict": stored, "optimizer": {}}, path)

    loaded = clip.load(str(path), "cpu")[0]
    assert dtypes(loaded.state_dict().values()) == {torch.float32}
    again = clip.convert_weights_to_fp16(loaded).state_dict()
    for name, weights in stored.items():
        assert again[name].dtype == weights.dtype and torch.equal(again[name], weights), name

    for precision in PRECISIONS:
        folder = run(main_CLIP.main, datasets["cc"], tmp_path, "--eval", "--resume", path,
                     "--precision", precision)
        scores = json.loads((folder / "eval_test.json").read_text())
        assert scores["t2i_R@10"] == scores["i2t_R@10"] == 100  # of six


# ---- gradients and AdamW ------------------------------------------------------------------------


def test_norm_of_half_gradients_does_not_overflow():
    model = Weights(torch.zeros(1000).half())
    model.values.grad = torch.full((1000,), 4000.0).half()
    norm = clip_gradients(model, 10.0)
    assert norm.item() == pytest.approx(4000 * math.sqrt(1000), rel=1e-6)  # over 65504
    assert model.values.grad.float().norm().item() == pytest.approx(10, rel=1e-3)


def test_clipping_is_torchs_in_fp64_and_of_the_whole_model_in_mixed_precision():
    ours, reference = (torch.nn.Linear(5, 3).double() for _ in range(2))
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = clip_gradients(ours, 0.5)
    assert norm == torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)

    mixed = torch.nn.Linear(1, 1)
    mixed.weight.data = mixed.weight.data.half()
    mixed.weight.grad, mixed.bias.grad = torch.tensor([[3.0]]).half(), torch.tensor([4.0])
    assert clip_gradients(mixed, 1.0) == 5
    assert mixed.weight.grad.item() == pytest.approx(0.6, rel=1e-3)
    assert mixed.bias.grad.item() == pytest.approx(0.8, rel=1e-6)
    assert clip_gradients(mixed, math.inf) == pytest.approx(1, rel=1e-3)


def test_adamw_rounds_every_operation_to_half():
    """As on a GPU: each operation computes in fp32 and rounds its result."""
    def half(x):
        return x.half().float()

    generator = torch.Generator().manual_seed(0)
    w = half(0.02 * torch.randn(2000, generator=generator))
    gradients = [half(1e-3 * torch.randn(2000, generator=generator)) for _ in range(4)]
    model = Weights(w.half())
    optimizer = adamw(model, ARGS)
    m, v = torch.zeros(2000), torch.zeros(2000)
    for t, g in enumerate(gradients, 1):
        model.values.grad = g.half()
        optimizer.step()
        w = half(w * (1 - 1e-5 * 0.2))
        m = half(m + 0.1 * (g - m))
        v = half(half(0.98 * v) + 0.02 * g * g)
        root = half(half(half(v.sqrt()) / math.sqrt(1 - 0.98**t)) + 1e-6)
        w = half(w - 1e-5 / (1 - 0.9**t) * m / root)
    state = optimizer.state[model.values]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float16
    for ours, expected in ((state["exp_avg"], m), (state["exp_avg_sq"], v),
                           (model.values.detach(), w)):
        assert (ours.float() == expected).float().mean() > 0.98  # fused: 0.13


def test_only_half_weights_give_up_the_fused_adamw_and_a_small_eps():
    single, half = Weights(torch.zeros(3)), Weights(torch.zeros(3).half())
    tiny_eps = parsed("clip", eps=1e-8, device="cpu")  # zero in half
    assert adamw(single, tiny_eps).defaults["fused"] and not adamw(half, ARGS).defaults["fused"]
    with pytest.raises(InputError, match="eps"):
        adamw(half, tiny_eps)
