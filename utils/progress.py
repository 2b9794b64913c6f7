"""Progress with remaining time: a bar in a terminal or notebook, a line a minute in a log file."""

import sys

from tqdm import std
from tqdm.auto import tqdm

from utils.distributed import is_main

IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
SECONDS = 60  # between two lines


class Lines(std.tqdm):
    """A tqdm that prints each state as a line of its own."""

    def display(self, msg=None, pos=None):
        """Print the state. tqdm passes `msg`, an empty one, to erase a bar."""
        if msg is None:
            print(self, file=self.fp, flush=True)


def progress(items=None, lines=True, **options):
    """tqdm over `items`, or of `total` steps, with tqdm's `options`, in the main process. Without
    `lines` nothing is written to a log file."""
    options["disable"] = not is_main()
    if IN_NOTEBOOK or sys.stderr.isatty():
        return tqdm(items, **options)
    options["disable"] |= not lines
    options |= {"mininterval": SECONDS, "miniters": 1, "delay": SECONDS, "leave": False}
    return Lines(items, **options)
