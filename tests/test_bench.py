"""`scripts/bench.py` where there is no GPU: its programs are fused and right, and it says what it lacks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo_checks import unformatted

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
import bench_suites  # noqa: E402
from bench_rows import VARIANTS, Row, attention, differential, evoformer, points  # noqa: E402

from rewriter.api import rewrite  # noqa: E402
from rewriter.check.numerics import relative_error  # noqa: E402

TINY: list[Row] = [
    *(attention("fwd", variant, 1, 64, 16, 4) for variant in VARIANTS),
    attention("fwd", "causal", 1, 64, 16, 4, group=4),
    attention("decode", "vanilla", 1, 64, 16, 4, group=2, queries=1),
    differential(1, 64, 16),
    evoformer(1, 3, 64, 2, 16),
    points(1, 2, 64, 16),
]


CHAINS = {"diff": 2}  # heads in two parts, of which the first may be larger: one chain can't have both


def bench(*args: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_without_a_gpu_it_says_so():
    done = bench("--suite", "fwd", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no NVIDIA GPU" in done.stderr and not done.stdout


@pytest.mark.parametrize("row", TINY, ids=lambda row: row.program)
@unformatted()
def test_a_program_is_fused_and_right(row):
    inputs = row.inputs(row.short, dtype=torch.float32)
    result = rewrite(row.module, inputs)
    assert len(result.report["chains"]) == CHAINS.get(row.variant, 1) and not result.report["unfused"]
    for got, exact in zip(row.part(result.module(*inputs)), row.exact(inputs), strict=True):
        assert relative_error(got, exact) < 1e-5
    for own, exact in zip(row.part(row.module(*inputs)), row.exact(inputs), strict=True):
        assert relative_error(own, exact) < 1e-5


def test_a_rehearsal(tmp_path):
    """On the CPU: rows in the columns of peers.py, and as bars."""
    files = {"--csv": tmp_path / "rows.csv", "--plot": tmp_path / "rows.svg", "--cache": tmp_path / "cache"}
    flags = [x for pair in files.items() for x in pair]
    done = bench("--suite", "decode", "--only", "1x32768", "--dry", "--jobs", 1, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(files["--csv"]) as file:
        (row,) = csv.DictReader(file)
    assert list(row)[:10] == "suite variant peer B H Hkv S D ms tflops".split()
    assert row["peer"] == "flashlight" and float(row["ms"]) > 0 and row["tflops"].endswith("GB/s") and not row["note"]
    assert float(row["error"]) < 1e-5
    assert "flashlight" in files["--plot"].read_text()


def test_what_is_timed_is_what_runs(tmp_path):
    """A package that was imported when it was rewritten, too: its kernels are ops by their text."""
    row = TINY[0]
    task = bench_suites.Task("rewrite", row.suite, row.name, str(tmp_path), dry=True)
    bench_suites._rewrite(row, task)
    package = bench_suites.Package(row, task)
    package.module(*row.inputs(row.short, dtype=torch.float32))
    assert all(file.PREPARED for file in package.files.values())
