"""A function through the whole path, and what its kernels are held to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from zoo_checks import NothingWide

from rewriter.api import Rewrite, rewrite
from rewriter.check.numerics import compare, run_float64


def fused(program: Callable, args: tuple, folder: Path | None = None, **options) -> Rewrite:
    """The program rewritten, with every chain in it fused."""
    result = rewrite(program, args, out=folder, **options)
    assert result.report["chains"] and not result.report["unfused"], result.report["unfused"]
    return result


def assert_right(
    result: Rewrite, program: Callable, args: tuple, wide: tuple[int, int] = (), dtype: torch.dtype = torch.float32
) -> None:
    """As right as eager, by its kernels, and without writing a tensor over both sizes of `wide` that is not given."""
    eager = program(*args)
    shapes = {tuple(t.shape) for t in pytree.tree_leaves((args, eager)) if torch.is_tensor(t)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its original code.*")
        with NothingWide((wide,), shapes) if wide else nullcontext():
            out = result.module(*args)
    leaves = [pytree.tree_leaves(x) for x in (out, eager, run_float64(program, args))]
    for got, own, wanted in zip(*leaves, strict=True):
        verdict = compare(got, own, wanted, dtype)
        assert verdict.ok, f"{tuple(args[0].shape)}: {verdict.reason}"
