"""Names in an emitted file: the literature's for axes and state, the user's for tensors."""

from __future__ import annotations

import keyword
import re

from rewriter.derive import Chain, Definition
from rewriter.ir import Axis, Const, Node, Param, Tensor, walk
from rewriter.plan import KernelPlan

_RESERVED = set("tl triton torch pid offs_m offs_n start_n m_new M N LOG2E full NEG_INF range".split())


class Names:
    """Assigns every axis, size, tensor and running value of a plan a name, once."""

    def __init__(self, plan: KernelPlan, display: dict[str, str]):
        self.taken: set[str] = set(_RESERVED)
        self.axes = self._axes(plan)
        self.sizes = self._sizes(plan)
        self.tensors = {t: self.unique(_identifier(display.get(t.name, t.name))) for t in plan.chain.tensors}
        self.outputs = [
            self.unique("out" if len(plan.chain.outputs) == 1 else f"out_{o.name}")
            for o in plan.chain.outputs
        ]
        self.state = self._state(plan.chain, plan)

    def unique(self, wanted: str) -> str:
        name, k = wanted, 2
        while name in self.taken or keyword.iskeyword(name):
            name, k = f"{wanted}_{k}", k + 1
        self.taken.add(name)
        return name

    def _axes(self, plan: KernelPlan) -> dict[Axis, str]:
        out = {plan.row: "m", plan.stream: "n"}
        grid = ["h", "b", "g", "i", "j", "k", "x", "y", "z"]
        for axis, name in zip(reversed(plan.grid), grid):
            out[axis] = name
        if len(plan.grid) == 1 and not isinstance(plan.grid[0].extent, Const):
            out[plan.grid[0]] = "b"
        for k, axis in enumerate(plan.features):
            out[axis] = ["d", "e", "f", "c"][k] if k < 4 else f"d{k}"
        self.taken |= set(out.values())
        return out

    def _sizes(self, plan: KernelPlan) -> dict[Node, str]:
        """Names of the extents known only at the call, and of the sizes other expressions mention."""
        out: dict[Node, str] = {}
        for axis in (plan.row, plan.stream, *plan.grid):
            if not isinstance(axis.extent, Const):
                out.setdefault(axis.extent, self.axes[axis].upper())
        for param in dict.fromkeys(n for n in walk(*_all_nodes(plan)) if isinstance(n, Param)):
            if param not in out and _is_mentioned(param, plan, out):
                out[param] = self.unique(param.name.upper())
        self.taken |= set(out.values())
        return out

    def _state(self, chain: Chain, plan: KernelPlan) -> dict[str, str]:
        """m_i for maxima, l_i for sums over a row, acc for sums with features; numbered where there are several."""
        out: dict[str, str] = {}
        for definition in chain.definitions:
            base = _base(definition, plan)
            count = sum(v.startswith(base) for v in out.values())
            out[definition.name] = base if not count else f"{base}{count + 1}"
        self.taken |= set(out.values())
        return out


def _base(definition: Definition, plan: KernelPlan) -> str:
    if any(a in plan.features for a in definition.axes):
        return "acc"
    return {"max": "m_i", "sum": "l_i"}.get(definition.op, f"{definition.op}_i")


def _all_nodes(plan: KernelPlan) -> list[Node]:
    chain = plan.chain
    roots = [n for d in chain.definitions for n in (d.predicate, d.body)] + [o.body for o in chain.outputs]
    shapes = [s for t in chain.tensors for s in t.shape] + [a.extent for o in chain.outputs for a in o.axes]
    return roots + shapes


def _is_mentioned(param: Param, plan: KernelPlan, named: dict[Node, str]) -> bool:
    """Whether a size occurs other than inside an extent that has a name."""
    return any(_mentions(root, param, named) for root in _all_nodes(plan))


def _mentions(node: Node, param: Param, named: dict[Node, str]) -> bool:
    if node is param:
        return True
    return node not in named and any(_mentions(c, param, named) for c in node.children)


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"t_{name}" if not name or name[0].isdigit() else name


def stride_name(tensor: str, k: int, letters: tuple[str, ...]) -> str:
    """stride_qb, stride_qh, ...: the tensor's name and the axis that moves it."""
    return f"stride_{tensor}{letters[k]}" if len(tensor) == 1 else f"stride_{tensor}_{letters[k]}"


__all__ = ["Names", "Tensor", "stride_name"]
