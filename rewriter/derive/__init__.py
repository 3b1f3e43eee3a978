"""Stage derive: index notation → a chain that one pass over the stream computes."""

from rewriter.derive.chain import Chain, Definition, Shift
from rewriter.derive.derive import derive
from rewriter.derive.forms import NotDerivable

__all__ = ["Chain", "Definition", "NotDerivable", "Shift", "derive"]
