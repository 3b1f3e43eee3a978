"""Few rows of a long stream: it is split over programs and merged, and groups that share it are rows of one tile."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_programs import OUTPUTS, WEIGHTS, attention_programs, wider_programs
from test_random_programs import check_every
from torch import Tensor
from whole_path import assert_right, fused

from rewriter.pipeline import rewrite_module
from rewriter.plan import few


def attend(q: Tensor, k: Tensor, v: Tensor, change: Callable) -> Tensor:
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    m = torch.arange(q.size(2))[:, None] + k.size(2) - q.size(2)
    s = change(q @ k.mT / math.sqrt(q.size(3)), m, torch.arange(k.size(2)))
    return torch.softmax(s, -1) @ v


def decode(q, k, v):
    return attend(q, k, v, lambda s, m, n: s)


def softcap(q, k, v):
    return attend(q, k, v, lambda s, m, n: 15 * torch.tanh(s / 15))


def causal(q, k, v):
    return attend(q, k, v, lambda s, m, n: s.masked_fill(n > m, -torch.inf))


def recent(q, k, v):
    return attend(q, k, v, lambda s, m, n: s.masked_fill((n > m) | (2 * n < m), -torch.inf))


def slopes(q, k, v):
    rate = torch.exp2(-torch.arange(1, q.size(1) + 1))[:, None, None]
    return attend(q, k, v, lambda s, m, n: s - rate * (m - n))


def lengths(q, k, v, length):
    return attend(q, k, v, lambda s, m, n: s.masked_fill(n >= length[:, None, None, None], -torch.inf))


def sink(q, k, v, extra):
    s = q @ k.mT / 4
    s = torch.cat([s, extra[None, :, None, None].expand(s.size(0), -1, s.size(2), 1)], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


def shared(q, k, v):
    return torch.softmax(q @ k[:, None].mT / 4, -1) @ v[:, None]


def one_query(q, k, v):
    """Of the last of several: there is no axis of queries."""
    scores = torch.einsum("bhd,bhnd->bhn", q[:, :, -1], k) / 4
    return torch.einsum("bhn,bhne->bhe", torch.softmax(scores, -1), v)


def one_query_of_groups(q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return torch.softmax(q[:, :, -1:] @ k.mT / 4, -1) @ v


def own_groups(q, k, v):
    """Groups of two heads: the last may be one, and there may be more of k and v than are read."""
    group = torch.arange(q.size(1)) // 2
    return torch.softmax(q @ k[:, group].mT / 4, -1) @ v[:, group]


def gated(q, k, v, g):
    return g + g.sigmoid() * decode(q, k, v)


def gated_together(q, k, v, g):
    """[B, M, H * E]"""
    out = decode(q, k, v).transpose(1, 2).reshape(q.size(0), q.size(2), q.size(1) * 16)
    return out * g.transpose(1, 2).reshape(out.shape).sigmoid()


def loss(x, w, target):
    return F.cross_entropy(x @ w.mT, target)


def best(x, w):
    return (x @ w.mT).argmax(-1)


def spread(x, w):
    scores = x @ w.mT
    return scores.var(-1), (scores > 9).any(-1), torch.logsumexp(scores, -1)


def entropy(x, w):
    scores = x @ w.mT
    return -(torch.softmax(scores, -1) * torch.log_softmax(scores, -1)).sum(-1)


def qkv(b: int, h: int, kv: int, m: int, n: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(*shape, 16, generator=g) for shape in ((b, h, m), (b, kv, n), (b, kv, n)))


def xw(m: int, n: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(m, 16, generator=g), torch.randn(n, 16, generator=g)


def with_lengths(b, h, kv, m, n):
    return *qkv(b, h, kv, m, n), torch.tensor([n, 0, 1][:b] if b > 1 else [n // 2])


def with_gates(b, h, kv, m, n):
    q, k, v = qkv(b, h, kv, m, n)
    return q, k, v, q.flip(3)


def with_sinks(b, h, kv, m, n):
    return *qkv(b, h, h, m, n), torch.arange(h) / 2


def one_kv(b, h, kv, m, n):
    q, k, v = qkv(b, h, 1, m, n)
    return q, k[:, 0], v[:, 0]


def as_many_kv(b, h, kv, m, n):
    return qkv(b, h, h, m, n)


def with_targets(m, n):
    return *xw(m, n), torch.arange(m) * 7 % n


ATTENTION = ((2, 4, 2, 1, 300), (3, 4, 2, 3, 129), (2, 8, 2, 1, 1000), (1, 4, 2, 2, 1))
PAIRS = ((2, 4, 2, 1, 300), (3, 4, 2, 3, 129), (1, 8, 4, 2, 1))
VOCABULARY = ((4, 3000), (1, 601), (7, 129), (3, 2))
PROGRAMS = {f: (qkv, ATTENTION) for f in (decode, softcap, causal, recent, slopes)}
PROGRAMS |= {lengths: (with_lengths, ATTENTION), sink: (with_sinks, ATTENTION), shared: (one_kv, ATTENTION)}
PROGRAMS |= {own_groups: (qkv, ((2, 4, 3, 1, 300), (1, 3, 2, 2, 300), (3, 1, 3, 1, 300)))}
PROGRAMS |= {one_query: (as_many_kv, ATTENTION), one_query_of_groups: (qkv, PAIRS)}
PROGRAMS |= {f: (with_gates, ATTENTION) for f in (gated, gated_together)}
PROGRAMS |= {loss: (with_targets, VOCABULARY)} | {f: (xw, VOCABULARY) for f in (best, spread, entropy)}


@pytest.fixture
def always(monkeypatch):
    """Kernels for few rows whatever estimates say, with parts of a tile."""
    monkeypatch.setattr(few, "MARGIN", -math.inf)
    monkeypatch.setattr(few, "LEAST_TILES", 1)


def kernel_of(folder: Path):
    """The module of the kernels that were written there. Their op may be that of an equal file: `launch` is not."""
    loaded = [m for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith(f"{folder}/kernels/")]
    (module,) = (m for m in loaded if hasattr(m, "launch"))
    return module


def noted(module, monkeypatch) -> list[str]:
    """Collects the names of the kernels that run."""
    ran: list[str] = []

    class Noting:
        def __init__(self, name: str, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            return lambda *args, **config: (ran.append(self.name), self.kernel[grid](*args, **config))[1]

    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Noting(name, getattr(module, name)))
    module.PREPARED.clear()
    return ran


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_right_at_every_size(program, always, tmp_path):
    make, sizes = PROGRAMS[program]
    result = fused(program, make(*sizes[0]), tmp_path / "package")
    assert any("_merge_kernel(" in text for text in result.sources.values())
    for size in sizes:
        assert_right(result, program, make(*size))


@pytest.mark.parametrize("program", [decode, lengths, loss, spread], ids=lambda f: f.__name__)
def test_right_in_fp16(program, always):
    make, sizes = PROGRAMS[program]
    args = [tuple(a.half() if a.is_floating_point() else a for a in make(*size)) for size in sizes[:2]]
    result = fused(program, args[0])
    for given_args in args:
        assert_right(result, program, given_args, dtype=torch.float16)


def test_each_kernel_has_its_own_strides(always):
    """One has copies in boxes where the next has tensors as they are: by the same names."""
    x, w, target = with_targets(4, 300)
    result = fused(loss, (x.half(), w.half(), target))
    apart = x.half().repeat_interleave(2, 1)[:, ::2]
    assert_right(result, loss, (apart, w.half().mT.contiguous().mT, target), dtype=torch.float16)


def test_each_kernel_has_its_own_number_of_parts(always, tmp_path, monkeypatch):
    """Of a file whose kernels each have a form for few rows."""

    def both(x, w, target):
        scores = x @ w.mT
        return F.cross_entropy(scores, target, reduction="sum") + torch.logsumexp(scores, -1).square().sum() / 100

    x, w, target = with_targets(70, 300)
    fused(both, (x, w, target), tmp_path / "package")
    module = kernel_of(tmp_path / "package")
    for table in (module.FEW_1, module.FEW_2):
        monkeypatch.setitem(table, "programs", 10**6)
        monkeypatch.setitem(table, "least", 1)
    monkeypatch.setitem(module.CONFIGS_1_MERGE[0], "BLOCK_PART", 16)  # the second has 70 parts
    total, _ = module.launch(x, w.mT, target)
    torch.testing.assert_close(total, F.cross_entropy(x @ w.mT, target, reduction="sum"))


@pytest.mark.parametrize("programs", [1, 5, 10**6])
def test_any_number_of_parts(programs, always, tmp_path, monkeypatch):
    """The stream as one part, in parts of several tiles, and in more parts than tiles."""
    args = qkv(2, 4, 2, 1, 300)
    fused(causal, args, tmp_path / "package")
    module = kernel_of(tmp_path / "package")
    ran = noted(module, monkeypatch)
    monkeypatch.setitem(module.FEW, "programs", programs)
    monkeypatch.setitem(module.FEW, "least", 1)
    torch.testing.assert_close(module.launch(*args), causal(*args))
    assert ran == ["causal_part_kernel", "causal_merge_kernel"]


def test_many_rows_take_the_kernel_for_them(tmp_path, monkeypatch):
    fused(decode, qkv(2, 4, 2, 1, 300), tmp_path / "package")
    module = kernel_of(tmp_path / "package")
    ran = noted(module, monkeypatch)
    monkeypatch.setitem(module.FEW, "rows", 100)
    for m, n in ((12, 300), (13, 300), (1, 64)):  # few; too many; too short
        args = qkv(2, 4, 2, m, n)
        torch.testing.assert_close(module.launch(*args), decode(*args))
    assert ran == ["decode_part_kernel", "decode_merge_kernel", "decode_kernel", "decode_kernel"]


def test_examples_of_many_rows_have_one_kernel():
    result = fused(decode, qkv(2, 4, 2, 40, 40))
    assert not any("_merge_kernel" in text for text in result.sources.values())


@pytest.mark.parametrize(
    "program, args, axes",
    [(decode, qkv(2, 8, 2, 1, 300), 2), (shared, one_kv(2, 8, 1, 1, 300), 1), (loss, with_targets(4, 60_000), 0)],
    ids=["grouped", "shared", "rows"],
)
def test_what_is_shared_is_read_once(program, args, axes):
    """A program has all rows that read the same of the stream."""
    chain, *_ = rewrite_module(program, args, {}).fused
    part = chain.plan.kernels[0].few.part
    assert [len(part.rows), len(part.grid)] == [1, axes + 1]
    assert not part.dots[0].right.free & set(part.rows)


def test_rows_that_share_nothing_have_a_program_each():
    """Sums over the width of a head are of tiles with all of it, not one position after the other."""
    chain, *_ = rewrite_module(one_query, tuple(a.half() for a in as_many_kv(2, 4, 4, 1, 300)), {}).fused
    (kernel,) = chain.plan.kernels
    assert kernel.rows == () and [loop.whole for loop in kernel.loops] == [True]


def test_members_of_a_group_are_the_rows_of_a_tile():
    chain, *_ = rewrite_module(one_query_of_groups, tuple(a.half() for a in qkv(2, 4, 2, 1, 300)), {}).fused
    (kernel,) = chain.plan.kernels
    assert len(kernel.dots) == 1 and kernel.config.block_m == 16 and kernel.rows[0].extent.value == 2


def test_long_rows_are_written_by_a_kernel_of_their_own(always, tmp_path, monkeypatch):
    def softmax(x):
        return torch.softmax(x, -1)

    args = (torch.randn(2, 5000),)
    result = fused(softmax, args, tmp_path / "package", rows=True)
    assert_right(result, softmax, args)
    assert_right(result, softmax, (torch.randn(3, 3),))
    module = kernel_of(tmp_path / "package")
    ran = noted(module, monkeypatch)
    torch.testing.assert_close(module.launch(*args), softmax(*args))
    assert ran == ["softmax_part_kernel", "softmax_merge_kernel", "softmax_write_kernel"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_random_programs(weights, always, tmp_path):
    check_every(attention_programs(weights), 1, 20 + WEIGHTS.index(weights), tmp_path)


@pytest.mark.parametrize("output", OUTPUTS)
def test_random_programs_of_several_outputs(output, always, tmp_path):
    check_every(wider_programs(output), 1, 20 + OUTPUTS.index(output), tmp_path)
