"""Stage `load`: the user's file, and what to take from it → a module that runs, with its inputs.

`load` is the stage. Importing this package imports no torch: a missing file or a syntax error is
reported before those seconds.
"""

from __future__ import annotations

from rewriter.load.loaded import Loaded
from rewriter.load.source import Source, read_source
from rewriter.options import Options

__all__ = ["Loaded", "Source", "load", "read_source"]


def load(options: Options) -> Loaded:
    """Import the file, build the model, find its inputs and run its forward once.

    Raises:
        RewriteError: with code BAD_INPUT and the user's line, where any of these fails.
    """
    source = read_source(options.file)
    from rewriter.load.steps import load_source

    return load_source(source, options)
