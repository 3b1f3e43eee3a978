"""What every program of the zoo is held to, wherever it runs."""

from __future__ import annotations

import re
import symtable
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import black
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import Program, Sizes, Wide

from rewriter.api import Rewrite, rewrite
from rewriter.check.numerics import compare, run_float64


class NothingWide(TorchDispatchMode):
    """Fails where an eager op makes a tensor with rows and stream among its dimensions that is not an input or
    output.
    """

    def __init__(self, wide: Wide, allowed: set[tuple[int, ...]]):
        super().__init__()
        self.wide, self.allowed = wide, allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for leaf in pytree.tree_leaves(out):
            if (
                torch.is_tensor(leaf)
                and leaf.untyped_storage().data_ptr() not in given
                and self.is_wide(tuple(leaf.shape))
            ):
                raise AssertionError(f"{func} wrote {tuple(leaf.shape)}")
        return out

    def is_wide(self, shape: tuple[int, ...]) -> bool:
        return shape not in self.allowed and any(_holds(shape, pair) for pair in self.wide)


def _holds(shape: tuple[int, ...], pair: tuple[int, int]) -> bool:
    """Whether both sizes are among a shape's, twice where they are the same."""
    left = list(shape)
    for size in pair:
        if size not in left:
            return False
        left.remove(size)
    return True


def at_dtype(values: Any, dtype: torch.dtype) -> Any:
    """Floating tensors among `values` as `dtype`."""
    return pytree.tree_map(lambda t: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t, values)


def built(program: Program, dtype: torch.dtype):
    model = program.build()
    return model.to(dtype) if isinstance(model, nn.Module) else model


@contextmanager
def unformatted() -> Iterator[None]:
    """Files are emitted as templates have them: black takes a quarter of the time, and goldens have what it makes."""
    with patch.object(black, "format_str", lambda text, mode: text):
        yield


@unformatted()
def rewritten(program: Program, model, dtype: torch.dtype) -> Rewrite:
    result = rewrite(model, at_dtype(program.inputs(program.traced, model), dtype))
    assert not held_tensors(result.sources)
    return result


def held_tensors(sources: dict[str, str]) -> set[str]:
    """Tensors of the first call that functions inside `prepared` hold: others would be launched with them."""
    held: set[str] = set()
    for name, text in sources.items():
        if name.startswith("kernels/") and "def prepared(" in text:
            tables = symtable.symtable(text, name, "exec").get_children()
            (prepared,) = (t for t in tables if t.get_name() == "prepared")
            tensors = set(re.findall(r"lying\((\w+)\)", text)).intersection(prepared.get_parameters())
            held |= {free for inner in prepared.get_children() for free in _frees(inner) if free in tensors}
    return held


def _frees(table: symtable.SymbolTable) -> set[str]:
    own = set(table.get_frees()) if isinstance(table, symtable.Function) else set()
    return own.union(*map(_frees, table.get_children()))


def _is_watched(program: Program, model, sizes: Sizes, inputs: set[tuple[int, ...]]) -> bool:
    """Long enough to tell sizes apart, and no tensor of rows x stream is stored by the program itself: what it computes
    from a stored pair tensor or index by ops that stay eager (a layer norm, a small network) is its own."""
    held = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    stored = [tuple(t.shape) for t in held]
    wide = program.wide(sizes)
    watcher = NothingWide(wide, set())
    return (
        min(n for pair in wide for n in pair) > 16
        and not program.eager
        and not any(watcher.is_wide(s) for s in (*stored, *inputs))
    )


def check_at(program: Program, model, result: Rewrite, sizes: Sizes, dtype: torch.dtype) -> None:
    """The drop-in at other sizes: right, by its kernels, and without writing anything wide."""
    args = at_dtype(program.inputs(sizes, model), dtype)
    allowed = {tuple(t.shape) for t in pytree.tree_leaves(args) if torch.is_tensor(t)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its original code.*")
        eager = model(*args)
        given = {tuple(t.shape) for t in pytree.tree_leaves(eager) if torch.is_tensor(t)}
        watched = _is_watched(program, model, sizes, allowed)
        with NothingWide(program.wide(sizes), allowed | given) if watched else torch.no_grad():
            out = result.module(*args)
    reference = run_float64(model, args)
    leaves = [pytree.tree_leaves(x) for x in (out, eager, reference)]
    assert len(leaves[0]) == len(leaves[1])
    for got, own, ref in zip(*leaves):
        verdict = compare(got, own, ref, dtype)
        assert verdict.ok, f"{sizes}: {verdict.reason}"


def kernels_of(sources: dict[str, str]) -> int:
    """How many kernels there are in emitted files, those aside that stand in for one where rows are few, and those that
    look which tiles a mask leaves.
    """
    names = [name for text in sources.values() for name in re.findall(r"^def (\w+)_kernel\(", text, re.M)]
    return sum(not re.search(r"_(part|merge|write|(map|flags)\d*)$", name) for name in names)
