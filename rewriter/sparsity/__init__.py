"""Stage sparsity: predicates → the part of a stream that they leave, so that loops run over that alone."""

from rewriter.sparsity.intervals import EVERYWHERE, Interval, Support, support_of, union
from rewriter.sparsity.tiles import GREATEST, LEAST, Truth, truth_of

__all__ = ["EVERYWHERE", "GREATEST", "LEAST", "Interval", "Support", "Truth", "support_of", "truth_of", "union"]
