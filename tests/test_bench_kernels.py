"""The kernels that `scripts/bench.py` measures, compiled for sm_90 at their real head dims, where there is no GPU.

No register is spilled, matrix products are wgmma, shared memory suffices, and some loop has no mask code: full tiles.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_zoo_compiles import OF_MAPS, Half, rewritten

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
from bench_rows import SUITES, Row  # noqa: E402

from rewriter.check import compile as check_compile  # noqa: E402
from rewriter.check.compile import SHARED_LIMIT, CompileResult  # noqa: E402

ROWS = {row.program: row for suite in ("fwd", "custom", "decode") for row in SUITES[suite](True)}
SPILLED, MASKED, SCALAR = "bytes spilled", "loops, all with mask code", "matrix products without wgmma"


@pytest.fixture(scope="session")
def compiler():
    with check_compile.compiler(workers=1) as compiler:
        yield compiler


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.program)
def test_a_measured_kernel(row, compiler, tmp_path):
    half = emitted(row, tmp_path)
    results = iter(compiler.compile(half.requests("sm_90")))
    found = {}
    for file in half.kernels:
        for entry in file.entries:
            result = next(results)
            assert result.ok and result.shared_bytes <= SHARED_LIMIT["sm_90"], result
            missed = misses(result, loops(file.text, entry.function), row.suite == "decode")
            if entry.function.endswith(OF_MAPS):
                missed.pop(SCALAR)
                missed.pop(MASKED, None)
            if missed:
                found[entry.function] = missed
    assert not found


def emitted(row: Row, folder: Path) -> Half:
    """Rewritten and called, as the suite does it."""
    program = SimpleNamespace(name=row.program, traced=row.short, inputs=lambda shapes, _: tuple(row.inputs(shapes)))
    return rewritten(program, row.module, folder, torch.bfloat16)


def misses(result: CompileResult, bodies: list[str], few_rows: bool) -> dict[str, int]:
    found = {SPILLED: result.spill_store_bytes + result.spill_load_bytes}
    found[SCALAR] = int(not (result.has_wgmma or few_rows) or bool(result.note))
    found[MASKED] = 0 if any(not has_mask(body) for body in bodies) else len(bodies)
    return {what: figure for what, figure in found.items() if figure}


def loops(text: str, function: str) -> list[str]:
    """The bodies of a kernel's loops that are in no other."""
    (kernel,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function)
    found = [n for n in ast.walk(kernel) if isinstance(n, ast.For)]
    inner = {n for loop in found for child in loop.body for n in ast.walk(child)}
    return ["\n".join(map(ast.unparse, loop.body)) for loop in found if loop not in inner]


def has_mask(body: str) -> bool:
    """Whether positions of the stream are compared, or values chosen; what is said of whole rows is no mask."""
    nodes = list(ast.walk(ast.parse(body)))
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    offsets = {t.id for t in targets if isinstance(t, ast.Name) and t.id.startswith("offs_")}
    return any(is_choice(n) or (isinstance(n, ast.Compare) and offsets & names(n)) for n in nodes)


def is_choice(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.where"):
        return False
    return not re.match(r"tl\.where\((\w+) == NEG_INF, 0\.0, \1\)", ast.unparse(node))


def names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


@pytest.mark.parametrize(
    "body, expected",
    [
        ("x = qk * 0.125\nshift = tl.where(m_new == NEG_INF, 0.0, m_new)", False),
        ("offs_n = start + 1\nbias = tl.load(ptr + offs_n, mask=offs_m < M, other=0)", False),
        ("offs_n = start + 1\nk = tl.load(ptr + offs_n, mask=offs_n < N, other=0)", True),
        ("x = tl.where(offs_n[None, :] < M, qk, NEG_INF)", True),
        ("same = ids[:, None] == ids_2[None, :]\nx = tl.where(same, qk, NEG_INF)", True),
    ],
)
def test_what_mask_code_is(body, expected):
    assert has_mask(body) is expected
