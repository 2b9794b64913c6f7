"""One net under every command: what a person can mend becomes a line, a bug of ours a traceback."""

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
    """Decorate a script's `main`: whatever a person can mend ends it with one line `error: ...` on
    stderr and status 2; NPC_DEBUG=1 shows the traceback too. Anything else keeps its traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        # A caption may have letters that a stream cannot show; in a file lines keep their order
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        threading.excepthook = _thread_died
        try:
            return main(*args, **kwargs)
        except SystemExit as end:
            status, where = end.code, end.__traceback__
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            status, where = 130, error.__traceback__
        except Exception as error:
            line = explain(error)
            if line is None or os.environ.get("NPC_DEBUG") == "1":
                traceback.print_exc()
            if line:
                print(f"error: {line}", file=sys.stderr)
            status, where = 2 if line else 1, error.__traceback__
        # End the data loaders now: the interpreter's end would kill their workers, with tracebacks
        traceback.clear_frames(where)
        sys.exit(status)

    return run


def explain(error):
    """The line for people that an exception deserves, None where a traceback says more: whatever is
    neither bad input, nor the system's refusal, nor a lack of memory may be a mistake in the code,
    ours or that of whoever changes it. Readers of files wrap what these provoke (utils.files)."""
    if getattr(error, "for_people", False):
        # a DataLoader worker wraps the error in its own traceback: the last line is ours
        return str(error).strip().splitlines()[-1].split("InputError: ", 1)[-1]
    said = " ".join(str(error).split())[:300]
    if isinstance(error, OSError):
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
    """What ends a thread of a library (TensorBoard's writer on a full disk) ends the next call into
    it too, which reports it."""
    if explain(hook.exc_value) is None:
        threading.__excepthook__(hook)
