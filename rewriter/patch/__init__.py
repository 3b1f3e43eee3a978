"""Stage patch: traced module + kernels → the source of a drop-in module."""

from rewriter.patch.package import Patched, patch
from rewriter.patch.signature import Signature, signature_of

__all__ = ["Patched", "Signature", "patch", "signature_of"]
