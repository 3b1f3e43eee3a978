"""Attention modules as their packages publish them: right at the sizes given, and at another batch and length.

They need packages of their own: `scripts/test --models` installs those and runs this file.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import _pytree as pytree

from rewriter import rewrite
from rewriter.check.numerics import compare, run_float64
from rewriter.check.smaller import Call, other_sizes

pytestmark = pytest.mark.models
FILES = sorted((Path(__file__).parent / "models").glob("*.py"))
# The program itself asks for it: positions are relative to a table as long as the window.
FIXED_LENGTH = ("hf_sam_relpos",)


def imported(file: Path) -> ModuleType:
    """Skips where its packages are missing."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}; scripts/test --models installs it")
    return module


def calls_of(model, args: tuple, has_lengths: bool) -> list[Call]:
    """The arguments, shorter ones, and a batch of one, where the model takes them."""
    given = (args, {})

    def fits(call: Call) -> bool:
        try:
            model(*call[0])
        except Exception:
            return False
        return True

    def one(call: Call) -> Call:
        return pytree.tree_map(lambda t: t[:1] if t.shape[0] == args[0].shape[0] else t, call)

    shorter = other_sizes(given, fits) if has_lengths else None
    calls = [given, *([shorter] if shorter else [])]
    return calls + [c for c in map(one, calls) if args[0].shape[0] > 1 and fits(c)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@torch.no_grad()
def test_a_published_module(file):
    published = imported(file)
    model, args = published.Model(*published.get_init_inputs()).eval(), tuple(published.get_inputs())
    result = rewrite(model, args)
    assert bool(result.report["chains"]) is (published.EXPECT == "fuse")
    for call in calls_of(model, args, file.stem not in FIXED_LENGTH) if result.report["chains"] else ():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*runs its original code.*")
            out = result.module(*call[0])
        leaves = map(pytree.tree_leaves, (out, model(*call[0]), run_float64(model, call[0])))
        for got, own, wanted in zip(*leaves, strict=True):
            verdict = compare(got, own, wanted, torch.float32)
            assert verdict.ok, verdict.reason
