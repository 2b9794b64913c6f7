"""Where the time of a command goes."""

import contextlib
import time

import torch

SECONDS = {}  # of each part so far, in order of first appearance


@contextlib.contextmanager
def part(name):
    """Count the seconds of the block, what it starts on a GPU included, to the part `name`."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[name] = SECONDS.get(name, 0) + time.perf_counter() - start


def took():
    """The parts so far as text, and forget them."""
    text = ", ".join(f"{name} {seconds:.1f}" for name, seconds in SECONDS.items())
    SECONDS.clear()
    return f"seconds: {text}"
