"""The files of OUT: module, kernels, test."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rewriter.emit import KernelFile, render
from rewriter.errors import RewriteError
from rewriter.lift import Region
from rewriter.patch import digest
from rewriter.patch.digest import code_digest
from rewriter.patch.forward import ForwardPrinter
from rewriter.patch.guards import Guard, guards_of
from rewriter.patch.scope import undefined_names
from rewriter.patch.signature import Signature, signature_of
from rewriter.patch.sizes import sizes_of
from rewriter.patch.state import OwnTensor, Part, own_tensors, parts_of, ties
from rewriter.trace import Dimension, TracedModule
from rewriter.trace.sizes import UnknownSize


@dataclass(frozen=True)
class Patched:
    """A module (or function) with its rewritten forward, as the parts of `module.py` that are its own.

    `called` are the submodules, by path, that the forward calls as they are.
    """

    name: str
    is_module: bool
    qualified: str
    digest: str
    signature: Signature
    parts: tuple[Part, ...]
    tensors: tuple[OwnTensor, ...]
    ties: tuple[tuple[str, str], ...]
    guards: tuple[Guard, ...]
    lines: tuple[str, ...]
    classes: dict[str, str]
    kernels: tuple[str, ...]
    called: frozenset[str]

    @property
    def class_name(self) -> str:
        return re.sub(r"\W", "", self.name)


def patch(
    traced: TracedModule, regions: tuple[Region, ...], kernels: list[KernelFile], broadcast: frozenset[Dimension]
) -> Patched:
    """The new forward. Raises RewriteError where it cannot be written down."""
    signature = signature_of(traced)
    try:
        sizes = sizes_of(traced, signature.leaves, broadcast)
        printer = ForwardPrinter(traced, kernels, regions, signature.leaves, sizes)
        forward, guards = printer.print(), guards_of(traced, signature, sizes)
    except UnknownSize as size:
        raise RewriteError(f"forward depends on {size}, which can't be written down") from size
    _refuse_hidden(traced, [*forward.lines, *(g.condition for g in guards)])
    is_module = isinstance(traced.module, nn.Module)
    program = type(traced.module) if is_module else traced.module
    patched = Patched(
        name=program.__name__,
        is_module=is_module,
        qualified=program.__qualname__,
        digest=code_digest(program),
        signature=signature,
        parts=parts_of(traced, forward.called),
        tensors=own_tensors(traced),
        ties=ties(traced),
        guards=guards,
        lines=forward.lines,
        classes=forward.classes,
        kernels=tuple(dict.fromkeys(k.name for k in kernels)),
        called=forward.called,
    )
    if missing := undefined_names(module_text("", [patched])):
        raise RewriteError(f"the new forward would need {', '.join(sorted(missing))}")
    return patched


def module_text(title: str, hosts: Sequence[Patched]) -> str:
    """The text of `module.py`. Hosts of one class are tried in order: each takes other calls, or other states."""
    texts = [text for h in hosts for text in (*h.lines, *(g.condition for g in h.guards))]
    return render(
        "module.py.jinja",
        title=title,
        hosts=_numbered(hosts),
        is_module=hosts[0].is_module,
        uses_math=any("math." in text for text in texts),
        kernels=list(dict.fromkeys(name for h in hosts for name in h.kernels)),
        digest_code=inspect.getsource(digest).split("import inspect\n", 1)[1].strip(),
    )


@dataclass(frozen=True)
class _Numbered:
    """`rewritten`: its class's name. `method`: that of the method that guards it, of which a module may have several."""

    host: Patched
    rewritten: str
    method: str


def _numbered(hosts: Sequence[Patched]) -> list[_Numbered]:
    """Every host with names of its own: `RewrittenAttention`, `RewrittenAttention2`."""
    before = [sum(h.class_name == host.class_name for h in hosts[:k]) for k, host in enumerate(hosts)]
    numbers = [str(n + 1) if n else "" for n in before]
    return [_Numbered(h, f"Rewritten{h.class_name}{n}", f"_why_not{n}") for h, n in zip(hosts, numbers)]


def _refuse_hidden(traced: TracedModule, lines: list[str]) -> None:
    """Raises RewriteError for an argument that hides what the new forward calls: `len`, `torch`."""
    program = traced.module.forward if isinstance(traced.module, nn.Module) else traced.module
    called = {name for line in lines for name in re.findall(r"(?<![\w.])(\w+)(?=\()", line)}
    for name in inspect.signature(program).parameters:
        if name == "torch" or (name in called and name in vars(builtins)):
            raise RewriteError(f"forward has an argument called {name}, which the new one calls")
