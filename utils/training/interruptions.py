"""What comes from outside while a run trains: signals, a lost terminal."""

import os
import signal
import sys
from contextlib import contextmanager

import torch

from utils.distributed import Later, any_process, leave_processes, world

INTERRUPTED = 75  # exit status after a signal, when a checkpoint to resume from was saved
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def interruptions(device):
    """SIGTERM, SIGINT and SIGHUP no longer end the process: the function given says whether one
    came. With several processes it says so to all of them, so that all end at the same step: what
    one call asks them, the next one answers, so that no GPU is waited for. With `now` it waits."""
    arrived = []
    answer = Later(torch.zeros(()))

    def interrupted(now=False):
        nonlocal answer
        if world() == 1:
            return bool(arrived)
        previous, answer = answer, Later(any_process(bool(arrived), device))
        return bool((answer if now else previous).get())

    before = {number: signal.signal(number, lambda number, _: arrived.append(number))
              for number in SIGNALS}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_interrupted(run, where):
    """End the process after an interruption, once the main process has saved."""
    run.log(f"interrupted after {where}; a checkpoint is saved, --resume auto continues")
    leave_processes()
    sys.exit(INTERRUPTED)


class LastingStream:
    """A terminal that may be lost (a closed pipe, a full disk behind `>`) without ending the run:
    what cannot be written is dropped from then on; log.txt has it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Write text, or nothing once that has failed."""
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()

    def flush(self):
        """Flush, likewise."""
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())
        os.close(nothing)

    def __getattr__(self, name):
        return getattr(self.stream, name)
