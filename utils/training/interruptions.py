"""Signals that come while a run trains."""

import os
import signal
import sys
from contextlib import contextmanager

import torch

from utils.distributed import HostCopy, any_process, leave_processes, world

INTERRUPTED = 75  # exit status after a signal, when a checkpoint to resume from was saved
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def interruptions(device):
    """Context in which SIGTERM, SIGINT and SIGHUP do not end the process: the function given says
    whether one came. A second one of the same kind ends the process at once. Signals that are
    ignored, as SIGHUP is under nohup, stay so.

    Several processes agree, so that all end at the same step. A call returns the answer to the
    call before, a step earlier, so that no GPU is waited for; with `now` the answer to this call.
    """
    arrived, answer = [], HostCopy(torch.zeros(()))

    def interrupted(now=False):
        nonlocal answer
        if world() == 1:
            return bool(arrived)
        previous, answer = answer, HostCopy(any_process(bool(arrived), device))
        return bool((answer if now else previous).get())

    def arrives(number, _):
        arrived.append(number)
        signal.signal(number, before[number])
        if number == signal.SIGHUP:  # the terminal is gone; log.txt has what is printed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)

    before = {number: signal.signal(number, arrives)
              for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_interrupted(run, where):
    """End the process after an interruption, once all is saved."""
    run.log(f"interrupted after {where}; a checkpoint is saved, --resume auto continues")
    leave_processes()
    sys.exit(INTERRUPTED)
