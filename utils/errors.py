"""Errors that a person can mend: one clear line instead of a traceback."""

import functools
import sys
import traceback

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
            print(f"error: {message.split('InputError: ', 1)[-1]}", file=sys.stderr)
            status, where = 2, error.__traceback__
        except SystemExit as error:
            status, where = error.code, error.__traceback__
        # End the data loaders now: the interpreter's end would kill their workers, with tracebacks
        traceback.clear_frames(where)
        sys.exit(status)

    return run
