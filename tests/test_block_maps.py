"""Maps of tiles: not one misjudged as full or as empty, against what a predicate is at each of its positions."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from library_programs import said
from strategies import fixed
from test_sparsity import (
    BATCH,
    IDS,
    ROWS,
    STARTS,
    STREAM,
    at,
    atoms,
    b,
    documents,
    ends,
    evaluator,
    m,
    masked,
    n,
    numbers,
)
from whole_path import assert_right, fused

from rewriter import rewrite
from rewriter.derive import Chain, Definition
from rewriter.emit.kernel_file import render
from rewriter.emit.maps import MapView
from rewriter.emit.names import Names
from rewriter.emit.origins import Origins
from rewriter.hosts import rewrite_model
from rewriter.ir import Apply, Axis, Load, Node, Param, apply, const, walk, where
from rewriter.ir.evaluate import Evaluator
from rewriter.ir.ops import OPS
from rewriter.plan import BlockMap, ChainPlan, Config, KernelPlan, Sweep
from rewriter.plan.maps import block_map
from rewriter.plan.show import show_kernel
from rewriter.sparsity import GREATEST, LEAST, truth_of

HEADS = Axis("h", Param("H"))
HIGH, WIDE = 4, 2  # rows and stream positions of a tile
FOLDS = {LEAST: torch.amin, GREATEST: torch.amax}


@st.composite
def of_both(draw) -> Node:
    """A quotient, a rest or a distance of something that rows and stream positions have together."""
    gap = apply("add", apply("sub", n, m), const(draw(st.integers(0, 12))))
    op = draw(st.sampled_from(["floordiv", "mod", "abs"]))
    value = apply("abs", gap) if op == "abs" else apply(op, gap, const(draw(st.integers(1, 6))))
    return apply(draw(st.sampled_from(["lt", "le", "gt", "eq", "ne"])), value, draw(st.one_of(numbers, ends)))


predicates = st.recursive(
    st.one_of(atoms(), atoms(), of_both()),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), inner, inner).map(lambda t: apply(*t)),
        inner.map(lambda p: apply("not", p)),
        st.tuples(inner, inner, inner).map(lambda t: where(*t)),
    ),
    max_leaves=4,
)
sizes = st.fixed_dictionaries({"B": st.integers(1, 3), "M": st.integers(1, 9), "N": st.integers(1, 11)})


def tiled(values: torch.Tensor, fold: Callable) -> torch.Tensor:
    """[B, M, N] → [B, tiles of rows, tiles of the stream]; the last position stands for those past an end."""
    rows, stream = (
        torch.arange(-(-size // step) * step).clamp(max=size - 1) for size, step in zip(values.shape[1:], (HIGH, WIDE))
    )
    split = values[:, rows][:, :, stream].unflatten(2, (-1, WIDE)).unflatten(1, (-1, HIGH))
    return fold(split.to(torch.int64), (2, 4)).to(values.dtype)


def positions(predicate: Node, values: Evaluator) -> torch.Tensor:
    shape = [values.sizes[s] for s in "BMN"]
    return values.value(predicate, (BATCH, ROWS, STREAM)).expand(shape)


def told(node: Node, values: Evaluator) -> torch.Tensor:
    """What ends of ranges say of every tile."""
    if isinstance(node, Apply) and node.op in FOLDS:
        return tiled(positions(node.args[0], values), FOLDS[node.op])
    if not node.free & {ROWS, STREAM}:
        return values.value(node, (BATCH, ROWS, STREAM))
    return OPS[node.op].torch(*(told(a, values) for a in node.args))


@given(predicates, sizes, st.integers(0, 99))
@fixed(300)
def test_ranges_misjudge_no_tile(predicate, size, seed):
    truth, values = truth_of(predicate, ROWS, STREAM), evaluator(size, seed)
    if truth is None:
        return
    holds = positions(predicate, values).bool()
    some, every = (told(t, values).bool() for t in (truth.some, truth.every))
    assert not (tiled(holds, torch.amax) & ~some).any(), truth
    assert not (every & ~tiled(holds, torch.amin)).any(), truth


EXACT = {
    "causal": apply("le", n, m),
    "window": apply("and", apply("le", n, m), apply("lt", apply("sub", m, n), const(5))),
    "sink": apply("or", apply("lt", n, const(2)), apply("lt", apply("sub", m, n), const(3))),
    "every third block": apply("eq", apply("mod", apply("floordiv", n, const(2)), const(3)), const(0)),
}


@pytest.mark.parametrize("predicate", EXACT.values(), ids=EXACT)
def test_ranges_tell_every_tile_of_plain_masks(predicate):
    truth, values = truth_of(predicate, ROWS, STREAM), evaluator({"B": 1, "M": 23, "N": 30}, 0)
    holds = positions(predicate, values).bool()
    for told_as, fold in ((truth.some, torch.amax), (truth.every, torch.amin)):
        found = told(told_as, values).bool()
        assert torch.equal(found.expand(1, 6, 15), tiled(holds, fold))


def test_ids_that_differ_by_more_than_a_number_holds_are_compared():
    """No difference of them is taken."""
    truth = truth_of(apply("eq", Load(IDS, (b, n)), STARTS), ROWS, STREAM)
    assert not any(isinstance(x, Apply) and x.op in ("sub", "mul", "neg") for x in walk(truth.some, truth.every))


# --- the kernels that write maps


def definition_of(predicate: Node) -> Definition:
    return Definition("l", "sum", (ROWS,), STREAM, 0, predicate, (const(1.0),), None, const(1.0))


def plan_with(found: BlockMap, definitions: tuple[Definition, ...]) -> ChainPlan:
    chain = Chain("t", (BATCH, ROWS, STREAM), definitions, (), ())
    sweep = Sweep(STREAM, definitions, map=found)
    kernel = KernelPlan(
        "t", chain, (BATCH,), (ROWS,), (sweep,), (), (), (), (), Config(HIGH, WIDE, 1, 1), torch.float32
    )
    return ChainPlan("t", chain, (kernel,))


_files = itertools.count()


def imported(view: MapView, folder: Path):
    helpers = [render(f"helpers/{name}.py.jinja") for name in sorted(view.writer.helpers)]
    text = "\n".join(
        ["import triton", "import triton.language as tl", *helpers, render("map.py.jinja", found=view.values())]
    )
    path = folder / f"map_{next(_files)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lists_of(
    found: BlockMap, definitions: tuple[Definition, ...], values: Evaluator, folder: Path
) -> list[tuple[list[int], list[int]]]:
    """The emitted kernels run: for each position of the grid and tile of rows the tiles listed as full, and as cut."""
    plan = plan_with(found, definitions)
    names = Names(plan, {})
    view = MapView(plan.kernels[0], found, names, Origins({}), 0)
    module = imported(view, folder)
    size = {names.sizes[Param(s)]: values.sizes[s] for s in "BMN" if Param(s) in names.sizes}
    tiles = -(-values.sizes["N"] // WIDE)
    blocks = (-(-values.sizes["M"] // HIGH) if found.row else 1) * (values.sizes["B"] if found.grid else 1)
    tensors = {names.tensors[t]: values.tensors[t.name] for t in plan.chain.tensors}
    tile_map = torch.full((blocks, 2, tiles + 1), -1, dtype=torch.int32)
    known = tensors | size | {"tile_map": tile_map, "flags": torch.empty(blocks, tiles, dtype=torch.int8)}
    for kernel in view.kernels:
        programs = blocks if kernel is view.kernels[-1] else blocks * tiles
        args = [*(known[name] for name in kernel.tensors), *eval(kernel.numbers, {}, known)]
        getattr(module, kernel.function)[(programs,)](*args, **kernel.values)
    return [tuple(row[1 : 1 + row[0]].tolist() for row in one) for one in tile_map]


@given(predicates, predicates, st.booleans(), sizes, st.integers(0, 99))
@fixed(60)
def test_not_one_tile_is_misjudged(tmp_path_factory, first, second, alone, size, seed):
    """Full tiles are full for all of a loop's reductions, and tiles in no list are empty for all of them."""
    folder, values = tmp_path_factory.getbasetemp(), evaluator(size, seed)
    held = (first, first if alone else second)
    definitions = tuple(map(definition_of, held))
    found, _ = block_map(definitions, STREAM, (ROWS,), (BATCH, HEADS), None, multiplies=True)
    if found is None:
        return
    listed = lists_of(found, definitions, values, folder)
    holds = [positions(p, values).bool() for p in held]
    some, every = holds[0] | holds[1], holds[0] & holds[1]
    some, every = tiled(some, torch.amax), tiled(every, torch.amin)
    every &= torch.arange(1, some.shape[2] + 1) * WIDE <= size["N"]
    rows = some.shape[1] if found.row else 1
    for k, (full, cut) in enumerate(listed):
        assert full == sorted(full) and cut == sorted(cut) and not set(full) & set(cut)
        batches, blocks = (k // rows,) if found.grid else range(size["B"]), (
            (k % rows,) if found.row else range(some.shape[1])
        )
        for batch, block in itertools.product(batches, blocks):
            assert all(every[batch, block, full].tolist())
            assert set(torch.nonzero(some[batch, block])[:, 0].tolist()) <= {*full, *cut}
            if found.ranges is None:  # each position was looked at
                assert full == torch.nonzero(every[batch, block])[:, 0].tolist()
                assert set(full) | set(cut) == set(torch.nonzero(some[batch, block])[:, 0].tolist())


# --- whole programs


def dense(q, k, v, keep):
    return masked(q, k, v, keep)


def dense_and_causal(q, k, v, keep):
    rows, columns = at(q)
    return masked(q, k, v, keep & (columns <= rows))


def chess(q, k, v):
    rows, columns = at(q)
    return masked(q, k, v, (rows // 64 - columns // 64) % 2 == 0)


def first_and_last(q, k, v):
    rows, columns = at(q)
    return masked(q, k, v, ((rows - columns < 20) | (columns < 4)) & (columns <= rows))


def kept(q, k, v, keep):
    return masked(q, k, v, keep[:, None, None, :])


def weighed_apart(q, k, v, ids):
    """Two reductions, each under a mask of its own."""
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    rows, columns = at(q)
    scores = (q @ k.mT * 0.3).exp()
    total = scores.masked_fill(~(same & (columns <= rows)), 0.0).sum(-1, keepdim=True)
    return (scores.masked_fill(~same, 0.0) @ v) / total


def patches(*shape: int) -> torch.Tensor:
    """True in patches of 50 x 50, some rows of them empty."""
    held = torch.rand(*shape[:-2], *(-(-size // 50) for size in shape[-2:])) < 0.4
    return held.repeat_interleave(50, -2).repeat_interleave(50, -1)[..., : shape[-2], : shape[-1]]


def ids(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 3, (count, length)).sort(-1)[0]


LOOKING, LISTING = "flags_kernel", "map_kernel"
PROGRAMS = {
    "documents": (documents, lambda b, n: (ids(b, n),), {LISTING}),
    "documents out of order": (documents, lambda b, n: (torch.randint(0, 3, (b, n)),), {LISTING}),
    "one dense mask": (dense, lambda b, n: (patches(n, n),), {LOOKING, LISTING}),
    "dense by batch": (dense, lambda b, n: (patches(b, 1, n, n),), {LOOKING, LISTING}),
    "dense and causal": (dense_and_causal, lambda b, n: (patches(b, 1, n, n),), {LOOKING, LISTING}),
    "dense by head": (dense, lambda b, n: (patches(b, 2, n, n),), set()),
    "a rest": (chess, lambda b, n: (), {LOOKING, LISTING}),
    "first and last": (first_and_last, lambda b, n: (), {LISTING}),
    "flags by position": (kept, lambda b, n: (torch.rand(b, n) < 0.1,), {LISTING}),
    "two masks": (weighed_apart, lambda b, n: (ids(b, n),), {LISTING}),
}


def arguments(more: Callable, count: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    return (*(torch.randn(count, 2, length, 16, dtype=dtype) for _ in range(3)), *more(count, length))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_maps_are_right(name):
    program, more, kernels = PROGRAMS[name]
    result = rewrite(program, arguments(more, 2, 150, torch.float32))
    (text,) = (text for file, text in result.sources.items() if file.startswith("kernels/") and "__" not in file)
    assert {kind for kind in (LOOKING, LISTING) if f"{kind}(" in text} == kernels
    for count, length in ((2, 150), (1, 37), (2, 1), (1, 64)):
        args = arguments(more, count, length, torch.float32)
        with said(kernels=1):
            torch.testing.assert_close(result.module(*args), program(*args), rtol=1e-4, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", ("documents", "dense by batch"))
def test_in_half_precision(name):
    program, more, _ = PROGRAMS[name]
    result = rewrite(program, arguments(more, 2, 150, torch.float16))
    for count, length in ((2, 150), (1, 197), (0, 5)):
        args = arguments(more, count, length, torch.float16)
        wanted = program(*(a.float() if a.dtype is torch.float16 else a for a in args)).half()
        torch.testing.assert_close(result.module(*args), wanted, rtol=4e-3, atol=4e-3, equal_nan=True)


def test_tiles_in_no_list_are_not_read():
    """Eager multiplies what is there by 0, which NaN shows."""
    q, k, v, keep = arguments(lambda b, n: (torch.ones(b, 1, n, n, dtype=torch.bool),), 2, 300, torch.float32)
    keep[..., 128:256] = False
    result = rewrite(dense, (q, k, v, keep))
    v[:, :, 128:256] = math.nan
    assert dense(q, k, v, keep).isnan().all()
    torch.testing.assert_close(result.module(q, k, v, keep), dense(q, k, v.nan_to_num(), keep))


def test_full_tiles_have_no_mask():
    text = rewrite(documents, arguments(lambda b, n: (ids(b, n),), 2, 150, torch.float32)).sources[
        "kernels/documents.py"
    ]
    full, cut = text.split("    for turn in ")[1:3]
    assert "ids" not in full and "where(" not in full.replace("tl.where(m_new == NEG_INF", "") and "ids_2 =" in cut


def test_a_plan_says_why_there_is_no_map():
    def band(q, k, v, ids):
        rows, columns = at(q)
        return masked(q, k, v, ((rows - columns).abs() < 9) & (ids[:, None, :, None] == ids[:, None, None, :]))

    args = arguments(lambda b, n: (ids(b, n),), 2, 150, torch.float32)
    for program, wanted in ((band, "no map of tiles: a band of 17 positions"), (documents, "a map of tiles by ranges")):
        (kernel,) = rewrite_model(program, args, {}).kernels[0].plan.kernels
        assert show_kernel(kernel, {}).endswith(f"; {wanted}")


def masked_twice(q, k, v, keep, shared):
    """Two masks of one stream, of which the second is the same for all of a batch."""
    weights = (q @ k.mT).masked_fill(~keep[:, None], -torch.inf).softmax(-1)
    return (3 * weights).masked_fill(~shared, -torch.inf).softmax(-1) @ v


def of_two_masks(batch: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    m, n = torch.arange(rows)[:, None], torch.arange(columns)
    keep = ((m * columns // rows - n).abs() < 9).expand(batch, rows, columns)
    q, k, v = (torch.randn(batch, 2, length, 16) for length in (rows, columns, columns))
    return q, k, v, keep.clone(), m * 3 // rows == n * 3 // columns


def test_two_maps_of_a_kernel_are_as_large_as_each_has_to_be():
    result = fused(masked_twice, of_two_masks(3, 70, 100))
    assert "tile_map_2" in result.sources["kernels/masked_twice.py"]
    for sizes in (3, 70, 100), (2, 200, 40), (5, 40, 300):
        assert_right(result, masked_twice, of_two_masks(*sizes))
