"""Stage patch: traced module + kernels → the source of a drop-in module."""

from rewriter.patch.package import Patched, patch

__all__ = ["Patched", "patch"]
