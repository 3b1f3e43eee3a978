"""The calls that a model makes of its submodules while it runs once."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.trace.caches import unchanged
from rewriter.trace.contexts import masks_as_given, quiet


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: `path` is where the model holds it, "" the model itself."""

    path: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    @property
    def form(self) -> Hashable:
        """What two calls have in common for which one trace will do: all but the values of tensors."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return repr(spec), tuple(map(_form, leaves))


def _form(leaf: Any) -> Hashable:
    if not torch.is_tensor(leaf):
        return type(leaf), repr(leaf)
    return leaf.dtype, leaf.layout, tuple(leaf.shape) if leaf.layout is torch.strided else ()


def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, tuple[ModuleCall, ...]]:
    """The calls of each submodule by path, in order, one of each form; nothing where the model does not run.

    The model is as before at the end. Left out is a submodule whose instance has a `forward` of its own: another class
    would not change what it does. So is one that is called in other ways where a mask has other values.
    """
    calls = _recorded(module, args, kwargs)
    if not any(isinstance(part, (nn.TransformerEncoder, nn.TransformerDecoder)) for part in module.modules()):
        return calls
    with masks_as_given():
        others = _recorded(module, args, kwargs)
    return {path: found for path, found in calls.items() if _forms(found) == _forms(others.get(path, ()))}


def _forms(calls: tuple[ModuleCall, ...]) -> list[Hashable]:
    return [call.form for call in calls]


def _recorded(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, tuple[ModuleCall, ...]]:
    calls: dict[str, dict[Hashable, ModuleCall]] = {}

    def note(call: ModuleCall) -> None:
        calls.setdefault(call.path, {}).setdefault(call.form, call)

    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with unchanged(module), _same_buffers(module), _noted(module, note), quiet(), torch.no_grad():
            with torch.random.fork_rng(devices=[]):
                module(*args, **kwargs)
    except Exception:
        return {}
    return {path: tuple(by_form.values()) for path, by_form in calls.items()}


@contextmanager
def _noted(root: nn.Module, note) -> Iterator[None]:
    """Forwards are replaced where they are looked up: hooks would make torch's encoders take another path."""
    parts = {path: part for path, part in root.named_modules() if path and "forward" not in vars(part)}
    for path, part in parts.items():
        vars(part)["forward"] = _noting(path, part, note)
    try:
        yield
    finally:
        for part in parts.values():
            vars(part).pop("forward", None)


def _noting(path: str, module: nn.Module, note):
    forward = module.forward

    @functools.wraps(forward)
    def noting(*args, **kwargs):
        note(ModuleCall(path, module, args, kwargs))
        return forward(*args, **kwargs)

    return noting


@contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    """Statistics that forward changes are as before at the end."""
    held = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in held:
            buffer.data.copy_(before)
