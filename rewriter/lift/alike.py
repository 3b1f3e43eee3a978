"""Regions that compute the same of other tensors, at the same lines: layers of a model, which share a kernel.

A region's meaning is its program with tensors called by the order in which it reads them, and axes by theirs.
"""

from __future__ import annotations

from collections.abc import Hashable

from rewriter.ir import Axis, Load, Node, Output, Tensor, index, substitute, transform
from rewriter.lift.region import Region, site_of


def meaning_of(region: Region) -> tuple[Hashable, tuple[Tensor, ...]]:
    """(what two regions that may share a kernel have in common, the tensors in the order of that)"""
    tensors = region.program.tensors
    called = {t: Tensor(f"t{k}", t.shape, t.dtype, t.given, t.lanes, t.masks) for k, t in enumerate(tensors)}
    outputs = tuple(_meaning(o, called) for o in region.program.outputs)
    laid_out = tuple((str(site_of(n)), tuple(map(str, n.meta["val"].stride()))) for n in region.outputs)
    return (outputs, laid_out, region.tentative, region.program.lengths), tensors


def _meaning(output: Output, called: dict[Tensor, Tensor]) -> Hashable:
    axes = {a: index(Axis(f"a{k}", a.extent)) for k, a in enumerate(output.axes)}

    def renamed(node: Node) -> Node:
        return Load(called[node.tensor], node.index) if isinstance(node, Load) else node

    body = substitute(transform(output.body, renamed), axes)
    return body, tuple(a.extent for a in output.axes), output.dtype, output.shape
