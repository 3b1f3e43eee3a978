"""What a call of forward leaves behind in its module.

A mask or table that it keeps for the next call may be forgotten: it is made again. What it makes of its inputs (weights to look
at, a cache of keys) may not, nor what differs after each call (a count).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.trace.calls import FILLS

_SHAPES_ONLY = {*FILLS, "empty_like", "new_empty", "rand_like", "randn_like"}
_CONTAINERS = (list, dict, set)

State = dict[tuple[nn.Module, str], Any]  # (module, attribute) → its value, a copy where it is a container


def effects(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """The attributes, as `layers.0.last`, that a call sets and a rewritten forward would not.

    It is called twice, on fake tensors; the module is as before at the end. Where that fails, nothing is seen.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # fake tensors log every failure at length
    try:
        with unchanged(module), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            with _FromInputs((args, kwargs)) as found:
                module(*args, **kwargs)
                first = _state(module)
                module(*args, **kwargs)
            second = _state(module)
    except Exception:
        return []
    finally:
        logging.disable(level)
    paths = {part: f"{path}." if path else "" for path, part in module.named_modules()}
    kept = [at for at, value in second.items() if found.has(value) or not _is_same(value, first.get(at))]
    return sorted(f"{paths[part]}{name}" for part, name in kept)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Puts attributes back at the end, and what was in its lists and dicts."""
    parts = list(module.modules())
    objects, before = [dict(vars(part)) for part in parts], _state(module)
    try:
        yield
    finally:
        for part, held in zip(parts, objects, strict=True):
            vars(part).clear()
            vars(part).update(held)
            for name, value in held.items():
                if type(value) in _CONTAINERS:
                    _refill(value, before[part, name])


def _state(module: nn.Module) -> State:
    return {
        (part, name): type(value)(value) if type(value) in _CONTAINERS else value
        for part in module.modules()
        for name, value in vars(part).items()
    }


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(items)


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
        self.made = {id(t): t for t in _tensors(inputs)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.has((args, kwargs)) and func.__name__.split(".")[0] not in _SHAPES_ONLY:
            self.made |= {id(t): t for t in _tensors(out)}
        return out

    def has(self, value: Any) -> bool:
        return any(id(t) in self.made for t in _tensors(value))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
