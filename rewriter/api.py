"""The library: `rewrite(module, args)` in one call."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.pipeline import Rewritten, package_files, rewrite_module
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
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | None = None,
    masked_rows: str = "match",
    rows: bool = False,
) -> Rewrite:
    """Rewrites a module or function for inputs like `args` and `kwargs`.

    args, kwargs: example inputs; sizes stay free, dtypes and ranks do not.
    out: where the package is written; a temporary folder if None.
    dtype: casts the floating inputs and (a copy of) the module first.
    masked_rows: "match" (rows masked throughout give what eager gives) or "zero".
    rows: asks for lone rows of softmax and norms too; the report says which stay with PyTorch's kernels.
    Raises RewriteError where the program does not trace.
    """
    module, args, kwargs = _as_dtype(module_or_function, tuple(args), kwargs or {}, dtype)
    rewritten = rewrite_module(module, args, kwargs, masked_rows=masked_rows)
    name = getattr(module, "__name__", type(module).__name__)
    title = f"`{name}`, its reduction chains as Triton kernels."
    report = report_on(rewritten, title, name, left_alone(rewritten, rows=rows))
    if rewritten.patched is None:
        return Rewrite(module, report.json(), {})
    sources = package_files(rewritten, title) | report.files()
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="flashlight_"))
    return Rewrite(_applied(rewritten, module, sources, folder), report.json(), sources)


def _as_dtype(module: Callable, args: tuple, kwargs: dict, dtype: torch.dtype | None):
    if dtype is None:
        return module, args, kwargs

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf

    if isinstance(module, nn.Module):
        module = copy.deepcopy(module).to(dtype)
    return module, *pytree.tree_map(cast, (args, kwargs))


def _applied(rewritten: Rewritten, module: Callable, sources: dict[str, str], folder: Path) -> Callable:
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = import_package(folder)
    target = copy.copy(module) if isinstance(module, nn.Module) else module
    return package.apply(target)


def import_package(folder: Path) -> ModuleType:
    """Imports an emitted package from its folder under a name of its own."""
    name = f"flashlight_package_{next(_packages)}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package
