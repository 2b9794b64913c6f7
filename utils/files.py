"""Files that are either whole or absent."""

import contextlib
import os
import tempfile
from pathlib import Path

from utils.errors import InputError


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open `path` for writing beside itself; it takes its name only once it is whole and on disk.

    Use as `with atomic_write(path) as f: f.write(...)`; text is UTF-8 with "\\n" line ends, `mode`
    "wb" gives bytes. Missing folders are made. Raises InputError when the place is not writable or
    the disk is full; whatever was at `path` before is then untouched.
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
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; an ordinary file is not
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {reason}; choose a folder that you may write to "
                         "and that has room") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
