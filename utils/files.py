"""Files and folders: written whole or not at all, parsed with a one-line error, locked."""

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path

from utils.errors import InputError

UNFINISHED = ".unfinished"  # end of the names of files and folders until they are whole


@contextlib.contextmanager
def parsing(path, what, advice):
    """Turn any error in the block, which parses the file `path`, into an InputError: "{path} is not
    {what} (reason); {advice}". Raise one before the block unless `path` is a regular file."""
    require_regular(path, advice)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # parsers raise almost anything on broken or hostile files
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}; {advice}") from error
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{path} is not {what} or is damaged ({reason}); {advice}") from error


def require_regular(path, advice):
    """Raise InputError unless `path` is a regular file; a pipe or device could block for ever."""
    if not os.path.isfile(path):
        why = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise InputError(f"{path} {why}; {advice}")


@contextlib.contextmanager
def atomic_write(path, mode="w", replace=True):
    """Open a file beside `path` for writing; it is renamed to `path` once it is whole and on disk.

    Use as `with atomic_write(path) as f: f.write(...)`; text is UTF-8 with "\\n" line ends, `mode`
    "wb" is for bytes. Without `replace`, a file that is at `path` by then is kept. Missing folders
    are made. Raises InputError when `path` is not writable or the disk is full, and leaves an
    earlier file at `path` untouched.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode.replace("w", "x"), **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if replace or not path.exists():
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a folder that "
                         "you may write to and that has room") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, unless something failed
            os.unlink(temporary)


def lock(path, what):
    """The open lock file `path` of `what`. This process holds the lock until the file is closed or
    the process ends; its workers do not. Raises InputError when another process holds it. A file
    system without locks lets everyone in."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        held = open(path, "a")
    except OSError as error:
        raise InputError(f"cannot write {what}: {error.strerror}; choose a folder that you may "
                         "write to") from error
    with contextlib.suppress(OSError):  # of file systems without locks
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            held.close()
            raise InputError(f"{what} is being written by another process; wait for it, or choose "
                             "another name") from None
    return held


@contextlib.contextmanager
def new_folder(option, target):
    """Give the block a new folder; rename it to `target` after the block. Raises InputError, which
    names `option`, when `target` exists or another process makes it."""
    target = Path(target)
    require_new(option, target)
    beside = target.with_name(f".{target.name}{UNFINISHED}")
    held = lock(target.with_name(f".{target.name}.lock"), target)
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        beside.mkdir()
        yield beside
        require_new(option, target)
        os.replace(beside, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; choose another "
                         f"{option}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        Path(held.name).unlink(missing_ok=True)
        held.close()


def require_new(option, folder):
    """Raise InputError, which names `option`, unless `folder` is absent or empty."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{option} {folder} exists already and is not an empty folder; give a new "
                         "one, or delete it")


def require_writable(folder, advice="choose another folder"):
    """Raise InputError, with `advice`, unless `folder` can be written, or made; makes nothing."""
    folder = Path(os.path.abspath(folder))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"cannot write {folder}, {there}: Not a directory; {advice}")
    if not os.access(there, os.W_OK):
        raise InputError(f"cannot write {folder}, as {there} may not be written to; {advice}")
