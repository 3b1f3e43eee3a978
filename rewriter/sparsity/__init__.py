"""Stage sparsity: predicates → the part of a stream that they leave, so that loops run over that alone."""

from rewriter.sparsity.intervals import EVERYWHERE, Interval, Support, support_of, union

__all__ = ["EVERYWHERE", "Interval", "Support", "support_of", "union"]
