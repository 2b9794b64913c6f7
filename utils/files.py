"""Files that are either whole or absent."""

import contextlib
import os
import tempfile
from pathlib import Path

from utils.errors import InputError


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
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {reason}; choose a folder that you may write to "
                         "and that has room") from error
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


def require_new(option, folder):
    """Raise InputError, which names `option`, unless `folder` is absent or empty."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{option} {folder} exists already and is not an empty folder; give a new "
                         "one, or delete it")
