"""What forward looks for in its modules and does not find, and what it leaves in them.

An assignment (`self.weights = w`) has no place in a graph: its value becomes one more result of the traced forward,
and the patched forward makes it again. What forward reads and then sets is refused, unless it is a cache: that one is
forgotten.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.errors import RewriteError, Site
from rewriter.state import refill
from rewriter.trace.caches import Caches
from rewriter.trace.source import is_user_file

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_SLOTS = frozenset(nn.Module().__dict__) - {"training"}  # parameters, buffers, hooks: torch's own
_NN = os.path.join(os.path.dirname(torch.__file__), "nn")
_MISSING = object()


@dataclass
class Attributes:
    """Paths are below the traced module: "norm.eps". `touched` was read, `absent` asked for and not there
    (`hasattr`), `assigned` left by forward, with the user's line. `packed` are submodules that have returned something
    else than a tensor.
    """

    absent: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    assigned: dict[str, Site | None] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)


@contextmanager
def without_hooks(root: nn.Module) -> Iterator[None]:
    """No hook runs around forward: those of a module stay around its new one."""
    held = {slot: vars(root)[slot] for slot in ("_forward_hooks", "_forward_pre_hooks")}
    vars(root).update({slot: OrderedDict() for slot in held})
    try:
        yield
    finally:
        vars(root).update(held)


@contextmanager
def watched(root: nn.Module, caches: Caches = Caches()) -> Iterator[Attributes]:
    """While active, `root.forward` gives (its result, [values it assigned]), where it does not call itself; at the end
    all modules are as they were.
    """
    watch = _Watch(root, caches)
    original, held = root.forward, {m: (dict(vars(m)), dict(m._buffers)) for m in root.modules()}

    running = False

    @functools.wraps(original)
    def forward(*args, **kwargs):
        nonlocal running
        if running:
            return original(*args, **kwargs)
        watch.undo()
        contents, running = watch.contents(), True
        try:
            result = original(*args, **kwargs)
        except BaseException:
            for _, inside, before in contents:
                refill(inside, before)
            raise
        finally:
            running = False
        watch.refuse_changed(contents)
        return result, watch.results()

    vars(root)["forward"] = forward
    try:
        with watch.patched():
            yield watch.seen
        watch.seen.absent -= {path for path in watch.seen.absent if _has(root, path)}
    finally:
        for module, (attributes, buffers) in held.items():
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


class _Watch:
    """Reads and writes of plain attributes by the user's code and by torch's layers."""

    def __init__(self, root: nn.Module, caches: Caches):
        self.caches = caches
        self.paths = {id(m): f"{name}." if name else "" for name, m in root.named_modules()}
        self.modules = list(root.modules())
        code = getattr(root.forward, "__code__", None)
        self.site = Site(code.co_filename, code.co_firstlineno) if code else None
        self.seen = Attributes()
        self.before: dict[tuple[nn.Module, str], Any] = {}

    @contextmanager
    def patched(self) -> Iterator[None]:
        find, put, call = nn.Module.__getattribute__, nn.Module.__setattr__, nn.Module._call_impl

        def found(module, name):
            try:
                value = find(module, name)
            except AttributeError:
                self.note(module, name, sys._getframe(1), is_there=_is_registered(module, name))
                raise
            self.note(module, name, sys._getframe(1))
            return value

        def assigned(module, name, value):
            self.note_assignment(module, name, sys._getframe(1))
            put(module, name, value)

        def called(module, *args, **kwargs):
            out = call(module, *args, **kwargs)
            if not torch.is_tensor(out) and id(module) in self.paths:
                self.seen.packed.add(self.paths[id(module)].rstrip("."))
            return out

        nn.Module.__getattribute__, nn.Module.__setattr__, nn.Module._call_impl = found, assigned, called
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            nn.Module.__setattr__, nn.Module._call_impl = put, call

    def note(self, module: nn.Module, name: str, frame: types.FrameType, *, is_there: bool = True) -> None:
        own = name not in _SLOTS and not name.startswith("__") and id(module) in self.paths
        path = self.paths[id(module)] + name if own else ""
        if own and _is_of_forward(frame) and path not in self.seen.assigned:
            self.seen.touched.add(path)
            self.seen.absent |= set() if is_there else {path}

    def note_assignment(self, module: nn.Module, name: str, frame: types.FrameType) -> None:
        if name in _SLOTS or _is_registered(module, name) or id(module) not in self.paths or not _is_of_forward(frame):
            return
        self.before.setdefault((module, name), vars(module).get(name, _MISSING))
        site = Site(frame.f_code.co_filename, frame.f_lineno)
        self.seen.assigned.setdefault(self.paths[id(module)] + name, site)

    def undo(self) -> None:
        """Every run finds the modules as the first one did."""
        for (module, name), value in self.before.items():
            vars(module).pop(name, None)
            if value is not _MISSING:
                vars(module)[name] = value
        self.before.clear()
        self.seen.assigned.clear()

    def results(self) -> list:
        """What forward assigned. Raises RewriteError where it could not be assigned again, or read what it changes."""
        for path in self.caches.forgotten(self.seen.touched):
            self.seen.assigned.pop(path, None)
        found = {self.paths[id(m)] + name: vars(m).get(name, _MISSING) for m, name in self.before}
        values = [found[path] for path in self.seen.assigned]
        for (path, site), value in zip(self.seen.assigned.items(), values):
            if path in self.seen.touched:
                raise RewriteError(
                    f"forward reads self.{path} and changes it, so that calls differ: it stays as it is", site=site
                )
            if not all(map(_is_result, pytree.tree_leaves(value))):
                raise RewriteError(f"forward assigns self.{path}, which no graph holds: it stays as it is", site=site)
        return values

    def contents(self) -> list[tuple[str, Any, Any]]:
        """(path, container, copy of it) of the lists, dicts, sets and plain objects that the modules hold."""
        held = [
            (self.paths[id(m)] + k, _contents(v)) for m in self.modules for k, v in vars(m).items() if k not in _SLOTS
        ]
        return [(path, inside, inside.copy()) for path, inside in held if inside is not None]

    def refuse_changed(self, contents: list[tuple[str, Any, Any]]) -> None:
        for path, inside, before in contents:
            if len(inside) != len(before) or any(a is not b for a, b in zip(_elements(inside), _elements(before))):
                refill(inside, before)
                if path in self.caches.names:
                    continue
                raise RewriteError(f"forward changes self.{path} in place: it stays as it is", site=self.site)


def _is_registered(module: nn.Module, name: str) -> bool:
    """A parameter, buffer or submodule: found only after the plain attributes."""
    held = vars(module)
    return any(name in held.get(table, ()) for table in ("_parameters", "_buffers", "_modules"))


def _has(root: nn.Module, path: str) -> bool:
    """Whether a path leads somewhere: a class may look attributes up in its own way."""
    try:
        operator.attrgetter(path)(root)
    except AttributeError:
        return False
    return True


def _is_of_forward(frame: types.FrameType) -> bool:
    """The user's code, or a layer of torch; not the machinery that calls modules or traces them."""
    file = frame.f_code.co_filename
    in_layer = file.startswith(_NN) and not file.endswith(os.path.join("modules", "module.py"))
    return in_layer or is_user_file(file)


def _is_result(value: Any) -> bool:
    return torch.is_tensor(value) or isinstance(value, (torch.SymInt, torch.SymFloat)) or type(value) in _PLAIN


def _contents(value: Any) -> list | dict | set | None:
    """The container itself, or the attributes of an object of the user's; None for what is neither."""
    if isinstance(value, (list, dict, set)):
        return value
    own = not isinstance(value, (nn.Module, torch.Tensor, type)) and is_user_file(_file_of(type(value)))
    return getattr(value, "__dict__", None) if own else None


def _elements(inside: list | dict | set) -> list:
    return [*inside, *inside.values()] if isinstance(inside, dict) else list(inside)


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<"
