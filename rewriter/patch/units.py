"""What the patched forward prints as one thing: a fused chain, a call of a submodule, or a single op."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import fx, nn

from rewriter.lift import Region
from rewriter.trace import TracedModule
from rewriter.trace.calls import value_inputs


@dataclass(frozen=True, eq=False)
class Unit:
    """`nodes` are replaced by one statement that reads `inputs` and gives `outputs`."""

    nodes: frozenset[fx.Node]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    region: Region | None = None
    module: str = ""


def units_of(traced: TracedModule, regions: tuple[Region, ...]) -> dict[fx.Node, Unit]:
    """The unit of every call node."""
    out: dict[fx.Node, Unit] = {}
    for region in regions:
        unit = Unit(frozenset(region.outputs), region.inputs, region.outputs, region=region)
        out |= dict.fromkeys(region.outputs, unit)
    fused = frozenset(out) | frozenset().union(frozenset(), *(r.inside for r in regions))
    for unit in _module_calls(traced, fused):
        if not any(n in out for n in unit.nodes):
            out |= dict.fromkeys(unit.nodes, unit)
    for node in traced.graph.nodes:
        if node.op == "call_function" and node not in out:
            out[node] = Unit(frozenset([node]), tuple(value_inputs(node)), (node,))
    return out


def _module_calls(traced: TracedModule, fused: frozenset[fx.Node]) -> list[Unit]:
    """Calls of submodules that take one tensor and return one, outermost first: `self.q_proj(x)`."""
    if not isinstance(traced.module, nn.Module):
        return []
    groups: dict[tuple[int, str, str], list[fx.Node]] = {}
    for node in traced.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if node.op == "call_function":
            for depth, (key, (path, _)) in enumerate(stack.items()):
                if path:
                    groups.setdefault((depth, key, path), []).append(node)
    calls = [
        _module_call(traced, path, nodes, fused)
        for (_, _, path), nodes in sorted(groups.items(), key=lambda g: g[0][0])
    ]
    return [c for c in calls if c]


def _module_call(traced: TracedModule, path: str, nodes: list[fx.Node], fused: frozenset[fx.Node]) -> Unit | None:
    inside = frozenset(nodes)
    if inside & fused or path in traced.packed or not _takes_one_argument(traced.module, path):
        return None
    outer = [a for n in nodes for a in n.all_input_nodes if a not in inside]
    given = tuple(
        dict.fromkeys(a for a in outer if a.name not in traced.attributes and hasattr(a.meta.get("val"), "dim"))
    )
    leaving = tuple(n for n in nodes if any(u not in inside for u in n.users))
    if len(given) != 1 or len(leaving) != 1:
        return None
    return Unit(inside, given, leaving, module=path)


def _takes_one_argument(root: nn.Module, path: str) -> bool:
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and len(inspect.signature(module.forward).parameters) == 1
