"""Steps of few shapes, and their replay as CUDA graphs."""

import copy

import numpy as np
import pytest
import torch
from test_npc_step import BATCH, NUM_PAIRS, StubRun, make_data, make_model, options

from main_CLIP import Baseline
from main_NPC import NPC
from utils import devices
from utils.method.batches import Batches
from utils.method.optimizer import adamw, replays, set_rate
from utils.method.weightings import WEIGHTINGS, Weighting
from utils.reading.images import ImagesInMemory
from utils.training import checkpoints
from utils.training.precision import Precision
from utils.training.replay import Replay, shape_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Trainer:
    """Steps of one of the scripts on a device, replayed or not, whose rate changes."""

    def __init__(self, script, tower, device, dtype, few_shapes=False, replayed=False, **changes):
        run = StubRun(options(**changes))
        run.device, run.precision = device, Precision("fp32", device)
        self.pairs, bank = make_data()
        self.pairs.images = ImagesInMemory(self.pairs.images.crops, device)
        self.A = make_model(tower).to(device, dtype)
        self.method = NPC(self.A, run, bank) if script == "npc" else Baseline(self.A, run)
        self.A.train(run.recipe.batch_norm_trains)
        self.batches = Batches(self.pairs, bank if script == "npc" else None,
                               few_shapes=few_shapes)
        self.said, self.shapes, self.device = [], set(), device
        step = self.method.step
        self.step = Replay(step, self.said.append) if replayed else step

    def __call__(self, numbers):
        """What the steps of these numbers return, on the host."""
        found = []
        for number in numbers:
            chosen = np.random.default_rng(number).choice(NUM_PAIRS, BATCH, replace=False)
            for optimizer in self.method.optimizers.values():
                set_rate(optimizer, 1e-3 / (1 + number % 3))
            batch = self.batches[chosen.tolist()].to(self.device)
            self.shapes.add(shape_of(batch))
            found.append({name: value.detach().double().cpu()
                          for name, value in self.step(batch).items()})
        return found

    def parameters(self):
        return [p.detach().double().cpu() for p in self.A.parameters()]


def assert_same(found, expected, tolerance):
    for got, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("script, tower, changes", [
    ("npc", "vit", {}), ("npc", "vit", {"accum_steps": 2}), ("npc", "rn", {}), ("clip", "vit", {}),
    ("npc", "rn", {"recipe": "released"})])
def test_few_shapes_change_no_number(script, tower, changes):
    plain = Trainer(script, tower, CPU, torch.float64, **changes)
    rounded = Trainer(script, tower, CPU, torch.float64, few_shapes=True, **changes)
    assert_same(rounded(range(12)), plain(range(12)), 1e-9)
    for p, q in zip(rounded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    assert rounded.shapes != plain.shapes


def test_shapes_are_few():
    """Captions and images of batches of 64 among 3,000 pairs, as many as there are of MSCOCO."""
    rng = np.random.default_rng(0)
    pairs, bank = make_data()
    pairs.image_of, pairs.captions = np.arange(3000) // 5, [""] * 3000
    pairs.images = ImagesInMemory(torch.zeros(600, 3, 2, 2, dtype=torch.uint8), CPU)
    pairs.text_of, pairs.tokens = np.arange(3000), torch.zeros(3000, 77, dtype=torch.int32)
    pairs.tokens[np.arange(3000), rng.integers(7, 40, 3000)] = 49
    clean = rng.random(3000) < 0.7
    bank.caption_entry = np.where(clean, np.arange(3000), rng.choice(np.flatnonzero(clean), 3000))
    bank.image_entry = rng.choice(np.flatnonzero(clean), 600)
    found = [{shape_of(Batches(pairs, bank, few_shapes=few)[rng.choice(3000, 64, replace=False)])
              for _ in range(200)} for few in (True, False)]
    assert len(found[0]) < 40 < 150 < len(found[1])


@pytest.mark.parametrize("changes, few", [({}, True), ({"eager": True}, False),
                                          ({"precision": "fp16"}, False)])
def test_steps_are_replayed_on_a_gpu_by_default(changes, few):
    args = options(**{"precision": "amp_bf16", **changes})
    assert not replays(args)
    args.device = GPU
    assert replays(args) == few


def test_attention_plans_no_shape_outside_of_few(monkeypatch):
    """cuDNN's is off, but within the first steps of each of a few shapes."""
    now = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", now.append)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    args = options(precision="amp_bf16")
    args.device = GPU
    devices.use_device(args)
    assert now == [False]
    pairs, bank = make_data()
    batch = Batches(pairs, bank, few_shapes=True)[list(range(BATCH))]
    assert Replay(lambda _: now[-1], print)(batch) and now == [False, True, False]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_fp32_is_fp32(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "fp32")
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    args = options(precision=precision)
    args.device = GPU
    devices.use_device(args)
    assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")


def test_unfused_adamw_rounds_alike_in_groups_of_tensors():
    """With half weights on a GPU it is `foreach`, torch's default there and so the released
    script's; with `fused=False` alone it would loop over the tensors."""
    models = [make_model("vit").half() for _ in range(2)]
    optimizers = [adamw(models[0], options()), torch.optim.AdamW(
        models[1].parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2,
        foreach=True)]
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = torch.randn(p.shape, generator=rng).half()
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    p, q = (torch.cat([p.flatten() for p in model.parameters()]).float() for model in models)
    assert (p != q).float().mean() < 0.002
    torch.testing.assert_close(p, q, rtol=2**-9, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("script, tower, changes", [
    ("npc", "vit", {}), ("npc", "vit", {"recipe": "released"}), ("npc", "vit", {"accum_steps": 2}),
    ("npc", "vit", {"grad_checkpointing": True}), ("npc", "vit", {"weighting": "none"}),
    ("npc", "rn", {}), ("npc", "rn", {"recipe": "released"}), ("clip", "vit", {}),
    ("npc", "vit", {"freeze": "image"})])
def test_replayed_steps_are_those_without(monkeypatch, script, tower, changes):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain = Trainer(script, tower, GPU, torch.float32, few_shapes=True, **changes)
    replayed = Trainer(script, tower, GPU, torch.float32, True, True, **changes)
    assert_same(replayed(range(20)), plain(range(20)), 1e-6)
    for p, q in zip(replayed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert len(plain.shapes) > 1 and any(replayed.step.graphs.values()) and not replayed.said


@pytest.mark.gpu
def test_a_resumed_run_replays_what_an_uninterrupted_one_does():
    whole = Trainer("npc", "vit", GPU, torch.float32, True, True)
    whole(range(10))
    state = copy.deepcopy({"A": whole.A.state_dict(), **{
        name: optimizer.state_dict() for name, optimizer in whole.method.optimizers.items()}})
    resumed = Trainer("npc", "vit", GPU, torch.float32, True, True)
    resumed.A.load_state_dict(state["A"])
    for name, optimizer in resumed.method.optimizers.items():
        checkpoints.load_optimizer(optimizer, state[name])
    assert_same(resumed(range(10, 20)), whole(range(10, 20)), 1e-6)


@pytest.mark.gpu
def test_a_step_that_looks_at_a_value_is_not_replayed(monkeypatch):
    def looks(batch, **_):
        return torch.full_like(batch, batch.max().item()).clamp(max=1)

    monkeypatch.setitem(WEIGHTINGS, "looks", Weighting(looks, "", False, ()))
    plain, replayed = (Trainer("npc", "vit", GPU, torch.float32, True, replay, weighting="looks")
                       for replay in (False, True))
    assert_same(replayed(range(12)), plain(range(12)), 1e-6)
    assert len(replayed.said) == 1 and "--eager" in replayed.said[0]


@pytest.mark.gpu
@pytest.mark.parametrize("tower", ["vit", "rn"])
def test_fp32_on_a_gpu_is_that_of_a_cpu(tower):
    args = options(precision="fp32")
    args.device = GPU
    devices.use_device(args)
    start = [p.detach().clone() for p in make_model(tower).parameters()]
    host, gpu = (Trainer("npc", tower, device, torch.float32) for device in (CPU, GPU))
    for on_host, on_gpu in zip(host(range(5)), gpu(range(5)), strict=True):
        torch.testing.assert_close(on_gpu["w"], on_host["w"], rtol=0, atol=1e-4)
    way, off = (sum((p - q).square().sum() for p, q in zip(host.parameters(), others, strict=True))
                for others in (start, gpu.parameters()))
    assert off.sqrt() < 1e-4 * way.sqrt()


def test_compile_is_refused_where_nothing_is_replayed(capsys):
    with pytest.raises(SystemExit):
        options(compile=True)
    assert "--compile is for steps that are replayed" in capsys.readouterr().err
