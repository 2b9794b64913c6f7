"""Uint8 crops of a split's images in one memory-mapped file: each image is decoded once.

CLIP's preprocessing ends in a uint8 crop before it normalises, so the cache loses nothing. The
file's name is a hash of its sources (path, size and time of each image file, and the cut): a
changed data set gets a new cache, and runs on the same data share one. Behind the crops the file
has one byte an image, which is set once the image's crop is on disk. A crop that a killed run or a
crash of the machine left half-written counts as absent and is decoded again.
"""

import contextlib
import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from utils.errors import InputError


class ImageCache:
    """Crops (n, 3, R, R) uint8 of the files `paths`, in `folder`.

    Each process opens the file for itself. The whole file is reserved when it is made. Raises
    InputError when the folder cannot be written or has no room for it.
    """

    def __init__(self, folder, paths, resolution, resize="shortest"):
        cut = resolution if resize == "shortest" else f"{resolution} {resize}"
        digest = hashlib.sha256(f"{cut}\n".encode())
        for path in paths:
            stat = os.stat(path)
            source = f"{os.path.abspath(path)}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
            digest.update(os.fsencode(source))
        self.path = Path(folder) / f"{digest.hexdigest()[:24]}.crops"
        self.shape = (len(paths), 3, resolution, resolution)
        self.size = 3 * resolution**2  # bytes of a crop
        self._reserve()

    def _reserve(self):
        """Make the file, or the part that it lacks, of zeros: no image is stored there yet."""
        total = len(self) * (self.size + 1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as f:
                if f.tell() < total and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, total)  # no later write finds a full disk
                elif f.tell() < total:  # macOS
                    f.truncate(total)
        except OSError as error:
            with contextlib.suppress(OSError):  # the file may fill the rest of the disk
                self.path.unlink()
            raise InputError(f"cannot make the image cache {self.path} of {total / 1e9:.1f} GB: "
                             f"{error.strerror}; choose another --image_cache or off") from error

    def __len__(self):
        return self.shape[0]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "opened"}

    @functools.cached_property
    def opened(self):
        """(descriptor, crops, stored) of the file, opened by each process at its first use."""
        crops = np.memmap(self.path, np.uint8, "r", 0, self.shape)
        stored = np.memmap(self.path, bool, "r", len(self) * self.size, (len(self),))
        return os.open(self.path, os.O_RDWR), crops, stored

    def has(self, k):
        """Whether crop k is stored."""
        return bool(self.opened[2][k])

    def get(self, k):
        """Crop k, which must be stored, as a new array (3, R, R)."""
        return np.array(self.opened[1][k])

    def put(self, crops):
        """Store crops: a dict from k to (3, R, R) uint8."""
        descriptor = self.opened[0]
        for k, crop in crops.items():
            os.pwrite(descriptor, crop.tobytes(), k * self.size)
        os.fsync(descriptor)  # a crash of the machine may keep later writes and lose earlier ones
        for k in crops:
            os.pwrite(descriptor, b"\1", len(self) * self.size + k)
