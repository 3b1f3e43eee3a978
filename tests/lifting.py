"""One ATen call (or a captured function) lifted and evaluated node by node, beside what torch gives."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from rewriter.ir.evaluate import Evaluator
from rewriter.lift.local import LocalLift, lift_locally
from rewriter.lift.values import Lifted
from rewriter.trace.sizes import shape_of

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Call:
    """An overload with real arguments."""

    op: Any
    args: tuple
    kwargs: dict

    def __str__(self) -> str:
        shown = pytree.tree_map(lambda a: list(a.shape) if torch.is_tensor(a) else a, (self.args, self.kwargs))
        return f"{self.op} {shown}"


def call(op: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(op, args, kwargs)


def graph_of(made: Call, dynamic: bool) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """A graph of one call and the tensors it is fed; `dynamic` gives every size a symbol, equal sizes the same."""
    graph, fed = fx.Graph(), {}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # of no use here, and half the time

    def placeholder(leaf: Any):
        if not torch.is_tensor(leaf):
            return leaf
        node = graph.placeholder(f"in{len(fed)}")
        fed[node.name] = leaf
        dims = [DimDynamic.DUCK if dynamic else DimDynamic.STATIC] * leaf.dim()
        node.meta["val"] = mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))
        return node

    args, kwargs = pytree.tree_map(placeholder, (made.args, made.kwargs))
    node = graph.call_function(made.op, args, kwargs)
    fake = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = made.op(*fake[0], **fake[1])
    if isinstance(node.meta["val"], (tuple, list)):
        for k, value in enumerate(node.meta["val"]):
            item = graph.call_function(operator.getitem, (node, k))
            item.meta["val"] = value
    return graph, fed


def values_of(graph: fx.Graph, fed: dict[str, Any]) -> dict[fx.Node, Any]:
    """What every node holds when torch runs the graph."""
    held: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            held[node] = fed[node.name]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: held[n])
            held[node] = node.target(*args, **kwargs)
    return held


def sizes_of(graph: fx.Graph, held: dict[fx.Node, Any]) -> dict[str, int]:
    """The value of every symbol, read off the placeholders."""
    sizes: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and torch.is_tensor(held[node]):
            for extent, size in zip(shape_of(node.meta["val"]), held[node].shape):
                sizes.setdefault(getattr(extent, "name", ""), size)
    return sizes


def evaluated(value: Lifted, held: dict[fx.Node, Any], sizes: dict) -> torch.Tensor:
    tensors = {n.name: v for n, v in held.items() if torch.is_tensor(v)}
    evaluator = Evaluator(tensors, sizes)
    shape = [evaluator.extent(a.extent) for a in value.axes]
    return evaluator.value(value.body, value.axes).expand(shape)


def assert_lifted(node: fx.Node, lift: LocalLift, held: dict[fx.Node, Any], sizes: dict) -> None:
    """The lifted value of a node (or of each part of a tuple) is what torch computes."""
    assert lift.value is not None, lift.reason
    parts = zip(lift.value, held[node]) if isinstance(lift.value, tuple) else [(lift.value, held[node])]
    for value, want in parts:
        if value is None:
            continue
        got = evaluated(value, held, sizes)
        assert kind(value.body.dtype) == kind(want.dtype), (node, value.body.dtype, want.dtype)
        assert got.shape == want.shape, (node, got.shape, want.shape)
        off = TOLERANCE.get(want.dtype, 0)
        torch.testing.assert_close(
            got.double(),
            want.double(),
            rtol=off,
            atol=off,
            equal_nan=True,
            msg=lambda m: f"{node.target}: {m}",
        )


def kind(dtype: torch.dtype) -> str:
    """Integer widths are not distinguished."""
    if dtype.is_floating_point or dtype is torch.bool:
        return str(dtype)
    return "int"


def lifted_call(made: Call, dynamic: bool) -> dict[fx.Node, LocalLift]:
    return lift_locally(graph_of(made, dynamic)[0])


UNSURE = ("may start before the first element",)


def check_call(made: Call, dynamic: bool) -> None:
    """Lifts one call and compares every node it gives. Not every relation of symbols to numbers is understood."""
    allowed = UNSURE if dynamic else ()
    graph, fed = graph_of(made, dynamic)
    held = values_of(graph, fed)
    lifts = lift_locally(graph)
    for node, lift in lifts.items():
        if lift.value is None and any(reason in lift.reason for reason in allowed):
            continue
        assert_lifted(node, lift, held, sizes_of(graph, held))
