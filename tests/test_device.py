"""What a GPU must not wait for. Where there is none, "meta" stands for it: its tensors have shapes
and no values, so that whatever looks at one on the host fails."""

import contextlib

import pytest
import torch
from test_npc_step import BATCH, StubRun, make_data, make_model, options
from torch.utils._python_dispatch import TorchDispatchMode

import main_CLIP
import main_NPC
from utils.method.batches import Batches
from utils.method.optimizer import Precision, trained
from utils.reading.images import ImagesInMemory
from utils.training import history

RUNS = [("npc", {}), ("npc", {"recipe": "released"}), ("npc", {"weighting": "none"}),
        ("clip", {})]


class Waits(TorchDispatchMode):
    """Notes each copy between host and device that the host waits for, and each operation on
    tensors of both, which hides such a copy."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __enter__(self):
        self.make = torch.tensor
        torch.tensor = lambda *args, device=None, **more: (
            str(device) not in ("None", "cpu") and self.found.append(f"torch.tensor on {device}"),
            self.make(*args, device=device, **more))[1]
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.make
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        places = {x.device.type for x in leaves(args) if isinstance(x, torch.Tensor) and x.ndim}
        copies = function is torch.ops.aten._to_copy.default
        if len(places) > 1 or copies and not kwargs.get("non_blocking") and kwargs.get("device"):
            self.found.append(f"{function} {places} {kwargs.get('device')}")
        return function(*args, **kwargs)


def leaves(args):
    for x in args:
        yield from leaves(x) if isinstance(x, list | tuple) else [x]


class Unread:
    """In the place of `HostCopy`: what the device knows, without its values."""

    def __init__(self, tensor):
        self.shape = tensor.shape

    def get(self):
        return torch.zeros(self.shape)


@pytest.fixture
def meta(monkeypatch):
    """Lets training run on "meta", which lacks autocast and a fused AdamW."""
    def adamw(model, args):
        return torch.optim.AdamW(trained(model), lr=args.lr, foreach=True)

    monkeypatch.setattr(main_NPC, "adamw", adamw)
    monkeypatch.setattr(main_CLIP, "adamw", adamw)
    monkeypatch.setattr(history, "HostCopy", Unread)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return torch.device("meta")


def train(script, device, steps=4, **changes):
    """Steps of a small model as the loop makes them, with the data on the device; after each one
    it yields."""
    run = StubRun(options(display=10**6, epochs=1, **changes))
    run.device = run.args.device = device
    run.precision = Precision("fp32", device)
    pairs, bank = make_data()
    pairs.images = ImagesInMemory(pairs.images.crops, device)
    A = make_model("vit").float().to(device)
    trainer = main_NPC.NPC(A, run, bank) if script == "npc" else main_CLIP.Baseline(A, run)
    batches = Batches(pairs, bank if script == "npc" and trainer.uses_memory else None)
    log = history.History(run, pairs, 10**6)
    log.start_epoch(0, resumed=False)
    for step in range(1, steps + 1):
        batch = batches[list(range(step, step + BATCH))].to(device)
        numbers = trainer.step(batch)
        log.require_finite()
        log.add(step, 1e-3, batch, numbers)
        yield


@pytest.mark.parametrize("script, changes", RUNS)
def test_nothing_between_two_logged_steps_waits_for_the_device(meta, script, changes):
    steps = train(script, meta, **changes)
    next(steps)  # the first one may build and ship what stays
    with Waits() as waits:
        for _ in steps:
            pass
    assert waits.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("script, changes", RUNS)
def test_no_step_waits_for_the_gpu(script, changes):
    steps = train(script, torch.device("cuda"), **changes)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
