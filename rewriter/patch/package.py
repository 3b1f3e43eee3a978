"""The files of OUT: module, kernels, test."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rewriter.emit import KernelFile, render
from rewriter.lift import Region
from rewriter.patch.forward import ForwardPrinter
from rewriter.patch.guards import guards_of, tensors_of, values_of
from rewriter.patch.signature import signature_of
from rewriter.trace import TracedModule


@dataclass(frozen=True)
class Patched:
    """A host module with its rewritten forward as text."""

    class_name: str
    text: str


def patch(
    traced: TracedModule, regions: tuple[Region, ...], kernels: list[KernelFile], title: str
) -> Patched:
    """The text of `module.py`. Raises RewriteError where the forward cannot be written down."""
    signature = signature_of(traced)
    printer = ForwardPrinter(traced, kernels, regions, signature.leaves)
    forward = printer.print()
    is_module = isinstance(traced.module, nn.Module)
    name = type(traced.module).__name__ if is_module else traced.module.__name__
    text = render(
        "module.py.jinja",
        title=title,
        name=name,
        is_module=is_module,
        signature=signature,
        tensors=tensors_of(traced),
        values=values_of(traced, printer.called),
        guards=guards_of(traced, signature, printer.called),
        lines=forward.lines,
        kernels=[k.name for k in {k.name: k for k in kernels}.values()],
        qualified=f"{type(traced.module).__qualname__}" if is_module else name,
    )
    return Patched(name, text)
