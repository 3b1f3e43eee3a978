"""Flashlight: rewrites plain PyTorch attention into readable Triton kernels and a drop-in module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.api import rewrite

__version__ = "0.1.0"
__all__ = ["__version__", "rewrite"]


def __getattr__(name: str) -> Any:
    # `rewrite` brings in torch, which `flashlight-rewrite --help` must not wait for (PEP 562).
    if name == "rewrite":
        from rewriter.api import rewrite

        return rewrite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
