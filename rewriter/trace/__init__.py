"""Stage trace: module and inputs → FX graph with provenance."""

from rewriter.trace.capture import Attribute, Dimension, TracedModule, capture

__all__ = ["Attribute", "Dimension", "TracedModule", "capture"]
