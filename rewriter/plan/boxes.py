"""Loads that fetch a box of a tensor at once: what the tensor memory accelerator of Hopper and later GPUs does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriter.ir import Axis, Const, Index, Load, Node, Ref, Tensor, walk
from rewriter.ir.integer import from_poly, plus, to_poly
from rewriter.plan.kernel import KernelPlan, padded

MOST_DIMENSIONS = 5  # of a tensor that a descriptor describes
ALIGNMENT = 16  # bytes, of rows and of the start


@dataclass(frozen=True)
class Box:
    """A tile of a tensor. `order` are the tensor's dimensions, the dense one last; `axes` the tile's axes along them,
    None where a program has one position. `of_pairs`: of rows and stream positions; it is a box only where the tensor
    lies so at the call, as copies of such tensors would be too large.
    """

    tensor: Tensor
    order: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    of_pairs: bool = False


def box_of(plan: KernelPlan, load: Load) -> Box | None:
    """How a load is one box for each tile: rows or stream positions one after the other, with all of a feature axis
    dense in memory, or rows with the stream dense. What lies outside the tensor is 0, as in other loads. None where a
    load is not so.
    """
    tensor, rank = load.tensor, len(load.index)
    if tensor.lanes is None or not 2 <= rank <= MOST_DIMENSIONS or not _is_boxed(plan, tensor):
        return None
    order = (*(k for k in range(rank) if k != tensor.lanes), tensor.lanes)
    axes = tuple(_axis_along(plan, load.index[k], tensor.shape[k]) for k in order)
    moving = [a for a in axes if a is not None]
    fixed = [load.index[k] for k, a in zip(order, axes) if a is None]
    if len(moving) != 2 or axes[-1] is None or not all(_is_program_s(plan, e) for e in fixed):
        return None
    if moving[0] in plan.rows and moving[1] in plan.streams and tensor.lanes == rank - 1:
        return Box(tensor, order, axes, of_pairs=True)
    of_features = moving[0] in (*plan.rows, *plan.streams) and moving[1] in plan.features
    return Box(tensor, order, axes) if of_features and _is_aligned(tensor) else None


def offset_in(entry: Node, axis: Axis) -> Node:
    """Where a box starts along an axis that it takes whole: entry - axis"""
    return from_poly(plus(to_poly(entry), to_poly(Index(axis)), -1))


def _is_boxed(plan: KernelPlan, tensor: Tensor) -> bool:
    """Whether a kernel loads boxes: for matrix products of 16-bit operands, tile by tile. Few rows wait for memory alone,
    which pointers read as fast; describing boxes would take longer than a launch.
    """
    tiled = bool(plan.dots) and not plan.steps and not plan.long_axes and not any(s.part for s in plan.sweeps)
    return tiled and tensor.dtype in (torch.float16, torch.bfloat16)


def _axis_along(plan: KernelPlan, entry: Node, extent: Node) -> Axis | None:
    """The tile axis along one dimension: all of it, or of a feature axis without padding a part of it."""
    own = [a for a in plan.tile_axes if a in entry.free]
    if len(own) != 1:
        return None
    axis = own[0]
    if entry == Index(axis) and axis.extent == extent:
        return axis
    is_part = axis in plan.features and padded(axis) == axis.extent.value
    return axis if is_part and _is_program_s(plan, offset_in(entry, axis)) else None


def _is_program_s(plan: KernelPlan, entry: Node) -> bool:
    """Whether a position is the same for all of a program, and known without loading it."""
    return entry.free <= frozenset(plan.grid) and not any(isinstance(n, (Load, Ref)) for n in walk(entry))


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows of the tensor are aligned, where it is contiguous."""
    extent = tensor.shape[tensor.lanes]
    return isinstance(extent, Const) and extent.value * tensor.dtype.itemsize % ALIGNMENT == 0
