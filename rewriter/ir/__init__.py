"""Index notation: the language a wide region is rewritten in. Start with `nodes.py`."""

from rewriter.ir.build import apply, cast, const, index, reduce, where
from rewriter.ir.nodes import (
    FALSE,
    TRUE,
    Apply,
    Axis,
    Const,
    Index,
    Load,
    Node,
    Origin,
    Output,
    Param,
    Program,
    Reduce,
    Ref,
    Tensor,
    Where,
    fresh_axis,
    open_reduce,
    rebuild,
    reduce_over,
    substitute,
    transform,
    walk,
)

__all__ = [name for name in dir() if not name.startswith("_")]
