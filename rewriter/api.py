"""The library: `rewrite(module, args)` in one call."""

from __future__ import annotations

import atexit
import copy
import functools
import importlib.util
import inspect
import itertools
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.command import package_files
from rewriter.hosts import rewrite_model
from rewriter.load.inputs import TORCH_DTYPES
from rewriter.load.prepare import cast
from rewriter.options import MASKED_ROWS
from rewriter.output import write_package
from rewriter.report import left_alone, report_on

_packages = itertools.count()


@dataclass(frozen=True)
class Rewrite:
    """`module`: the drop-in, ready to call (the original where nothing fuses). `sources`: file name → text."""

    module: Callable
    report: dict[str, Any]
    sources: dict[str, str]


def rewrite(
    module_or_function: Callable,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    masked_rows: str = "match",
    rows: bool = False,
    force: bool = False,
) -> Rewrite:
    """Rewrites a module or function for inputs like `args` and `kwargs`.

    args, kwargs: example inputs; sizes stay free, dtypes and ranks do not.
    out: the folder that the package is written to; a temporary one if None.
    dtype: casts the floating inputs and (a copy of) the module first; "fp32", "fp16" and "bf16" are taken too.
    masked_rows: "match" (rows masked throughout give what eager gives) or "zero".
    rows: asks for lone rows of softmax and norms too; the report says which stay with PyTorch's kernels.
    force: overwrites kernels in `out` that were edited, else they are kept and used, with a warning.
    Raises RewriteError where the program does not trace or `out` can't be written, and TypeError or ValueError for
    other arguments than these.
    """
    program = _program(module_or_function)
    if masked_rows not in MASKED_ROWS:
        raise ValueError(f"masked_rows is {masked_rows!r}, not one of {', '.join(MASKED_ROWS)}")
    program, args, kwargs = _as_dtype(program, _call(args, kwargs), TORCH_DTYPES.get(dtype, dtype))
    rewritten = rewrite_model(program, args, kwargs, masked_rows=masked_rows, rows=rows)
    name = getattr(program, "__name__", type(program).__name__)
    title = f"`{name}`, its reduction chains as Triton kernels."
    report = report_on(rewritten, title, left_alone(rewritten, rows=rows))
    if not rewritten.hosts:
        return Rewrite(program, report.json(), {})
    sources = package_files(rewritten, title) | report.files()
    package = _imported(sources, out, force)
    hosts = {type(host.call.module) for host in rewritten.hosts}
    return Rewrite(package.apply(_apart(program, hosts)), report.json(), sources)


def _program(given: Any) -> Callable:
    """What is rewritten: beneath torch.compile, and beneath an earlier rewrite."""
    given = getattr(given, "_orig_mod", given)
    if isinstance(given, nn.Module):
        return _as_given(given)
    if inspect.isfunction(inspect.unwrap(given)):
        return inspect.unwrap(given, stop=inspect.isfunction)
    if inspect.ismethod(given) and isinstance(given.__self__, nn.Module):
        raise TypeError(f"rewrite takes the {type(given.__self__).__name__} itself, not its method")
    raise TypeError(f"rewrite takes an nn.Module or a Python function, not a {type(given).__name__}")


def _call(args: Any, kwargs: dict[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args is a {type(args).__name__}, not a tuple of the arguments")
    return tuple(args), dict(kwargs or {})


def _as_dtype(program: Callable, call: tuple, dtype: torch.dtype | None) -> tuple[Callable, tuple, dict]:
    if dtype is None:
        return program, *call
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, not a floating one")
    program = copy.deepcopy(program) if isinstance(program, nn.Module) else program
    return program, *cast(program, call, dtype)


def _as_given(module: nn.Module) -> nn.Module:
    """Without what an earlier rewrite made of it or its submodules: those are copied, and so is what holds them."""
    kinds = {type(m): type(m)._original for m in module.modules() if hasattr(type(m), "_original")}
    return _copied(module, kinds) if kinds else module


def _apart(program: Callable, hosts: Collection[type]) -> Callable:
    """A model in which the hosts, and what holds them, are objects of their own: they share parameters and buffers."""
    return _copied(program, dict.fromkeys(hosts)) if isinstance(program, nn.Module) else program


def _copied(module: nn.Module, kinds: dict[type, type | None]) -> nn.Module:
    """Shallow copies of the modules of these classes, as other ones where they say so, and of those that hold them or
    refer to them otherwise, in an attribute or with a hook of theirs.
    """
    near = {m: {*m.children(), *_referred(m)} for m in module.modules()}
    apart = {m for m in near if type(m) in kinds}
    while more := {m for m, others in near.items() if m not in apart and not apart.isdisjoint(others)}:
        apart |= more
    copies = {m: nn.Module.__new__(kinds.get(type(m)) or type(m)) for m in apart}
    for m, out in copies.items():
        tables = {n: v.copy() for n, v in vars(m).items() if isinstance(v, dict)}
        own = {n: _referring(v, copies) for n, v in (vars(m) | tables).items()}
        vars(out).update(own)
    return copies.get(module, module)


def _referred(module: nn.Module) -> set[nn.Module]:
    """What a module's attributes refer to, or its hooks are bound to."""
    leaves = pytree.tree_leaves([v for n, v in vars(module).items() if n != "_modules"])
    found = (getattr(leaf, "__self__", None) if inspect.ismethod(leaf) else leaf for leaf in leaves)
    return {m for m in found if isinstance(m, nn.Module)}


def _referring(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    """An attribute that refers to the copies; itself where there are none in it."""

    def other(leaf: Any) -> Any:
        if inspect.ismethod(leaf) and isinstance(leaf.__self__, nn.Module) and leaf.__self__ in copies:
            return leaf.__func__.__get__(copies[leaf.__self__])
        return copies.get(leaf, leaf) if isinstance(leaf, nn.Module) else leaf

    leaves, spec = pytree.tree_flatten(value)
    new = list(map(other, leaves))
    return value if all(a is b for a, b in zip(leaves, new)) else pytree.tree_unflatten(new, spec)


def _imported(sources: dict[str, str], out: str | Path | None, force: bool) -> ModuleType:
    """The package, written to `out` and imported, by its folder's name where that is free: so it can be pickled by
    name.
    """
    if out is None:
        temporary = Path(tempfile.mkdtemp(prefix="flashlight_"))
        atexit.register(functools.partial(shutil.rmtree, temporary, ignore_errors=True))
        write_package(temporary, sources)
        return import_package(temporary)
    folder = Path(out).absolute()
    for path in write_package(folder, sources, force=force).kept:
        warnings.warn(f"{path}: kept, because it was edited since it was written", stacklevel=3)
    return import_package(folder, folder.name if _is_free(folder) else None)


def _is_free(folder: Path) -> bool:
    """Whether the folder's name, imported, would give nothing or this package."""
    known = sys.modules.get(folder.name)
    found = getattr(known, "__file__", None) or (None if known else importlib.util.find_spec(folder.name))
    file = getattr(found, "origin", found)
    return folder.name.isidentifier() and (file == str(folder / "__init__.py") or not (known or found))


def import_package(folder: Path, name: str | None = None) -> ModuleType:
    """Imports an emitted package from its folder, anew, under a name of its own unless one is given."""
    name = name or f"flashlight_package_{next(_packages)}"
    for known in [n for n in sys.modules if n.split(".")[0] == name]:
        del sys.modules[known]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package
