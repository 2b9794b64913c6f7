"""Commands as processes of their own, forked from a server that has imported torch already, and a
small CLIP for them."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import zlib
from pathlib import Path

import torch
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

import clip
import get_memorybank
import main_CLIP
import main_NPC
from utils.scoring import diagnostics

START_METHOD = multiprocessing.get_context().get_start_method()
NPC, CLIP, BANK = main_NPC.main, main_CLIP.main, get_memorybank.main
CONTEXT, VOCABULARY = 12, 64
SMALL = {"embed_dim": 16, "image_resolution": 32, "context_length": CONTEXT,
         "vocab_size": VOCABULARY, "transformer_width": 64, "transformer_heads": 1,
         "transformer_layers": 1}
VIT = {"vision_layers": 1, "vision_width": 64, "vision_patch_size": 16}
RESNET = {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}


def save_small(path, tower=VIT, seed=0):
    """Write the weights of a small model; returns its path."""
    torch.manual_seed(seed)
    torch.save(clip.CLIP(**SMALL, **tower).state_dict(), path)
    return path


def small_tokens(texts, context_length=CONTEXT, vocabulary=VOCABULARY):
    """Replaces clip.tokenize_with_lengths: each word becomes one of few tokens."""
    rows = [[zlib.crc32(word.encode()) % (vocabulary - 3) + 1 for word in text.split()]
            for text in texts]
    lengths = torch.tensor([len(row) + 2 for row in rows])
    tokens = torch.zeros(len(rows), context_length, dtype=torch.int32)
    for line, row in zip(tokens, rows, strict=True):
        row = [vocabulary - 2, *row[: context_length - 2], vocabulary - 1]
        line[: len(row)] = torch.tensor(row)
    return tokens, lengths


def go(function, argv, output, environment=(), hook=None):
    """Run a command in this new process as if a terminal had started it; does not return."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(START_METHOD, force=True)  # this one's is forkserver
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)  # what it was before may not have been a pipe
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    torch.set_num_threads(1)
    clip.tokenize_with_lengths = small_tokens
    draw, SummaryWriter.add_figure = diagnostics.pictures, lambda *_: None
    diagnostics.pictures = lambda *seen: draw(*seen) if len(seen) == 2 else None  # half of the time
    if hook:
        hook()
    status = 0
    try:
        function(*([argv] if argv is not None else []))
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    sys.exit(status)


def _server():
    context = multiprocessing.get_context("forkserver")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(["processes"])
    return context


SERVER = _server() if __name__ == "processes" and multiprocessing.parent_process() is None else None


class Started:
    """A command that runs: its own session (and process group), its output in a file."""

    def __init__(self, function, argv, output, environment=(), hook=None):
        self.output = Path(output)
        self.process = SERVER.Process(target=go, args=(
            function, argv, str(output), dict(environment), hook))
        self.process.start()
        self.pid = self.process.pid

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds=120):
        """Exit status; negative: the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}")
        return self.process.exitcode

    def wait_for(self, words, seconds=60):
        """Wait until the output has `words`."""
        end = time.monotonic() + seconds
        while True:
            over = not self.process.is_alive() or time.monotonic() > end
            if words in self.text():
                return
            assert not over, self.text()
            time.sleep(0.01)


def run(function, argv, output, status=0, hook=None):
    """Run a command to its end, which must be `status`; returns what it said."""
    started = Started(function, argv, output, hook=hook)
    assert started.wait() == status, started.text()
    return started.text()


def run_in_two(function, argv, output, status=0, hooks=(None, None)):
    """Run a command in two processes that work together, as under torchrun; returns what each
    said. `status` may be a pair."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = []
    for rank, hook in enumerate(hooks):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                       "RANK": str(rank), "LOCAL_RANK": str(rank)}
        both.append(Started(function, argv, f"{output}.{rank}", environment, hook))
    for one, expected in zip(both, status if isinstance(status, tuple) else (status,) * 2,
                             strict=True):
        assert one.wait() == expected, one.text()
    return [one.text() for one in both]


def differences(a, b, tolerance=0.0, relative=0.0, at=""):
    """Places at which two nested values of a checkpoint differ, and by how much."""
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return [at]
        a, b = a.nan_to_num(-7), b.nan_to_num(-7)
        if torch.equal(a, b) or (tolerance and torch.allclose(a, b, relative, tolerance)):
            return []
        return [f"{at}: by {(a.double() - b.double()).abs().max():.1e}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{at}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [place for k in a
                for place in differences(a[k], b[k], tolerance, relative, f"{at}/{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [at]
        return [place for k, (x, y) in enumerate(zip(a, b, strict=True))
                for place in differences(x, y, tolerance, relative, f"{at}/{k}")]
    same = a == b or (tolerance and isinstance(a, float) and abs(a - b) <= tolerance)
    return [] if same else [f"{at}: {a} {b}"]
