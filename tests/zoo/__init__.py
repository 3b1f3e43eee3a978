"""Programs written as users write them: what the rewriter is tested on.

One module per family. Each holds a few ordinary `nn.Module`s, in the styles of different authors, and
a list `PROGRAMS` that says how to build and feed them. Spellings share no attention code on purpose:
that they differ is what they are for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What varies between two calls of one program."""

    batch: int
    q: int
    kv: int | None = None  # None: as many keys as queries

    @property
    def keys(self) -> int:
        return self.q if self.kv is None else self.kv


Wide = tuple[tuple[int, int], ...]  # pairs: how many rows, how long a stream


def queries_and_keys(sizes: Sizes) -> Wide:
    return ((sizes.q, sizes.keys),)


@dataclass(frozen=True)
class Program:
    """A program and how to use it.

    `build(dim=64, heads=4, **kw)` gives the module (or plain function), seeded, randomised, in eval
    mode. Any `build` takes `max_len`, the longest sequence wanted; only programs with buffers of a
    fixed length heed it. `inputs(sizes, module, generator=None)` gives CPU tensors in fp32, int64 or
    bool, for that module's own dimensions.
    """

    name: str
    family: str
    build: Callable
    inputs: Callable
    traced: Sizes  # what the program is captured at
    others: tuple[Sizes, ...]  # what the same rewritten module must be right at, too
    fused: bool = True  # False: there is nothing here to fuse
    note: str = ""  # what is fixed by the program's own nature, or odd
    twin: str = ""  # a program with the same maths, inputs and parameters
    nan_rows: bool = False  # rows masked throughout, which eager turns into NaN
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")  # where eager runs at all
    part: int = 1  # 1: one pass and one output; 2: the rest
    passes: int | None = None  # sweeps over long axes, of all kernels together
    kernels: int | None = None
    why: str = ""  # why fewer passes or kernels won't do
    rows: bool = False  # lone rows: fused where `--rows` asks for it
    eager: tuple[str, ...] = ()  # ops that write something wide, stay eager and are reported
    wide: Callable[[Sizes], Wide] = queries_and_keys  # what no tensor may have both of


def programs(part: int | None = 1) -> list[Program]:
    """Every program of one part (None: of all), family by family, in a fixed order."""
    found = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        family = importlib.import_module(f"{__name__}.{module.name}")
        found += getattr(family, "PROGRAMS", [])
    return [program for program in found if part in (None, program.part)]
