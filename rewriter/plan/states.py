"""The states of parts of a stream, merged: reductions along the parts, by the same T that moves a running state.

    m = max_n s[n]           →   m = max_p m[p]
    l = sum_n exp(s[n] - m)  →   l = sum_p exp(m[p] - m) · l[p]

A part in which nothing took part has the empty state, and merging it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from rewriter.derive import Definition
from rewriter.derive.chain import Centre, Shift
from rewriter.derive.factors import multiply
from rewriter.ir import TRUE, Axis, Index, Load, Node, Output, Ref, Tensor, apply, cast, const, transform, where

MERGED = ("sum", "max", "min", "prod", "any", "all")
Of = Callable[[Node], Node]


def state_tensor(definition: Definition, part: Axis) -> Tensor:
    """Where every part's state of a definition is kept."""
    return Tensor(
        f"part_{definition.name}", tuple(a.extent for a in (part, *definition.axes)), held_dtype(definition.body)
    )


def held_dtype(body: Node) -> torch.dtype:
    """The type in which a kernel reduces a value: a position fits 32 bits."""
    if body.dtype.is_floating_point:
        return torch.float32
    return torch.int32 if isinstance(body, Index) else body.dtype


def state_output(definition: Definition, part: Axis) -> Output:
    """A part's state as an output of the kernel that computes it."""
    tensor = state_tensor(definition, part)
    return Output(tensor.name, (part, *definition.axes), replace(definition.ref, final=True), tensor.dtype)


def merging(definitions: tuple[Definition, ...], part: Axis) -> tuple[Definition, ...]:
    """The definitions as reductions along the parts of their stream."""
    own = {d.name: d for d in definitions}

    def of_part(node: Node) -> Node:
        """A value of running states, from those of a part."""

        def rule(n: Node) -> Node:
            if not isinstance(n, Ref) or n.name not in own:
                return n
            return Load(state_tensor(own[n.name], part), (Index(part), *n.index))

        return transform(node, rule)

    return tuple(_merging(d, part, of_part) for d in definitions)


def _merging(definition: Definition, part: Axis, of_part: Of) -> Definition:
    predicate = TRUE
    if definition.extremum:
        predicate = apply("eq", of_part(definition.extremum), definition.extremum)
    shift, centre = _shift(definition, of_part), _centre(definition)
    moved = apply("add", of_part(definition.ref), _gained(definition, centre, of_part)) if centre else None
    value = moved or of_part(definition.ref)
    weight = (apply("exp", apply("sub", shift.exponent, shift.phi)),) if shift else ()
    body = multiply([*weight, value])
    if body.dtype.is_floating_point:
        body = cast(body, definition.body.dtype)  # by which others know it
    return replace(
        definition, stream=part, sweep=0, predicate=predicate, rest=(value,), shift=shift, body=body, centre=centre
    )


def _shift(definition: Definition, of_part: Of) -> Shift | None:
    shift = definition.shift
    return shift and Shift(shift.phi, of_part(shift.phi), shift.settled)


def _centre(definition: Definition) -> Centre | None:
    """What a moment is about; a moment of an exponent is about its phi."""
    shift = definition.shift
    if definition.centre or not (shift and shift.mass):
        return definition.centre
    return Centre(where(apply("eq", shift.phi, const(-math.inf)), const(0.0), shift.phi), shift.mass)


def _gained(definition: Definition, centre: Centre, of_part: Of) -> Node:
    """What the moment of a part gains on the way to the merged mean: δ · mass, δ · (2 · first + δ · mass)"""
    delta = apply("sub", of_part(centre.mean), centre.mean)
    gain = apply("mul", delta, of_part(centre.mass))
    if centre.first is None:
        return gain
    return apply("mul", delta, apply("add", apply("mul", const(2.0), of_part(centre.first)), gain))
