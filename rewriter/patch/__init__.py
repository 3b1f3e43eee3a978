"""Stage patch: traced module + kernels → the source of a drop-in module."""

from rewriter.patch.package import Patched, module_text, patch
from rewriter.patch.signature import Signature, signature_of

__all__ = ["Patched", "Signature", "module_text", "patch", "signature_of"]
