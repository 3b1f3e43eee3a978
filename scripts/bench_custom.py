"""For `bench.py --custom`: programs that FlexAttention can't say, at published sizes, beside eager and `torch.compile`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from bench_kernels import emitted_row
from bench_zoo import DTYPES, Row, timed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rewriter.check.numerics import relative_error


class Differential(nn.Module):
    """Differential attention (arXiv 2410.05258), the products subtracted."""

    def forward(self, q, k, v):
        q0, q1 = q.chunk(2, 1)
        k0, k1 = k.chunk(2, 1)
        scale = 1 / math.sqrt(q.size(-1))
        a0 = torch.softmax(q0 @ k0.transpose(-1, -2) * scale, -1)
        a1 = torch.softmax(q1 @ k1.transpose(-1, -2) * scale, -1)
        return a0 @ v - 0.2 * (a1 @ v)


class Evoformer(nn.Module):
    """Row attention with two biases, 5-D."""

    def forward(self, q, k, v, mask_bias, pair_bias):
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        a = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.size(-1)))
        return (torch.softmax(a + mask_bias + pair_bias, -1) @ v).transpose(-2, -3)


class Points(nn.Module):
    """Invariant point attention: scalars, points and a pair bias in; values and points out."""

    query_points, value_points = 4, 8

    def forward(self, q, k, v, q_points, k_points, v_points, bias):
        q_points, k_points = (t.unflatten(-1, (self.query_points, 3)) for t in (q_points, k_points))
        v_points = v_points.unflatten(-1, (self.value_points, 3))
        s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.size(-1)))
        d = ((q_points.unsqueeze(3) - k_points.unsqueeze(2)) ** 2).sum(-1).sum(-1)
        a = torch.softmax(s - 0.5 * math.sqrt(9 / (2 * q_points.size(-2))) * d + bias, -1)
        return a @ v, torch.einsum("bhij,bhjpc->bhipc", a, v_points)


class Shape(NamedTuple):
    """Of one row: what is measured, the sizes of its inputs, and its floating-point operations."""

    module: type[nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    work: float


def differential(batch: int, length: int, heads: int, dim: int) -> Shape:
    head = (batch, heads, length, dim)
    values = (batch, heads // 2, length, 2 * dim)
    return Shape(Differential, (head, head, values), 6.0 * batch * length**2 * heads * dim)


def evoformer(batch: int, rows: int, length: int, heads: int, dim: int) -> Shape:
    head = (batch, rows, length, heads, dim)
    biases = (batch, rows, 1, 1, length), (batch, 1, heads, length, length)
    return Shape(Evoformer, (head, head, head, *biases), 4.0 * batch * rows * length**2 * heads * dim)


def points(batch: int, heads: int, length: int, dim: int) -> Shape:
    scored, weighed = 3 * Points.query_points, 3 * Points.value_points
    widths = dim, dim, dim, scored, scored, weighed, length
    inputs = tuple((batch, heads, length, width) for width in widths)
    return Shape(Points, inputs, 2.0 * batch * heads * length**2 * (2 * dim + scored + weighed))


SHAPES = {
    "differential 1x16384 D64": differential(1, 16384, 32, 64),
    "differential 4x4096 D64": differential(4, 4096, 32, 64),
    "differential 1x16384 D128": differential(1, 16384, 16, 128),
    "differential 4x4096 D128": differential(4, 4096, 16, 128),
    "evoformer 8x256x256 D64": evoformer(8, 256, 256, 4, 64),
    "evoformer 8x256x256 D128": evoformer(8, 256, 256, 4, 128),
    "points 2x1024": points(2, 12, 1024, 16),
}
DRY = {
    "differential 1x16384 D64": differential(1, 64, 4, 16),
    "evoformer 8x256x256 D64": evoformer(1, 3, 32, 2, 16),
    "points 2x1024": points(1, 2, 32, 16),
}


TILES = (
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 32, 4, 2),
    (128, 32, 4, 3),
    (128, 32, 8, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 32, 4, 3),
    (64, 32, 4, 2),
    (128, 128, 8, 2),
)
"""BLOCK_M, BLOCK_N, num_warps, num_stages, swept: those around what won for hand-written kernels."""


class Case:
    """Inputs of one row, and how far from exact a result is: of the first of a batch, as a whole fp32 run has no room."""

    def __init__(self, name: str, dtype: str, dry: bool):
        shape = (DRY if dry else SHAPES)[name]
        self.name, self.device, self.work = name, "cpu" if dry else "cuda", shape.work
        self.module = shape.module()
        torch.manual_seed(0)
        self.inputs = [torch.randn(s, device=self.device, dtype=DTYPES[dtype]) for s in shape.inputs]
        self.exact = tree_map(Tensor.cpu, self.module(*(t[:1].float() for t in self.inputs)))

    def tflops(self, run) -> float:
        return self.work / timed(run, self.device) / 1e9

    def ms(self, tflops: float) -> float:
        return self.work / tflops / 1e9

    def error(self, out) -> float:
        """The worst of the outputs'."""
        pairs = zip(tree_leaves(out), tree_leaves(self.exact), strict=True)
        return max(relative_error(got[:1].cpu(), wanted) for got, wanted in pairs)


class Task(NamedTuple):
    """One row of the table. `seconds`: for the sweep over tiles."""

    name: str
    dtype: str
    seconds: float
    dry: bool


def measured(task: Task) -> Row:
    """Everything about one row, in milliseconds. Never raises."""
    row = Row()
    with torch.no_grad(), row.step("inputs"):
        case = Case(task.name, task.dtype, task.dry)
        emitted_row(row, case, task.seconds, TILES)
        for part in ("default", "best"):
            if part in row:
                row[f"{part}_ms"] = case.ms(row[part])
        with row.step("eager"):
            row["eager_error"] = case.error(case.module(*case.inputs))
            row["eager_ms"] = timed(lambda: case.module(*case.inputs), case.device)
        if not task.dry:
            with row.step("compile"):
                compiled = torch.compile(case.module, dynamic=False)
                compiled(*case.inputs)
                row["compile_ms"] = timed(lambda: compiled(*case.inputs), case.device)
    return row
