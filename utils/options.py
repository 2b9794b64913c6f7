"""Options as commands have them, an argparse.Namespace; params.py declares them."""

import argparse


def changed(args, **values):
    """A copy of the options with other values of some."""
    return argparse.Namespace(**{**vars(args), **values})
