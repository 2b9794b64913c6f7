"""Files and folders that are whole or absent, are read with one line about what is wrong with them,
and belong to one process at a time."""

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None

LOCKS = {}  # path -> descriptor, until this process ends


@contextlib.contextmanager
def reading(path, what, advice):
    """Whatever reading the file `path` provokes in the block becomes an InputError: "{path} is not
    {what} (reason); {advice}". A pipe or device, which could block for ever, is not opened."""
    require_regular(path, advice)
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path} asks for more memory than there is; {advice}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {advice}") from error
    except Exception as error:  # parsers raise almost anything on broken or hostile files
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{path} is not {what} or is damaged ({reason}); {advice}") from error


def require_regular(path, advice):
    """Raise InputError unless `path` is a file proper: not absent, a folder, a pipe or a device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', error)}; {advice}"
                         ) from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a regular file; {advice}")


@contextlib.contextmanager
def atomic_write(path, mode="w", replace=True):
    """Open `path` for writing beside itself; it takes its name only once it is whole and on disk.

    Use as `with atomic_write(path) as f: f.write(...)`; text is UTF-8 with "\\n" line ends, `mode`
    "wb" gives bytes. Without `replace` a file that another run has put there meanwhile stays, and
    this one is dropped. Missing folders are made. Raises InputError when the place is not writable
    or the disk is full; whatever was at `path` before is then untouched.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        take_name(temporary, path, replace)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a folder that "
                         "you may write to and that has room") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # it may have its new name
                os.unlink(temporary)


def take_name(temporary, path, replace):
    """Give a finished file its name, and the rights of an ordinary new one, which those that
    tempfile makes lack. Without `replace` a file of that name stays, where the file system has
    hard links; else the later one does."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    if not replace:
        try:
            os.link(temporary, path)
            return
        except FileExistsError:
            return
        except OSError:
            pass
    os.replace(temporary, path)


def lock(path):
    """Hold the lock file `path` until this process ends, however it ends. Raises InputError, which
    says who has it, when another process does."""
    path = Path(path)
    if fcntl is None or path in LOCKS:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"cannot write {path.parent}: {error.strerror}; choose a folder that you "
                         "may write to") from error
    try:  # of this process alone: its data loaders do not inherit it
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise InputError(f"{path.parent} is being written by {holder}; wait for it, or choose "
                         "another name") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    LOCKS[path] = descriptor


def unlock(path):
    """Give a lock back and remove its file."""
    descriptor = LOCKS.pop(Path(path), None)
    if descriptor is not None:
        Path(path).unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(option, target):
    """Build a folder beside `target`, which the block is given; it takes its name once the block is
    through. Raises InputError, which names `option`, when there is something at `target` already or
    another process is about to make it."""
    target = Path(target)
    require_new(option, target)
    beside = target.with_name(f".{target.name}.unfinished")
    lock(beside.with_suffix(".lock"))
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        beside.mkdir(parents=True)
        yield beside
        require_new(option, target)
        os.replace(beside, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; choose another "
                         f"{option}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        unlock(beside.with_suffix(".lock"))


def require_new(option, folder):
    """Raise InputError, which names `option`, unless `folder` is absent or empty."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{option} {folder} exists already and is not an empty folder; give a new "
                         "one, or delete it")
