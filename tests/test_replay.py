"""Steps of few shapes, their replay as CUDA graphs, and what a GPU must not wait for."""

import contextlib
import copy
import functools
import gc
import json
import os
import signal
import weakref

import numpy as np
import pytest
import torch
from conftest import make_dataset
from processes import CLIP as CLIP_SCRIPT
from processes import NPC as NPC_SCRIPT
from processes import run
from test_npc_step import BATCH, NUM_PAIRS, StubRun, make_data, make_model, options
from test_resume import after_step
from torch.utils._python_dispatch import TorchDispatchMode

import clip
import main_CLIP
import main_NPC
import utils.method.optimizer as optimizer_module
from utils import distributed
from utils.method.batches import Batches
from utils.method.optimizer import Precision, adamw, replays, set_rate, trained
from utils.method.weightings import WEIGHTINGS, Weighting
from utils.reading.images import ImagesInMemory
from utils.training import checkpoints, history
from utils.training.interruptions import INTERRUPTED
from utils.training.replay import Replay, shape_of
from utils.training.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Trainer:
    """Steps of one of the scripts on a device, replayed or not, whose rate changes."""

    def __init__(self, script, tower, device, dtype, few_shapes=False, replayed=False, **changes):
        self.run = run = StubRun(options(**changes))
        run.device = run.args.device = device
        run.precision = Precision(run.args.precision, device)
        self.pairs, bank = make_data()
        self.pairs.images = ImagesInMemory(self.pairs.images.crops, device)
        self.A = make_model(tower).to(device, dtype)
        self.method = (main_NPC.NPC(self.A, run, bank) if script == "npc"
                       else main_CLIP.Baseline(self.A, run))
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


@pytest.fixture
def calls(monkeypatch):
    """What is set: the device, and whether cuDNN's attention is on."""
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", made.append)
    return made


def test_attention_plans_no_shape_outside_of_few(monkeypatch, calls):
    """cuDNN's is off, but within the first steps of each of a few shapes."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    args = options(precision="amp_bf16")
    args.device = GPU
    distributed.use_device(args)
    pairs, bank = make_data()
    batch = Batches(pairs, bank, few_shapes=True)[list(range(BATCH))]
    assert Replay(lambda _: calls[-1], print)(batch) and calls[1:] == [False, True, False]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_fp32_is_fp32(monkeypatch, calls, precision):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "fp32")
    args = options(precision=precision)
    args.device = GPU
    distributed.use_device(args)
    assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")


# ---- without a GPU: stand-ins for torch.cuda ----------------------------------------------------


class Cuda:
    """Stands for what `Replay` uses of torch.cuda. A capture runs the step; `replay` runs it again
    on the graph's inputs. The n-th capture fails, if wanted, and leaves its stream current."""

    def __init__(self, monkeypatch, failing=None, device=None):
        self.captures, self.failing, self.stream = 0, failing, "main"
        for name, stand_in in {"graph_pool_handle": lambda: "pool", "CUDAGraph": self.Graph,
                               "graph": self.graph, "current_stream": lambda: self.stream,
                               "set_stream": lambda stream: setattr(self, "stream", stream),
                               "current_device": lambda: device}.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)

    class Graph:
        replayed = 0

        def replay(self):
            self.replayed += 1

    @contextlib.contextmanager
    def graph(self, graph, pool, capture_error_mode):
        assert pool == "pool"
        self.captures += 1
        self.stream = "capture"
        yield
        if self.captures == self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        self.stream = "main"


def test_a_shape_is_captured_when_it_is_seen_again_and_then_replayed(monkeypatch):
    cuda, calls = Cuda(monkeypatch), []
    pairs, bank = make_data()
    batch = Batches(pairs, bank)[list(range(BATCH))]
    other = Batches(pairs, bank)[list(range(BATCH - 1))]
    replay = Replay(lambda batch: calls.append(batch) or {"loss": torch.zeros(())}, print)
    for _ in range(4):
        replay(batch)
    replay(other)
    assert len(calls) == 3 and cuda.captures == 1 and cuda.stream == "main"
    (graph, inputs, _), none = replay.graphs.values()
    assert graph.replayed == 3 and none is None  # the capture itself runs nothing
    assert torch.equal(inputs.indices, batch.indices) and inputs.indices is not batch.indices


@pytest.mark.parametrize("failing", [1, 2])
def test_a_capture_that_fails_frees_all_and_goes_on_eagerly(monkeypatch, failing):
    cuda, said = Cuda(monkeypatch, failing), []
    plain, replayed = (Trainer("npc", "vit", CPU, torch.float64) for _ in range(2))
    replayed.step = Replay(lambda batch: replayed.method.step(batch), said.append)
    seen = [Batches(replayed.pairs, plain.batches.bank)[list(range(size))] for size in (6, 7)]
    graphs = []
    for batch in seen[:failing]:  # before the failure, in a model of its own
        own = Trainer("npc", "vit", CPU, torch.float64)
        replayed.step.step = own.method.step
        for _ in range(2):
            replayed.step(batch)
        graphs += [weakref.ref(entry[0]) for entry in replayed.step.graphs.values() if entry]
    gc.collect()
    assert len(graphs) == failing - 1 and not any(graph() for graph in graphs)
    assert replayed.step.pool is None and cuda.stream == "main"
    assert len(said) == 1 and "(CUDA out of memory); --eager" in said[0]
    replayed.step.step = replayed.method.step
    assert_same(replayed(range(6)), plain(range(6)), 0)
    assert cuda.captures == failing and len(said) == 1


def test_no_graph_is_made_on_another_device(monkeypatch):
    """Such a graph would be empty, and its replay would return old numbers."""
    cuda, said = Cuda(monkeypatch, device=0), []
    replay = Replay(lambda batch: {}, said.append)
    pairs, bank = make_data()
    for _ in range(2):
        replay(Batches(pairs, bank)[list(range(BATCH))])
    assert cuda.captures == 0 and "the batch is on cpu, the process on cuda:0" in said[0]


def test_the_device_is_set_before_anything_is_put_on_it(monkeypatch, calls, tmp_path):
    monkeypatch.setattr(clip, "load", lambda name, device, **_: calls.append(device) or 1 / 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for folder in ("annotations/scan_split", "images"):
        (tmp_path / folder).mkdir(parents=True)
    args = options(device="cuda:1", dataset_root=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        Run(args).load_model()
    assert calls == [1, False, torch.device("cuda:1")]


@pytest.mark.parametrize("environment, expected", [({}, "cuda:0"), ({"LOCAL_RANK": "1"}, "cuda:1")])
def test_each_process_has_a_device_of_its_own(monkeypatch, environment, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert options(device="cuda").device == torch.device(expected)


def test_the_rate_is_a_tensor_where_steps_are_replayed(monkeypatch):
    """And AdamW is capturable there alone."""
    monkeypatch.setattr(optimizer_module, "replays", lambda args: not args.eager)
    for eager in (False, True):
        args = options(eager=eager)
        made = adamw(make_model("vit").float(), args)
        group = made.param_groups[0]
        assert group["capturable"] == isinstance(group["lr"], torch.Tensor) == (not eager)
        set_rate(made, 0.25)
        assert float(made.param_groups[0]["lr"]) == 0.25


# ---- what a GPU must not wait for. "meta" stands for it: its tensors have shapes and no values, so
# that whatever looks at one on the host fails

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


def train(script, device, **changes):
    """Steps of a small model as the loop makes them, with the data on the device; after each one
    it yields."""
    trainer = Trainer(script, "vit", device, torch.float32, precision="fp32", display=10**6,
                      epochs=1, **changes)
    log = history.History(trainer.run, trainer.pairs, 10**6)
    log.start_epoch(0, resumed=False)
    for step in range(1, 5):
        batch = trainer.batches[list(range(step, step + BATCH))].to(device)
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


# ---- on a GPU: no GPU has run these tests yet ----------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("script, tower, changes", [
    ("npc", "vit", {}), ("npc", "vit", {"recipe": "released"}), ("npc", "vit", {"accum_steps": 2}),
    ("npc", "vit", {"grad_checkpointing": True}), ("npc", "vit", {"weighting": "none"}),
    ("npc", "rn", {}), ("clip", "vit", {}), ("npc", "vit", {"freeze": "image"})])
def test_replayed_steps_are_those_without(monkeypatch, script, tower, changes):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain = Trainer(script, tower, GPU, torch.float32, few_shapes=True, **changes)
    replayed = Trainer(script, tower, GPU, torch.float32, True, True, **changes)
    assert_same(replayed(range(20)), plain(range(20)), 1e-6)
    for p, q in zip(replayed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert len(plain.shapes) > 1 and any(replayed.step.graphs.values()) and not replayed.said


@pytest.mark.gpu
@pytest.mark.parametrize("script, changes", [
    ("npc", {}), ("npc", {"recipe": "released"}), ("clip", {})])
def test_replayed_steps_in_amp_bf16_differ_no_more_than_two_eager_runs(script, changes):
    """The default precision, over 20 steps of changing shapes."""
    found = [Trainer(script, "vit", GPU, torch.float32, True, replayed, precision="amp_bf16",
                     **changes) for replayed in (False, False, True)]
    for trainer in found:
        trainer(range(20))
    eager, again, replayed = (torch.cat([p.flatten() for p in trainer.parameters()])
                              for trainer in found)
    assert found[2].step.graphs and not found[2].said
    assert (replayed - eager).norm() <= 2 * (again - eager).norm() + 1e-6 * eager.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("script, more", [
    ("NPC", []), ("NPC", ["--recipe", "released"]), ("CLIP", []), ("CLIP", ["--recipe", "robust"])])
def test_a_run_around_replayed_steps(tmp_path, script, more):
    """Log, dev scores and checkpoints of a whole run; a run that is interrupted and resumed ends
    with the same scores, and its weights differ by no more than rounding."""
    main = NPC_SCRIPT if script == "NPC" else CLIP_SCRIPT
    data = make_dataset(tmp_path / "data", "f30k")
    common = [*data.options, "--vision_model", "tiny", "--epochs", "2", "--batch_size", "8",
              "--noise_ratio", "0.2", "--lr", "1e-4", "--save_every", "3", "--keep_checkpoints",
              "0", "--device", "cuda:0", "--checkpoint_path", str(tmp_path), *more]
    run(main, [*common, "--experiments", "whole"], tmp_path / "out1")
    run(main, [*common, "--experiments", "cut"], tmp_path / "out2", INTERRUPTED,
        functools.partial(after_step, 4, terminate))
    said = run(main, [*common, "--experiments", "cut", "--resume", "auto"], tmp_path / "out3")
    assert "cannot be captured" not in said
    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
             for name in ("whole", "cut")]
    for whole, cut in zip(*lines, strict=True):
        assert whole["batch_loss"] == pytest.approx(cut["batch_loss"], rel=1e-2)
    states = [clip.read_checkpoint(tmp_path / name / "epoch2.pt")["state_dict"]
              for name in ("whole", "cut")]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-2, atol=1e-3)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


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
    distributed.use_device(args)
    start = [p.detach().clone() for p in make_model(tower).parameters()]
    host, gpu = (Trainer("npc", tower, device, torch.float32) for device in (CPU, GPU))
    for on_host, on_gpu in zip(host(range(5)), gpu(range(5)), strict=True):
        torch.testing.assert_close(on_gpu["w"], on_host["w"], rtol=0, atol=1e-4)
    way, off = (sum((p - q).square().sum() for p, q in zip(host.parameters(), others, strict=True))
                for others in (start, gpu.parameters()))
    assert off.sqrt() < 1e-4 * way.sqrt()


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
