"""What the patched forward checks before it trusts the kernels: as conditions, each with the cause it names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rewriter.errors import RewriteError
from rewriter.ir import Const, Node, Param, Reduce, transform, walk
from rewriter.lift import Region
from rewriter.patch.signature import Signature
from rewriter.patch.sizes import Place, Sizes
from rewriter.trace import TracedModule
from rewriter.trace.sizes import relation_text


@dataclass(frozen=True)
class Guard:
    """Python text that is true where the kernels apply, and what to say where it is not."""

    condition: str
    cause: str


def guards_of(
    traced: TracedModule, signature: Signature, sizes: Sizes, regions: tuple[Region, ...]
) -> tuple[Guard, ...]:
    """Arguments, training mode, dtypes, ranks and sizes that tracing assumed."""
    out = [Guard(_same(text, value), f"{text} is not {value!r}") for text, value in signature.constants]
    if isinstance(traced.module, nn.Module):
        training = traced.module.training
        out.append(
            Guard(
                f"self.training is {training}", f"the module is {'not ' if training else ''}in training mode"
            )
        )
    for name, text in signature.leaves.items():
        out += _tensor_guards(traced.placeholders[name].meta["val"], text)
        out += [guard for place in sizes.places if place.leaf == text for guard in _size_guard(place, sizes)]
    return (*out, *_conditions(traced, sizes), *_not_empty(regions, sizes))


def _same(text: str, value: object) -> str:
    return f"{text} is {value!r}" if value is None or isinstance(value, bool) else f"{text} == {value!r}"


def _tensor_guards(value: torch.Tensor, text: str) -> list[Guard]:
    return [
        Guard(f"isinstance({text}, torch.Tensor)", f"{text} is no tensor"),
        Guard(f"{text}.dtype is {value.dtype}", f"{text} is not {value.dtype}"),
        Guard(f"{text}.dim() == {value.dim()}", f"{text} has not {value.dim()} dimensions"),
    ]


def _size_guard(place: Place, sizes: Sizes) -> list[Guard]:
    wanted = sizes.text(place.extent)
    if wanted == place.text:
        return []
    if isinstance(place.extent, Const):
        return [Guard(f"{place.text} == {wanted}", f"{place.text} is not {wanted}")]
    if place.broadcasts:
        return [Guard(f"{place.text} in (1, {wanted})", f"{place.text} is neither 1 nor {wanted}")]
    return [Guard(f"{place.text} == {wanted}", f"{place.text} differs from {wanted}")]


def _conditions(traced: TracedModule, sizes: Sizes) -> list[Guard]:
    """The user's own branches on sizes, as they were taken."""
    names = {size.name: text for size, text in sizes.sources.items()}
    out = []
    for condition in traced.conditions:
        unknown = [s for s in condition.free_symbols if s.name not in names]
        if unknown:
            raise RewriteError(f"a branch on a size ({unknown[0]}) that no input has")
        text = relation_text(condition, names)
        out.append(Guard(text, f"{text} does not hold"))
    return out


def _not_empty(regions: tuple[Region, ...], sizes: Sizes) -> list[Guard]:
    """What is reduced has an element: eager has rules of its own for nothing, which kernels do not follow."""
    bodies = [output.body for region in regions for output in region.program.outputs]
    reduces = [n for n in walk(*bodies) if isinstance(n, Reduce)]
    extents = dict.fromkeys(a.extent for r in reduces for a in r.axes if _may_be_empty(a.extent))
    texts = [sizes.text(e) for e in extents]
    return [Guard(f"{text} > 0", f"{text} is not above 0") for text in texts]


def _may_be_empty(extent: Node) -> bool:
    least = transform(extent, lambda n: Const(0) if isinstance(n, Param) else n)
    return not (isinstance(least, Const) and least.value > 0)
