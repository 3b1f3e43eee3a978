"""The calls that a model makes of its submodules while it runs once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.state import unchanged
from rewriter.trace.contexts import masks_as_given, quiet

AUTOCAST = ("cpu", "cuda")


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: `path` is where the model holds it, "" the model itself.

    `likely`: not of the example itself, but of other values of its masks.
    """

    path: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    likely: bool = False

    @property
    def form(self) -> Hashable:
        """What two calls have in common for which one trace will do: all but the values of tensors."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return repr(spec), tuple(map(_form, leaves))

    @property
    def coincidences(self) -> frozenset:
        """Pairs of dimensions of one size, which a trace takes for the same."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        sizes = [
            ((k, d), n) for k, x in enumerate(leaves) if torch.is_tensor(x) for d, n in enumerate(x.shape) if n > 1
        ]
        return frozenset((a, b) for (a, n), (b, m) in itertools.combinations(sizes, 2) if n == m)

    @property
    def form_at_any_size(self) -> Hashable:
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return repr(spec), tuple((x.dtype, x.dim()) if torch.is_tensor(x) else _form(x) for x in leaves)


def _form(leaf: Any) -> Hashable:
    if not torch.is_tensor(leaf):
        return type(leaf), repr(leaf)
    return leaf.dtype, leaf.layout, tuple(leaf.shape) if leaf.layout is torch.strided else ()


Calls = dict[str, tuple[ModuleCall, ...]]


def record(
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    elsewhere: tuple[tuple, dict] | None = None,
    larger: tuple[tuple, dict] | None = None,
) -> Calls:
    """The calls of each submodule by path, in order, one of each form; nothing where the model does not run.

    elsewhere: arguments of other sizes. A submodule that is then called with other numbers is left out: its caller
    computes them. So is one that changes the lists it is given, that reaches modules which it does not hold, or is
    called under autocast, one whose instance has a `forward` of its own, as another class would not change what it
    does, and one that torch calls in other ways where a mask has other values. larger: arguments with a larger batch
    than one. Of calls in which sizes are equal by chance, those at other sizes stand for them. The model is as before at the end.
    """
    calls = _recorded(module, args, kwargs)
    calls = {path: found for path, found in calls.items() if not _hooked_in_other_ways(module, found[0].module)}
    if any(isinstance(part, (nn.TransformerEncoder, nn.TransformerDecoder)) for part in module.modules()):
        with masks_as_given():
            calls = _with_equal(lambda call: call.form, calls, _recorded(module, args, kwargs))
    if elsewhere:
        others = _recorded(module, *elsewhere)
        calls = _with_equal(lambda call: call.form_at_any_size, calls, others) if others else calls
        calls = _told_apart(calls, others)
    calls = _told_apart(calls, _recorded(module, *larger)) if larger and calls else calls
    for masked in _other_masks(args, kwargs) if calls else ():
        for path, others in _recorded(module, *masked).items():
            forms = _forms(calls.get(path, ()))
            new = (replace(call, likely=True) for call in others if call.form not in forms)
            calls |= {path: (*calls[path], *new)} if path in calls else {}
    return calls


def _hooked_in_other_ways(root: nn.Module, module: nn.Module) -> bool:
    """Whether another module of its class has other hooks, or forwards of its instance's own, inside: a new class for
    both would not tell them apart.
    """
    own = _hooks_inside(module)
    others = (_hooks_inside(m) for m in root.modules() if type(m) is type(module)) if own else ()
    return any(other and other != own for other in others)


def _hooks_inside(module: nn.Module) -> list[tuple]:
    found = []
    for path, part in module.named_modules():
        tables = (part._forward_pre_hooks, part._forward_hooks) if path else ()
        hooks = [(k, hook) for k, table in enumerate(tables) for hook in table.values()]
        hooks += [(2, vars(part)["forward"])] if path and "forward" in vars(part) else []
        found += [(path, k, _meaning(hook)) for k, hook in hooks]
    return found


def _meaning(hook: Callable) -> Hashable:
    """Functions are themselves; objects, as of `weight_norm`, what they hold."""
    return hook if hasattr(hook, "__func__") or hasattr(hook, "__code__") else (type(hook), repr(vars(hook)))


def given_to_forward(call: ModuleCall) -> tuple[tuple, dict[str, Any]]:
    """The arguments as a module's hooks hand them on: they run around any forward."""
    module, args, kwargs = call.module, call.args, call.kwargs
    if not isinstance(module, nn.Module) or not module._forward_pre_hooks:
        return args, kwargs
    with unchanged(module), torch.no_grad():
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            elif (changed := hook(module, args)) is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _with_equal(form: Callable[[ModuleCall], Hashable], calls: Calls, others: Calls) -> Calls:
    """Those that are called in the same ways."""

    def forms(found: tuple[ModuleCall, ...]) -> set[Hashable]:
        return set(map(form, found))

    return {path: found for path, found in calls.items() if forms(found) == forms(others.get(path, ()))}


def _told_apart(calls: Calls, others: Calls) -> Calls:
    """Each call, or one like it in which less is equal."""

    def better(call: ModuleCall) -> ModuleCall:
        alike = (c for c in others.get(call.path, ()) if c.form_at_any_size == call.form_at_any_size)
        return next((c for c in alike if c.coincidences < call.coincidences), call)

    return {path: tuple(map(better, found)) for path, found in calls.items()}


def _other_masks(args: tuple, kwargs: dict[str, Any]) -> list[tuple[tuple, dict]]:
    """The arguments with masks of ones and zeros that are ones throughout, and not: models drop masks of ones."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    masks = [torch.is_tensor(x) and x.numel() > 1 and _is_mask(x) for x in leaves]
    if not any(masks):
        return []
    full = [torch.ones_like(x) if is_mask else x for x, is_mask in zip(leaves, masks)]
    cut = [_without_last(x) if is_mask else x for x, is_mask in zip(full, masks)]
    return [pytree.tree_unflatten(given, spec) for given in (full, cut)]


def _is_mask(tensor: torch.Tensor) -> bool:
    whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    return whole and bool(((tensor == 0) | (tensor == 1)).all())


def _without_last(mask: torch.Tensor) -> torch.Tensor:
    """Nothing at the last position."""
    out = mask.clone()
    out[..., -1] = 0
    return out


def _forms(calls: tuple[ModuleCall, ...]) -> list[Hashable]:
    return [call.form for call in calls]


def _recorded(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Calls:
    calls: dict[str, dict[Hashable, ModuleCall]] = {}
    left_out: set[str] = set()

    def note(call: ModuleCall) -> None:
        calls.setdefault(call.path, {}).setdefault(call.form, call)

    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with unchanged(module), _same_buffers(module), _noted(module, note, left_out), quiet(), torch.no_grad():
            with torch.random.fork_rng(devices=[]):
                module(*args, **kwargs)
    except Exception:
        return {}
    return {path: tuple(by_form.values()) for path, by_form in calls.items() if path not in left_out}


@contextmanager
def _noted(root: nn.Module, note: Callable[[ModuleCall], None], left_out: set[str]) -> Iterator[None]:
    """Forwards are replaced where they are looked up: hooks would make torch's encoders take another path."""
    parts = {path: part for path, part in root.named_modules() if path and "forward" not in vars(part)}
    inside: list[tuple[str, frozenset[int]]] = []
    for path, part in parts.items():
        vars(part)["forward"] = _entering(inside, path, part, _noting(path, part, note, left_out))
    try:
        with _reaching(root, inside, left_out):
            yield
    finally:
        for part in parts.values():
            vars(part).pop("forward", None)


def _entering(inside: list, path: str, module: nn.Module, forward: Callable) -> Callable:
    """forward, which is `inside` while it runs, by path and with what the module holds."""
    held = frozenset(map(id, module.modules()))

    @functools.wraps(forward)
    def entering(*args, **kwargs):
        inside.append((path, held))
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    return entering


@contextmanager
def _reaching(root: nn.Module, inside: list[tuple[str, frozenset[int]]], left_out: set[str]) -> Iterator[None]:
    """Leaves out modules in which something of the model is read or set that they do not hold: their caller, or what
    their hooks are bound to.
    """
    known = frozenset(map(id, root.modules()))
    find, put = nn.Module.__getattribute__, nn.Module.__setattr__

    def reached(module: nn.Module, name: str) -> None:
        if inside and id(module) in known and not name.startswith("__"):
            left_out.update(path for path, held in inside if id(module) not in held)

    def found(module, name):
        reached(module, name)
        return find(module, name)

    def assigned(module, name, value):
        reached(module, name)
        put(module, name, value)

    nn.Module.__getattribute__, nn.Module.__setattr__ = found, assigned
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = put


def _noting(path: str, module: nn.Module, note: Callable[[ModuleCall], None], left_out: set[str]) -> Callable:
    """forward, which also notes its call; or leaves it out where it can't stand alone: another module would not see
    what it puts into a list that it is given, nor that its caller casts.
    """
    forward = module.forward

    @functools.wraps(forward)
    def noting(*args, **kwargs):
        leaves, spec = pytree.tree_flatten((args, kwargs))
        note(ModuleCall(path, module, *pytree.tree_unflatten(leaves, spec)))
        out = forward(*args, **kwargs)
        after, spec_after = pytree.tree_flatten((args, kwargs))
        is_same = spec == spec_after and all(a is b for a, b in zip(leaves, after, strict=True))
        if not is_same or any(map(torch.is_autocast_enabled, AUTOCAST)):
            left_out.add(path)
        return out

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
