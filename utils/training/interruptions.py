"""What comes from outside while a run trains: signals, a lost terminal."""

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

import torch

from utils.devices import HostCopy
from utils.distributed import any_process, leave_processes, world

INTERRUPTED = 75  # exit status after a signal, when a checkpoint to resume from was saved
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
           if hasattr(signal, name)]  # Windows has no SIGHUP


@contextmanager
def interruptions(device):
    """SIGTERM, SIGINT and SIGHUP no longer end the process: the function given says whether one
    came. Those that are ignored, as SIGHUP is under nohup, stay so. One that comes more than a
    second later, which is not the same one sent to a whole group, ends the process as ever.

    Several processes agree, so that all end at the same step. What one call asks them is answered
    by the next one, a step later, so that no GPU is waited for; with `now` by the same one.
    """
    arrived, answer = [], HostCopy(torch.zeros(()))

    def interrupted(now=False):
        nonlocal answer
        if world() == 1:
            return bool(arrived)
        previous, answer = answer, HostCopy(any_process(bool(arrived), device))
        return bool((answer if now else previous).get())

    def arrives(number, _):
        arrived.append(time.monotonic())
        if arrived[-1] - arrived[0] > 1:
            restore()
            os.kill(os.getpid(), number)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, arrives)
              for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield interrupted
    finally:
        restore()


def end_interrupted(run, saver, where):
    """End the process after an interruption, once all is saved."""
    saver.wait()
    run.log(f"interrupted after {where}; a checkpoint is saved, --resume auto continues")
    leave_processes()
    sys.exit(INTERRUPTED)


class LastingStream:
    """stdout or stderr that may be lost (a closed pipe or terminal, a full disk) without ending the
    run: what cannot be written is dropped; log.txt has it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Write text, if that can be done."""
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        """Flush, likewise."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)
