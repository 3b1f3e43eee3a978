"""Whether a call spelled as people write it does what the traced call does: both are run on tensors without data."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.trace.contexts import quiet
from rewriter.trace.equations import hints_of


class _Calls(TorchDispatchMode):
    """While active, notes the calls of ATen ops: each op, its numbers, and the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        said = (leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if not _is_usual(leaf))
        self.made.append((func, *map(_shown, said)))
        return func(*args, **(kwargs or {}))


def _is_usual(leaf: Any) -> bool:
    """What need not be said."""
    return leaf is None or leaf is False or isinstance(leaf, (torch.layout, torch.memory_format))


def _shown(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if torch.is_tensor(leaf) else repr(leaf)


def does_the_same(node: fx.Node, text: str) -> bool:
    """Whether `text`, with operands and sizes by their names in the graph, makes the same calls of ATen ops as the
    node. True where the node's operands cannot be run: there are none.
    """
    held = [a.meta.get("val") for a in node.all_input_nodes]
    tensors = [t for t in pytree.tree_leaves(held) if torch.is_tensor(t)]
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    if mode is None:
        return True
    names = {"torch": torch, "math": math, **_sizes(mode.shape_env)}
    names |= {a.name: value for a, value in zip(node.all_input_nodes, held)}
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: names[a.name] if isinstance(a, fx.Node) else a
    )
    try:
        with quiet(), torch.no_grad(), mode, _looking_only(mode.shape_env):
            with _Calls() as traced:
                node.target(*args, **kwargs)
            with _Calls() as spelled:
                eval(text, names)
    except Exception:
        return False
    return traced.made == spelled.made


def _looking_only(environment):
    """What is asked of sizes meanwhile fixes none."""
    return environment.suppress_guards() if environment else nullcontext()


def _sizes(environment) -> dict[str, torch.SymInt]:
    """The symbolic sizes by name."""
    if environment is None:
        return {}
    return {s.name: environment.create_symintnode(s, hint=int(hint)) for s, hint in hints_of(environment).items()}
