"""Stage trace: module and inputs → FX graph with provenance."""

from rewriter.trace.capture import Attribute, Dimension, FixedSize, TracedModule, capture

__all__ = ["Attribute", "Dimension", "FixedSize", "TracedModule", "capture"]
