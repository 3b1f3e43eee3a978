"""What the patched forward checks before it trusts the kernels: as conditions, each with the cause it names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from rewriter.errors import RewriteError
from rewriter.ir import Const
from rewriter.patch.forward import attribute_path
from rewriter.patch.signature import Signature
from rewriter.patch.sizes import Place, Sizes
from rewriter.trace import TracedModule
from rewriter.trace.assumed import as_known
from rewriter.trace.sizes import relation_text


@dataclass(frozen=True)
class Guard:
    """Python text that is true where the kernels apply, and what to say where it is not. `then`: a line that follows."""

    condition: str
    cause: str
    then: str = ""


def guards_of(traced: TracedModule, signature: Signature, sizes: Sizes) -> tuple[Guard, ...]:
    """Arguments, training mode, missing attributes, dtypes, ranks and sizes that tracing assumed."""
    out = [Guard(*condition) for condition in signature.conditions]
    if isinstance(traced.module, nn.Module):
        training = traced.module.training
        out.append(Guard(f"self.training is {training}", f"the module is {'not ' if training else ''}in training mode"))
    out += [_absent(path) for path in traced.absent]
    shapes = _shape_names(signature)
    for name, text in signature.leaves.items():
        out += _tensor_guards(traced.placeholders[name].meta["val"], text, shapes[text])
    bound = sizes.bound(shapes)
    out += [guard for said, read in zip(sizes.places, bound.places) for guard in _size_guard(said, read, sizes, bound)]
    return (*out, *_autocast(traced, signature), *_conditions(traced, sizes, bound))


def _shape_names(signature: Signature) -> dict[str, str]:
    """A name for the shape of each argument, which is read once: `q_shape`."""
    taken = set(re.findall(r"\w+", signature.text))
    out: dict[str, str] = {}
    for text in signature.leaves.values():
        name = f"{text}_shape" if text.isidentifier() else f"shape_{len(out)}"
        while name in taken:
            name += "_"
        taken.add(name)
        out[text] = name
    return out


def _absent(path: str) -> Guard:
    owner, _, name = path.rpartition(".")
    text = attribute_path(owner) if owner else "self"
    return Guard(f"not hasattr({text}, {name!r})", f"{text} has {name!r}")


def _autocast(traced: TracedModule, signature: Signature) -> list[Guard]:
    """What forward casts by itself depends on the device: tracing wrote that of its own device down."""
    out = []
    for name, text in list(signature.leaves.items())[:1]:
        here = traced.placeholders[name].meta["val"].device.type
        for device in sorted(traced.autocast):
            relation = "==" if device == here else "!="
            out.append(
                Guard(f'{text}.device.type {relation} "{device}"', f"it autocasts on {device} and was traced on {here}")
            )
    return out


def _tensor_guards(value: torch.Tensor, text: str, shape: str) -> list[Guard]:
    return [
        Guard(f"isinstance({text}, torch.Tensor)", f"{text} is no tensor"),
        Guard(f"{text}.dtype is {value.dtype}", f"{text} is not {value.dtype}", f"{shape} = {text}.shape"),
        Guard(f"len({shape}) == {value.dim()}", f"{text} has not {value.dim()} dimensions"),
    ]


def _size_guard(said: Place, read: Place, sizes: Sizes, bound: Sizes) -> list[Guard]:
    """What is said of a place, and what is read where shapes have names."""
    wanted, extent = bound.text(read.extent), sizes.text(said.extent)
    if wanted == read.text:
        return []
    if isinstance(read.extent, Const):
        return [Guard(f"{read.text} == {wanted}", f"{said.text} is not {extent}")]
    if read.broadcasts:
        return [Guard(f"{read.text} in (1, {wanted})", f"{said.text} is neither 1 nor {extent}")]
    return [Guard(f"{read.text} == {wanted}", f"{said.text} differs from {extent}")]


def _conditions(traced: TracedModule, sizes: Sizes, bound: Sizes) -> list[Guard]:
    """The user's own branches on sizes, as they were taken."""
    said = {size.name: text for size, text in sizes.sources.items()}
    read = {size.name: text for size, text in bound.sources.items()}
    out = []
    for found in traced.conditions:
        condition = as_known(traced.graph, found)
        unknown = [s for s in condition.free_symbols if s.name not in said]
        if unknown:
            raise RewriteError(f"a branch on a size ({unknown[0]}) that no input has")
        if not condition.free_symbols:
            continue
        out.append(Guard(relation_text(condition, read), f"{relation_text(condition, said)} does not hold"))
    return out
