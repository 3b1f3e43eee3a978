"""What the patched forward assumes of its module: numbers and flags, parts and hooks, tensors. Another instance may
differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from types import CodeType
from typing import Any

import torch
from torch import nn

from rewriter.patch.forward import attribute_path
from rewriter.patch.literal import is_plain, literal
from rewriter.trace import TracedModule
from rewriter.trace.capture import MODULE_SLOTS, tensors_of
from rewriter.trace.source import is_user_file


@dataclass(frozen=True)
class Part:
    """A module whose forward the patched one stands in for: its class, its parts' names, hooks, and what forward reads.

    `kind` is "" for the host itself, whose class `apply` looks at; a forward of the instance's own counts as a hook;
    `state` has literals by dotted attribute.
    """

    text: str
    kind: str
    parts: tuple[str, ...]
    hooks: int
    state: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OwnTensor:
    """A parameter, buffer or other tensor that the module holds, as it was traced."""

    text: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def own_tensors(traced: TracedModule) -> tuple[OwnTensor, ...]:
    """Every tensor of the module that forward reads."""
    found = {a.path: traced.placeholders[name].meta["val"] for name, a in traced.attributes.items()}
    return tuple(OwnTensor(attribute_path(p), t.dtype, tuple(map(int, t.shape))) for p, t in found.items())


def ties(traced: TracedModule) -> tuple[tuple[str, str], ...]:
    """Pairs of names under which the module holds one tensor that forward reads."""
    if not isinstance(traced.module, nn.Module):
        return ()
    held = tensors_of(traced.module)
    read = {id(held[a.path]) for a in traced.attributes.values() if a.path in held}
    names: dict[int, list[str]] = {}
    for path, tensor in held.items():
        names.setdefault(id(tensor), []).append(attribute_path(path))
    return tuple((first, other) for key, (first, *rest) in names.items() if key in read for other in rest)


def parts_of(traced: TracedModule, called: Collection[str]) -> tuple[Part, ...]:
    """The host, and every module in it but those `called` as they are (by path) and what is in them."""
    if not isinstance(traced.module, nn.Module):
        return ()
    inside = tuple(f"{path}." for path in called)
    named = dict(traced.module.named_modules()).items()
    parts = ((m, path) for path, m in named if path not in called and not path.startswith(inside))
    matters = traced.touched.difference(traced.assigned)
    return tuple(_part(m, path, matters) for m, path in parts)


def _part(module: nn.Module, path: str, matters: frozenset[str]) -> Part:
    """matters: dotted paths of the attributes that forward has read and not made itself."""
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
    parts = tuple(name for name, child in module._modules.items() if child is not None)
    own = {a.rpartition(".")[2] for a in matters if a.rpartition(".")[0] == path}
    state = tuple((name, literal(value)) for name, value in _state(module, own) if name.split(".")[0] in own)
    if not path:  # the host: its hooks run around any forward, and `apply` looks at its class
        return Part("self", "", parts, 0, tuple((n, v) for n, v in state if n != "training"))
    return Part(attribute_path(path), type(module).__qualname__, parts, hooks, state)


def _state(module: nn.Module, own: set[str]) -> Iterator[tuple[str, Any]]:
    """(dotted attribute, value) of the numbers, flags, texts and functions that the module's forward reads, those of
    its class among them: an instance may get others.

    own: names of the attributes that were read of it.
    """
    read = _names_read(type(module))
    slots = [vars(module)[slot] for slot in ("_parameters", "_buffers")]
    values = {n: v for slot in slots for n, v in slot.items() if v is None}
    values |= {n: v for n, v in vars(module).items() if n not in MODULE_SLOTS or n == "training"}
    of_class = {n: inspect.getattr_static(type(module), n, None) for n in sorted(own.difference(values))}
    values |= {n: v for n, v in of_class.items() if is_plain(v) and v is not None}
    for name, value in values.items():
        if name in read or name in own:
            yield from ((f"{name}{end}", v) for end, v in _plain_in(value, read))


def _plain_in(value: Any, read: set[str]) -> Iterator[tuple[str, Any]]:
    """What of a value can be compared: itself, what is read of a configuration object, a function's name."""
    if is_plain(value):
        yield "", value
    elif isinstance(value, Enum):
        yield ".name", value.name
    elif hasattr(value, "__qualname__"):
        yield ".__qualname__", value.__qualname__
    elif not isinstance(value, (torch.Tensor, nn.Module)):
        held = _plain_of_class(type(value)) | getattr(value, "__dict__", {})
        yield from ((f".{n}", v) for n, v in held.items() if n in read and is_plain(v))


def _plain_of_class(kind: type) -> dict[str, Any]:
    """The numbers, flags and texts in a class of the user's, which its objects have unless they get others."""
    kinds = (k for k in reversed(kind.__mro__) if k is not object)
    return {n: v for k in kinds for n, v in vars(k).items() if not n.startswith("__") and is_plain(v)}


def _names_read(kind: type) -> set[str]:
    """Every name in the code of `forward`, and of the methods and functions of the user's that it names."""
    names: set[str] = set()
    todo: list[Any] = [inspect.getattr_static(kind, "forward", None)]
    seen: set[CodeType] = set()
    while todo:
        member = todo.pop()
        function = inspect.unwrap(getattr(member, "fget", getattr(member, "__func__", member)))
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names |= _names_in(code)
        todo += [inspect.getattr_static(kind, name, None) for name in _names_in(code)]
        if is_user_file(code.co_filename):
            todo += [function.__globals__.get(name) for name in _names_in(code)]
    return names


def _names_in(code: CodeType) -> set[str]:
    """Those of functions defined inside too."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
