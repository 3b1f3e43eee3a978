"""The files of OUT: module, kernels, test."""

from __future__ import annotations

import builtins
import inspect
import re
from dataclasses import dataclass

from torch import nn

from rewriter.emit import KernelFile, render
from rewriter.errors import RewriteError
from rewriter.lift import Region
from rewriter.patch import digest
from rewriter.patch.digest import code_digest
from rewriter.patch.forward import ForwardPrinter
from rewriter.patch.guards import guards_of
from rewriter.patch.scope import undefined_names
from rewriter.patch.signature import signature_of
from rewriter.patch.sizes import sizes_of
from rewriter.patch.state import own_tensors, parts_of, ties
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
        forward, guards = printer.print(), guards_of(traced, signature, sizes)
    except UnknownSize as size:
        raise RewriteError(f"forward depends on {size}, which can't be written down") from size
    _refuse_hidden(traced, [*forward.lines, *(g.condition for g in guards)])
    is_module = isinstance(traced.module, nn.Module)
    name = type(traced.module).__name__ if is_module else traced.module.__name__
    program = type(traced.module) if is_module else traced.module
    text = render(
        "module.py.jinja",
        title=title,
        name=name,
        class_name=re.sub(r"\W", "", name),
        is_module=is_module,
        signature=signature,
        parts=parts_of(traced, forward.called),
        tensors=own_tensors(traced),
        ties=ties(traced),
        guards=guards,
        lines=forward.lines,
        uses_math=any("math." in text for text in (*forward.lines, *(g.condition for g in guards))),
        classes=forward.classes,
        kernels=[k.name for k in {k.name: k for k in kernels}.values()],
        qualified=program.__qualname__,
        digest=code_digest(program),
        digest_code=inspect.getsource(digest).split("import inspect\n", 1)[1].strip(),
    )
    if missing := undefined_names(text):
        raise RewriteError(f"the new forward would need {', '.join(sorted(missing))}")
    return Patched(name, text)


def _refuse_hidden(traced: TracedModule, lines: list[str]) -> None:
    """Raises RewriteError for an argument that hides what the new forward calls: `len`, `torch`."""
    program = traced.module.forward if isinstance(traced.module, nn.Module) else traced.module
    called = {name for line in lines for name in re.findall(r"(?<![\w.])(\w+)(?=\()", line)}
    for name in inspect.signature(program).parameters:
        if name == "torch" or (name in called and name in vars(builtins)):
            raise RewriteError(f"forward has an argument called {name}, which the new one calls")
