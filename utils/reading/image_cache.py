"""Uint8 crops of a split's images in one memory-mapped file, so that each is decoded once in life.

CLIP's preprocessing ends in a uint8 crop before it normalises: the cache loses nothing. A cache is
named by a hash of its sources (path, size and time of every file, and the cut), so a changed
data set gets a new one, and runs that share a data set share its cache. Every image carries a
checksum, written after it: what an interrupted or crashed run left half-written is decoded again.
"""

import contextlib
import hashlib
import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import take_name

STALE = 3600  # seconds after which an unfinished file is taken for that of a killed run


class ImageCache:
    """Crops (n, 3, R, R) uint8 of the files `paths`, in `folder`.

    Each process opens the file for itself. Raises InputError when the folder cannot be written or
    has no room for the whole cache, which is reserved when it is made.
    """

    def __init__(self, folder, paths, resolution, resize="shortest"):
        cut = resolution if resize == "shortest" else f"{resolution} {resize}"
        digest = hashlib.sha256(f"{cut}\n".encode())
        for path in paths:
            stat = os.stat(path)
            digest.update(f"{os.path.abspath(path)}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode())
        self.path = Path(folder) / f"{digest.hexdigest()[:24]}.u8"
        self.shape = (len(paths), 3, resolution, resolution)
        self.size = int(np.prod(self.shape[1:]))  # bytes of a crop
        self.files = None  # (descriptor, crops, checksums), opened by each process at first use
        self._create()

    def _create(self):
        total = len(self) * (self.size + 8)
        if self.path.is_file() and self.path.stat().st_size == total:
            return
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file() and self.path.stat().st_size != total:  # damaged
                self.path.unlink(missing_ok=True)
            for old in self.path.parent.glob(f".{self.path.name}.*"):
                with contextlib.suppress(OSError):
                    if time.time() - old.stat().st_mtime > STALE:
                        old.unlink()
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.",
                                                     dir=self.path.parent)
            with os.fdopen(descriptor, "wb") as f:
                if hasattr(os, "posix_fallocate"):  # so that no later write finds a full disk
                    os.posix_fallocate(f.fileno(), 0, total)
                f.truncate(total)
            take_name(temporary, self.path, replace=False)  # another run may have been first
        except OSError as error:
            raise InputError(f"cannot make the image cache {self.path} of {total / 1e9:.1f} GB: "
                             f"{error.strerror}; choose another --image_cache or off") from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def __len__(self):
        return self.shape[0]

    def __getstate__(self):
        return {**self.__dict__, "files": None}

    def _open(self):
        if self.files is None:
            try:
                descriptor = os.open(self.path, os.O_RDWR)
            except OSError as error:
                raise InputError(f"cannot open the image cache {self.path}: {error.strerror}; "
                                 "choose another --image_cache or off") from error
            crops = np.memmap(self.path, np.uint8, "r", 0, self.shape)
            sums = np.memmap(self.path, np.uint64, "r", len(self) * self.size, (len(self),))
            self.files = descriptor, crops, sums
        return self.files

    def get(self, k):
        """Crop k as a new array (3, R, R), None where it is not (wholly) there yet."""
        _, crops, sums = self._open()
        expected = int(sums[k])
        if expected == 0:
            return None
        crop = np.array(crops[k])
        return crop if checksum(crop) == expected else None

    def put(self, k, crop):
        """Store crop k, (3, R, R) uint8."""
        descriptor, _, _ = self._open()
        os.pwrite(descriptor, crop.tobytes(), k * self.size)
        value = np.uint64(checksum(crop)).tobytes()
        os.pwrite(descriptor, value, len(self) * self.size + 8 * k)

    def has(self, k):
        """Whether some run has stored crop k."""
        return bool(self._open()[2][k])

    def missing(self):
        """Number of images that no run has stored yet."""
        return int((self._open()[2] == 0).sum())


def checksum(crop):
    """CRC-32 of an array's bytes, never 0 (which marks an image that is not there)."""
    return zlib.crc32(np.ascontiguousarray(crop)) + 1
