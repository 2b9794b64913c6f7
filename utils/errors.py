"""Errors that a person can mend: one clear line instead of a traceback."""

import functools
import sys

import clip


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, what was expected, what to do."""


def command(main):
    """Decorate a script's `main`: an `InputError` ends it with one line on stderr and status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (InputError, clip.CheckpointError) as error:
            # A DataLoader worker wraps the error in its own traceback: the last line is ours.
            message = str(error).strip().splitlines()[-1]
            message = message.split("InputError: ", 1)[-1]
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)

    return run
