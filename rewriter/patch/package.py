"""The files of OUT: module, kernels, test."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rewriter.emit import KernelFile, render
from rewriter.errors import RewriteError
from rewriter.lift import Region
from rewriter.patch.forward import ForwardPrinter, attribute_path
from rewriter.patch.guards import guards_of
from rewriter.patch.signature import signature_of
from rewriter.patch.sizes import sizes_of
from rewriter.trace import Dimension, TracedModule
from rewriter.trace.sizes import UnknownSize


@dataclass(frozen=True)
class Patched:
    """A host module with its rewritten forward as text."""

    class_name: str
    text: str


def patch(
    traced: TracedModule,
    regions: tuple[Region, ...],
    kernels: list[KernelFile],
    title: str,
    broadcast: frozenset[Dimension],
) -> Patched:
    """The text of `module.py`. Raises RewriteError where the forward cannot be written down."""
    signature = signature_of(traced)
    try:
        sizes = sizes_of(traced, signature.leaves, broadcast)
        printer = ForwardPrinter(traced, kernels, regions, signature.leaves, sizes)
        forward, guards = printer.print(), guards_of(traced, signature, sizes, regions)
    except UnknownSize as size:
        raise RewriteError(f"forward depends on {size}, which can't be written down") from size
    is_module = isinstance(traced.module, nn.Module)
    name = type(traced.module).__name__ if is_module else traced.module.__name__
    text = render(
        "module.py.jinja",
        title=title,
        name=name,
        is_module=is_module,
        signature=signature,
        parameters=[
            attribute_path(a.path) for a in traced.attributes.values() if a.path not in traced.constants
        ],
        guards=guards,
        lines=forward.lines,
        kernels=[k.name for k in {k.name: k for k in kernels}.values()],
        qualified=f"{type(traced.module).__qualname__}" if is_module else name,
    )
    return Patched(name, text)
