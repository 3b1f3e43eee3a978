"""What forward keeps for its next call, and would make again: masks, tables. Forgetting them changes nothing but
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.state import state_of, unchanged
from rewriter.trace.calls import FILLS
from rewriter.trace.contexts import fake_tensors

_SHAPES_ONLY = {*FILLS, "empty_like", "new_empty", "rand_like", "randn_like"}


@dataclass(frozen=True)
class Caches:
    """Attributes, as `layers.0.mask`, that a call sets to nothing of its inputs' values, and the next call to the same.

    `kept`: some of them are tensors that the next call takes as they are.
    """

    names: frozenset[str] = frozenset()
    kept: bool = False

    def forgotten(self, touched: set[str]) -> frozenset[str]:
        """All of them, as one tells of another, where forward takes any as it finds it."""
        return self.names if self.kept or self.names & touched else frozenset()


def caches(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Caches:
    """Finds them by two calls on fake tensors; the module is as before at the end. Where that fails, there are none."""
    try:
        with unchanged(module), fake_tensors() as mode:
            args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            before = state_of(module)
            with _FromInputs((args, kwargs)) as found:
                module(*args, **kwargs)
                first = state_of(module)
                module(*args, **kwargs)
            second = state_of(module)
    except Exception:
        return Caches()
    paths = {part: f"{path}." if path else "" for path, part in module.named_modules()}
    same = [at for at, value in second.items() if not found.has(value) and _is_same(value, first.get(at))]
    held = [{at: _tensors(state.get(at)).keys() for at in same} for state in (before, first, second)]
    kept = [at for at in same if held[0][at] != held[1][at] == held[2][at]]
    return Caches(frozenset(f"{paths[part]}{name}" for part, name in same), bool(kept))


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal as far as they are plain; tensors made anew are."""
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_is_same(v, other[k]) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return not isinstance(value, (bool, int, float, str)) or value == other


class _FromInputs(TorchDispatchMode):
    """Follows which tensors are computed from the values of inputs."""

    def __init__(self, inputs: Any):
        super().__init__()
        self.made = _tensors(inputs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.has((args, kwargs)) and func.__name__.split(".")[0] not in _SHAPES_ONLY:
            self.made |= _tensors(out)
        return out

    def has(self, value: Any) -> bool:
        return not self.made.keys().isdisjoint(_tensors(value))


def _tensors(value: Any) -> dict[int, torch.Tensor]:
    return {id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)}
