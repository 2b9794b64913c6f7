"""Errors that a user can fix end in one line and status 2; others keep their traceback.

A script imports this module first: then Ctrl-C and a missing package also end in one line during
the imports that follow. The line before puts the repository first on the path: python -P does not
put it there, and an own script's folder may hold another data.py.
"""

import errno
import functools
import os
import sys
import threading
import traceback


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, what was expected, what to do."""

    for_people = True


def command(main):
    """Decorate a script's `main`: an error that a user can fix ends it with one line `error: ...`
    on stderr and status 2; NPC_DEBUG=1 shows the traceback, too. Other errors keep theirs."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        # A stream may lack a caption's letters; lines to one file keep their order
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        threading.excepthook = _thread_died
        try:
            return main(*args, **kwargs)
        except SystemExit as end:
            status, where = end.code, end.__traceback__
        except (KeyboardInterrupt, Exception) as error:
            status, where = tell(error), error.__traceback__
        # End the data loaders now: at exit their workers would print tracebacks
        traceback.clear_frames(where)
        sys.exit(status)

    return run


def tell(error):
    """Print what ended a command, a line or a traceback, to stderr; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)  # takes what is left in the buffers
        os.dup2(nowhere, 1)
        try:
            print("stopped: the program that read this output has ended", file=sys.stderr)
        except OSError:  # stderr is the same pipe
            os.dup2(nowhere, 2)
        return 1
    line = explain(error)
    if line is None or os.environ.get("NPC_DEBUG") == "1":
        traceback.print_exception(error)
    if line:
        print(f"error: {line}", file=sys.stderr)
    return 2 if line else 1


def _uncaught(kind, error, trace):
    """End a script whose imports a user's error or Ctrl-C ended. Python calls this hook also for
    errors that end nothing: a damaged pickle makes one inside the C library."""
    if explain(error) or isinstance(error, KeyboardInterrupt):
        sys.exit(tell(error))
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught


def explain(error):
    """The line that tells a user of an error, None for an error that may be a mistake in the code
    and needs its traceback."""
    if getattr(error, "for_people", False):
        # The last line is ours; a DataLoader's worker puts its traceback before it
        return str(error).strip().splitlines()[-1].split("InputError: ", 1)[-1]
    said = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError):
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        return (f"{said}, which {file}, line {line}, needs; pip install -r requirements.txt, or "
                "activate the environment that has it (make: . .venv/bin/activate)")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):  # of a dead worker
        file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return f"{file}: {error.strerror or said}".removeprefix(": ") + _advice(error)
    if (isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__
            or "allocate memory" in said):  # torch's word for a full host
        return (f"out of memory ({said[:150]}): use a smaller --batch_size or --eval_batch_size, "
                "--accum_steps, --grad_checkpointing or --data_on workers")
    return None


def _advice(error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room; finished files are intact, --resume auto continues a run"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; choose a file or folder that you may use"
    return "; check the path"


def _thread_died(hook):
    """Print nothing for a user's error in a library's thread (TensorBoard's writer on a full disk):
    the next call into the library raises it again."""
    if explain(hook.exc_value) is None:
        threading.__excepthook__(hook)
