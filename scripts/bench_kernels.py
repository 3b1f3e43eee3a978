"""For `bench.py --kernels`: emitted kernels alone, swept over tiles, beside FlexAttention and hand-written ones."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import bench_flex
import torch
import triton
from bench_zoo import DTYPES, Row, reason, timed
from torch import nn

from rewriter.api import import_package, rewrite
from rewriter.check.numerics import relative_error

WINDOW, PREFIX, DOCUMENTS, CAP = 256, 256, 12, 30.0
BATCH, LENGTH, WIDTH = 4, 4096, 2048
SWEEP = tuple(itertools.product((128, 64), (64, 128, 32), (4, 8), (3, 2, 4)))
"""BLOCK_M, BLOCK_N, num_warps, num_stages; what wins elsewhere comes first, as time may run out."""

HAND_TILES = ((128, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3))
"""Where the sweeps of the hand-written kernels ended on an H200."""


class Attention(nn.Module):
    """As users write it."""

    def __init__(self, score=None, mask=None):
        super().__init__()
        self.score, self.mask = score, mask

    def forward(self, q, k, v, ids=None):
        s = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        i = torch.arange(q.size(-2), device=q.device)[:, None]
        j = torch.arange(k.size(-2), device=q.device)[None, :]
        if self.score is not None:
            s = self.score(s, i, j)
        if self.mask is not None:
            s = s.masked_fill(~self.mask(i, j, ids), float("-inf"))
        return torch.softmax(s, dim=-1) @ v


def _slopes(heads: int, device):
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)


def _alibi(s, i, j):
    return s + (_slopes(s.shape[1], s.device)[:, None, None] * (j - i)).to(s.dtype)


class Variant(NamedTuple):
    score: object = None  # (s, i, j)
    mask: object = None  # (i, j, ids)
    hand: tuple[int, int] | None = None  # MASK and MODE of ceiling2.kern


VARIANTS = {
    "vanilla": Variant(hand=(0, 0)),
    "causal": Variant(mask=lambda i, j, ids: i >= j, hand=(1, 0)),
    "softcap": Variant(score=lambda s, i, j: CAP * torch.tanh(s / CAP), hand=(0, 1)),
    "alibi": Variant(score=_alibi, hand=(0, 2)),
    "window": Variant(mask=lambda i, j, ids: (i >= j) & (i - j <= WINDOW), hand=(2, 0)),
    "prefix": Variant(mask=lambda i, j, ids: (i >= j) | (j < PREFIX)),
    "document": Variant(mask=lambda i, j, ids: (ids[:, None] == ids[None, :]) & (i >= j)),
}


def _flex_functions(case: Case):
    """The variant's score and mask, as FlexAttention wants them: for one position at a time."""
    score, mask, _ = case.variant
    ids, slopes = case.ids, _slopes(case.heads, case.device)
    if case.name == "alibi":
        return lambda s, b, h, i, j: s + slopes[h] * (j - i), None
    if case.name == "document":
        return None, lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)
    of_score, of_mask = (lambda s, b, h, i, j: score(s, i, j)), (lambda b, h, i, j: mask(i, j, None))
    return score and of_score, mask and of_mask


class Case:
    """One variant at one head dim: inputs, the work it is, and what is measured."""

    def __init__(self, name: str, head_dim: int, dtype: str, dry: bool):
        self.name, self.variant, self.device = name, VARIANTS[name], "cpu" if dry else "cuda"
        batch, self.length, width = (1, 64, 2 * head_dim) if dry else (BATCH, LENGTH, WIDTH)
        self.heads = width // head_dim
        self.dtype = DTYPES[dtype]
        torch.manual_seed(0)
        q = torch.empty(batch, self.heads, self.length, head_dim, device=self.device, dtype=self.dtype)
        self.qkv = [torch.randn_like(q) for _ in range(3)]
        self.ids = _document_ids(self.length).to(self.device)
        self.inputs = [*self.qkv, self.ids] if name == "document" else self.qkv
        self.module = Attention(self.variant.score, self.variant.mask)
        self.work = 4 * batch * self.heads * self.length**2 * head_dim * self._attended()
        one = [x[:1].float() for x in self.qkv]  # the scores of all would be gigabytes in fp32
        self.exact = self.module(*one, *self.inputs[3:])

    def _attended(self) -> float:
        """The share of the scores that count, so that skipped work earns nothing."""
        if self.variant.mask is None:
            return 1.0
        n = torch.arange(self.length, device=self.device)
        return self.variant.mask(n[:, None], n[None, :], self.ids).float().mean().item()

    def tflops(self, run) -> float:
        return self.work / timed(run, self.device) / 1e9

    def error(self, out) -> float:
        return relative_error(out[:1], self.exact)


def _document_ids(length: int):
    draw = torch.Generator().manual_seed(0)
    ids = torch.zeros(length, dtype=torch.int32)
    ids[torch.randperm(length - 1, generator=draw)[: DOCUMENTS - 1] + 1] = 1
    return ids.cumsum(0).to(torch.int32)


class Emitted:
    """The kernel files the rewriter writes for a case, and the arguments their wrappers get; one tile for all."""

    def __init__(self, case: Case, folder: str):
        result = rewrite(case.module, tuple(case.inputs), out=folder)
        kernels = [kernel for chain in result.report["chains"] for kernel in chain["kernels"]]
        if not kernels or result.report["unfused"]:
            raise RuntimeError(f"not fused: {result.report['unfused']}")
        package = import_package(Path(folder))
        module = importlib.import_module(f"{package.__name__}.module")
        names = [Path(kernel).stem for kernel in kernels]
        self.files = {name: importlib.import_module(f"{package.__name__}.kernels.{name}") for name in names}
        self.configs = {name: dict(file.CONFIG) for name, file in self.files.items()}
        self.calls, self.inputs = [], case.inputs
        # The patched forward calls kernels by their names in module.py: there their arguments are caught.
        for name in names:
            setattr(module, name, functools.partial(self._launch, name))
        self.module = package.apply(copy.copy(case.module))
        self.out = self.module(*case.inputs)
        if not self.calls:
            raise RuntimeError("the rewritten module did not call its kernel")
        self.caught = tuple(self.calls)

    def _launch(self, name: str, *args):
        self.calls.append((name, args))
        return self.files[name].launch(*args)

    def run(self):
        """Every kernel, one after the other; the last one's result."""
        for name, args in self.caught:
            out = self.files[name].launch(*args)
        return out

    def result(self):
        """What the drop-in gives, with the tile in use."""
        self.calls.clear()
        return self.module(*self.inputs)

    def use(self, tile: tuple | None) -> dict:
        """Sets a tile, or the emitted ones again. The first two BLOCK sizes are the rows' and the stream's."""
        for name, config in self.configs.items():
            blocks = [key for key in config if key.startswith("BLOCK_")][:2]
            keys = (*blocks, "num_warps", "num_stages")
            self.files[name].CONFIG = config | (dict(zip(keys, tile, strict=True)) if tile else {})
        return self.files[name].CONFIG

    def compile_all(self, tiles):
        """Compiles many tiles side by side: one at a time, the compiler would take all of the time."""
        if triton.knobs.runtime.interpret:
            return
        kernels = [
            (file, key, value)
            for file in self.files.values()
            for key, value in vars(file).items()
            if key.endswith("_kernel") and isinstance(value, triton.JITFunction)
        ]
        with ThreadPoolExecutor(12) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for file, key, kernel in kernels:
                setattr(file, key, _Compiled(kernel))
            try:
                for tile in tiles:
                    self.use(tile)
                    self.run()
            finally:
                for file, key, kernel in kernels:
                    setattr(file, key, kernel)


class _Compiled:
    """Stands for a kernel in its wrapper: what would launch it only compiles it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return functools.partial(self.kernel.warmup, grid=grid)


def emitted_row(row: Row, case: Case, seconds: float, tiles: tuple = SWEEP):
    """The emitted tile, then the sweep until `seconds` are over."""
    end = time.time() + seconds
    with tempfile.TemporaryDirectory() as folder, row.step("emitted"):
        kernel = Emitted(case, folder)
        row["error"] = case.error(kernel.out)
        row["kernels"] = len(kernel.caught)
        row["default"], row["default_tile"] = case.tflops(kernel.run), _shown(kernel.use(None))
        with row.step("compiling side by side"):
            kernel.compile_all(tiles if seconds > 5 else ())
        row["sweep"], row["failed"] = [], {}
        for tile in tiles:
            if time.time() > end:
                row.note(f"swept {len(row['sweep']) + len(row['failed'])} of {len(tiles)} tiles")
                break
            shown = _shown(kernel.use(tile))
            try:
                if not (error := case.error(kernel.result())) < 0.02:
                    raise ValueError(f"wrong, error {error:.2g}")
                row["sweep"].append((case.tflops(kernel.run), shown))
            except Exception as problem:  # most often: more shared memory than there is
                row["failed"][shown] = reason(problem)
        row["sweep"].sort(reverse=True)
        row["best"], row["best_tile"] = max([*row["sweep"], (row["default"], row["default_tile"])])


def _shown(config: dict) -> str:
    blocks = [v for k, v in config.items() if k.startswith("BLOCK_")][:2]
    return f"{'x'.join(map(str, blocks))} w{config['num_warps']} s{config['num_stages']}"


def flex_row(row: Row, case: Case):
    with row.step("flex"):
        run = bench_flex.call(*case.qkv, *_flex_functions(case))
        if not (error := case.error(run())) < 0.02:
            row.note(f"flex is {error:.2g} off")
        row["flex"] = case.tflops(run)


def hand_row(row: Row, case: Case, folder: str):
    """`ceiling2.kern` of the folder, at the best of HAND_TILES."""
    if case.variant.hand is None:
        return
    with row.step("hand"):
        sys.path.insert(0, folder)
        ceiling = importlib.import_module("ceiling2")
        out = torch.empty_like(case.qkv[0])
        found = []
        for tile in HAND_TILES:
            with row.step(f"hand {tile}"):
                run = _hand_call(ceiling, case, out.fill_(float("nan")), tile)
                run()
                if case.error(out) < 0.02:
                    found.append((case.tflops(run), "{}x{} w{} s{}".format(*tile)))
        row["hand"], row["hand_tile"] = max(found)


def _hand_call(ceiling, case: Case, out, tile: tuple):
    rows, columns, warps, stages = tile
    batch, heads, length, dim = out.shape
    mask, mode = case.variant.hand

    def tiles(tensor, block):
        flat = tensor.view(-1, dim)
        return ceiling.TensorDescriptor(flat, list(flat.shape), [dim, 1], [block, dim])

    def run():
        q, k, v = (tiles(t, b) for t, b in zip(case.qkv, (rows, columns, columns), strict=True))
        ceiling.kern[(length // rows, batch * heads)](
            *(q, k, v, tiles(out, rows), case.ids, case.ids, case.ids, heads, length),
            *(math.log2(math.e) / math.sqrt(dim), dim, rows, columns, mask, mode, False, False),
            num_warps=warps,
            num_stages=stages,
        )

    return run


class Task(NamedTuple):
    """One row of the table. `seconds`: for the sweep. `hand`: the folder of ceiling2.py."""

    name: str
    head_dim: int
    dtype: str
    seconds: float
    hand: str | None
    dry: bool


def measured(task: Task) -> Row:
    """Everything about one row. Never raises."""
    row = Row()
    with torch.no_grad(), row.step("inputs"):
        case = Case(task.name, task.head_dim, task.dtype, task.dry)
        emitted_row(row, case, task.seconds)
        flex_row(row, case)
        if task.hand:
            hand_row(row, case, task.hand)
    return row
