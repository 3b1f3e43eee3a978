"""The rows of `bench.py --suite`: programs as users write them, their inputs, their work, and results in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

MODEL_DIM = 2048
WINDOW, PREFIX, DOCUMENTS, CAP = 256, 256, 12, 30.0
SAMPLED = 64  # rows that are compared with float64
SHORT = 80  # positions that a program is rewritten with: they stay free

# --- programs


def attend(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, score, visible: Tensor | None) -> Tensor:
    group = q.size(1) // k.size(1)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.size(-1)))
    if score is not None:
        s = score(s, i, j)
    if visible is not None:
        s = s.masked_fill(~visible, float("-inf"))
    return torch.softmax(s, -1) @ v


class Attention(nn.Module):
    """score(s, i, j) and mask(i, j, ids of rows, ids of columns), at every pair of positions."""

    def __init__(self, score=None, mask=None):
        super().__init__()
        self.score, self.mask = score, mask

    def forward(self, q, k, v, ids=None):
        i = torch.arange(q.size(-2), device=q.device)[:, None]
        j = torch.arange(k.size(-2), device=q.device)[None, :]
        visible = None
        if self.mask is not None:
            rows, columns = (None, None) if ids is None else (ids[:, None], ids[None, :])
            visible = self.mask(i, j, rows, columns)
        return attend(q, k, v, i, j, self.score, visible)

    def at(self, rows: Tensor, q, k, v, ids=None):
        """Those rows, all of them queries."""
        i, j = rows[:, None], torch.arange(k.size(-2), device=q.device)[None, :]
        seen = (None, None) if ids is None else (ids[rows][:, None], ids[None, :])
        return attend(q, k, v, i, j, self.score, self.mask and self.mask(i, j, *seen))


class Differential(nn.Module):
    """Differential attention (arXiv 2410.05258), the products subtracted."""

    def forward(self, q, k, v):
        q0, q1 = q.chunk(2, 1)
        k0, k1 = k.chunk(2, 1)
        scale = 1 / math.sqrt(q.size(-1))
        a0 = torch.softmax(q0 @ k0.transpose(-1, -2) * scale, -1)
        a1 = torch.softmax(q1 @ k1.transpose(-1, -2) * scale, -1)
        return a0 @ v - 0.2 * (a1 @ v)

    def at(self, rows, q, k, v):
        return self(q, k, v)


class Evoformer(nn.Module):
    """Row attention with two biases, 5-D."""

    def forward(self, q, k, v, mask_bias, pair_bias):
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        a = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.size(-1)))
        return (torch.softmax(a + mask_bias + pair_bias, -1) @ v).transpose(-2, -3)

    def at(self, rows, q, k, v, mask_bias, pair_bias):
        return self(q, k, v, mask_bias, pair_bias[..., rows, :])


class Points(nn.Module):
    """Invariant point attention: scalars, points and a pair bias in; values and points out."""

    def forward(self, q, k, v, q_points, k_points, v_points, bias):
        s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.size(-1)))
        d = ((q_points.unsqueeze(3) - k_points.unsqueeze(2)) ** 2).sum(-1).sum(-1)
        a = torch.softmax(s - 0.5 * math.sqrt(9 / (2 * q_points.size(-2))) * d + bias, -1)
        return a @ v, torch.einsum("bhij,bhjpc->bhipc", a, v_points)

    def at(self, rows, q, k, v, q_points, k_points, v_points, bias):
        return self(q, k, v, q_points[:, :, rows], k_points, v_points, bias[:, :, rows])


def slopes(heads: int, device) -> Tensor:
    return torch.exp2(-(torch.arange(1, heads + 1, device=device) * 8.0 / heads))


def alibi(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + (slopes(s.size(1), s.device)[:, None, None] * (j - i)).to(s.dtype)


VARIANTS = {
    "vanilla": Attention(),
    "causal": Attention(mask=lambda i, j, a, b: i >= j),
    "alibi": Attention(score=alibi),
    "softcap": Attention(score=lambda s, i, j: CAP * torch.tanh(s / CAP)),
    "sliding_window": Attention(mask=lambda i, j, a, b: (i >= j) & (i - j <= WINDOW)),
    "prefix_lm": Attention(mask=lambda i, j, a, b: (i >= j) | (j < PREFIX)),
    "document": Attention(mask=lambda i, j, a, b: (a == b) & (i >= j)),
}

# --- rows


@dataclass(frozen=True)
class Row:
    """One program at one size. `shapes` are those of its inputs: `long` ones, and `short` ones that it is rewritten
    with. `work` is in operations, or in bytes where a row is bound by memory.
    """

    suite: str
    variant: str
    module: nn.Module
    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    long: tuple[tuple[int, ...], ...]
    short: tuple[tuple[int, ...], ...]
    whole_work: float
    in_bytes: bool = False
    rows_at: int = 2  # the dimension of queries

    @property
    def program(self) -> str:
        """What rows that differ in lengths only share."""
        decodes = "_decode" if self.suite == "decode" else ""
        grouped = f"_by{self.heads // self.kv_heads}" if self.heads != self.kv_heads else ""
        return f"{self.variant}{decodes}{grouped}_d{self.dim}"

    @property
    def name(self) -> str:
        return f"{self.suite} {self.variant} {self.batch}x{self.length} H{self.heads}/{self.kv_heads} D{self.dim}"

    def inputs(self, shapes, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        torch.manual_seed(0)
        found = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        return [*found, document_ids(shapes[0][2]).to(device)] if self.variant == "document" else found

    def work(self, device: str) -> float:
        """Of what masks leave, so that skipped work earns nothing."""
        mask = self.module.mask if isinstance(self.module, Attention) else None
        if mask is None or self.in_bytes:
            return self.whole_work
        ids, j = document_ids(self.length).to(device), torch.arange(self.length, device=device)
        parts = (mask(i[:, None], j[None, :], ids[i][:, None], ids[None, :]).sum() for i in j.split(1024))
        return self.whole_work * (sum(map(int, parts)) / self.length**2)

    def sampled(self, length: int) -> Tensor:
        """Rows that are looked at: the first, the last, and some between."""
        count = min(SAMPLED, length)
        return (torch.arange(count) * (length - 1) // max(count - 1, 1)).unique()

    def exact(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The last of the batch in float64, at the sampled rows."""
        q, *others = (t[-1:] if t.is_floating_point() else t for t in inputs)
        rows = self.sampled(q.size(self.rows_at)).to(q.device)
        args = [t.double() if t.is_floating_point() else t for t in (q.index_select(self.rows_at, rows), *others)]
        return _tuple(self.module.at(rows, *args))

    def part(self, out) -> tuple[Tensor, ...]:
        """Of a result, what `exact` gives."""
        outs = _tuple(out)
        rows = self.sampled(outs[0].size(self.rows_at)).to(outs[0].device)
        return tuple(o[-1:].index_select(self.rows_at, rows) for o in outs)


def _tuple(out) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def document_ids(length: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    cuts = torch.randperm(length - 1, generator=draw)[: DOCUMENTS - 1] + 1
    ids = torch.zeros(length, dtype=torch.int32)
    ids[cuts] = 1
    return ids.cumsum(0).to(torch.int32)


def attention(
    suite: str, variant: str, batch: int, length: int, dim: int, heads: int, group: int = 1, queries=0
) -> Row:
    kv = heads // group
    shapes = tuple((b, h, n, dim) for b, h, n in ((batch, heads, queries or length), *2 * [(batch, kv, length)]))
    few = max(2, 4 // group)  # of one head the program would be another: it may be shared
    short = tuple((3, h, n, dim) for h, n in ((few * group, queries or SHORT), *2 * [(few, SHORT)]))
    sizes = batch, heads, kv, length, dim
    if queries:
        return Row(suite, variant, VARIANTS[variant], *sizes, shapes, short, 4.0 * batch * kv * length * dim, True)
    return Row(suite, variant, VARIANTS[variant], *sizes, shapes, short, 4.0 * batch * heads * length**2 * dim)


def differential(batch: int, length: int, dim: int) -> Row:
    heads = MODEL_DIM // dim

    def shapes(b, h, n):
        return (b, h, n, dim), (b, h, n, dim), (b, h // 2, n, 2 * dim)

    work = 8.0 * batch * length**2 * heads * dim
    sizes = batch, heads, heads, length, dim
    return Row("custom", "diff", Differential(), *sizes, shapes(batch, heads, length), shapes(3, 4, SHORT), work)


def evoformer(batch: int, rows: int, length: int, heads: int, dim: int) -> Row:
    def shapes(b, r, n):
        return *3 * [(b, r, n, heads, dim)], (b, r, 1, 1, n), (b, 1, heads, n, n)

    work = 4.0 * batch * rows * length**2 * heads * dim
    sizes = batch, heads, heads, length, dim
    return Row("custom", "evoformer", Evoformer(), *sizes, shapes(batch, rows, length), shapes(3, 5, SHORT), work)


def points(batch: int, heads: int, length: int, dim: int) -> Row:
    def shapes(b, h, n):
        return *3 * [(b, h, n, dim)], (b, h, n, 4, 3), (b, h, n, 4, 3), (b, h, n, 8, 3), (b, h, n, n)

    sizes, work = (batch, heads, heads, length, dim), 4.0 * batch * heads * length**2 * 28
    return Row("custom", "ipa", Points(), *sizes, shapes(batch, heads, length), shapes(3, 2, SHORT), work)


def fwd(quick: bool) -> list[Row]:
    return [
        attention("fwd", variant, batch, length, dim, MODEL_DIM // dim, group)
        for batch, length in ((4, 4096), (1, 16384))[: 1 if quick else 2]
        for group in (1, 4)[: 1 if quick else 2]
        for dim in (128, 64)
        for variant in VARIANTS
    ]


def custom(quick: bool) -> list[Row]:
    sizes = [(4, 4096)] if quick else [(1, 16384), (4, 4096)]
    rows = [differential(*size, dim) for dim in (64, 128) for size in sizes]
    return [*rows, evoformer(8, 256, 256, 4, 64), evoformer(8, 256, 256, 4, 128), points(2, 12, 1024, 16)]


def decode(quick: bool) -> list[Row]:
    return [
        attention("decode", "vanilla", b, n, 128, 32, 4, queries=1) for b, n in ((1, 32768), (16, 8192), (64, 8192))
    ]


def extra(quick: bool) -> list[Row]:
    row = partial(attention, "extra")
    short = [row(v, 16, 1024, 128, 16) for v in ("vanilla", "causal")]
    odd = [row(v, 4, 4096, 80, 25) for v in ("vanilla", "causal")]
    tiny = [row(v, 1, 37, d, 16) for v, d in (("vanilla", 128), ("document", 128), ("vanilla", 36))]
    return [*short, *odd, *tiny, *([] if quick else [row("causal", 1, 100_000, 128, 16)])]


SUITES: dict[str, Callable[[bool], list[Row]]] = {"fwd": fwd, "custom": custom, "decode": decode, "extra": extra}
