"""Kernels are compiled for GPUs that are not here, whatever TRITON_INTERPRET says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter.check import compile as check_compile
from rewriter.check.compile import TARGETS, CompileRequest, CompileResult, compile_kernels, one_line

KERNELS = Path(__file__).parent / "data" / "attention_kernels.py"
POINTERS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
STRIDES = ("stride_qm", "stride_kn", "stride_vn", "stride_om")
BLOCKS = {"HEAD_DIM": 64, "BLOCK_M": 128, "BLOCK_N": 64}


def attention(target: str, block_m: int = 128, **changes: object) -> CompileRequest:
    lengths = {"M": "i32", "N": "i32", "qk_scale": "fp32"}
    request = CompileRequest(
        path=KERNELS,
        kernel="attention",
        signature=dict.fromkeys(POINTERS, "*fp16") | dict.fromkeys(STRIDES, "i64") | lengths,
        constexprs=BLOCKS | {"BLOCK_M": block_m},
        target=target,
        options={"num_warps": 4, "num_stages": 3},
        divisible=POINTERS + STRIDES,
    )
    return replace(request, **changes)


def attention_tma(target: str) -> CompileRequest:
    rows, columns = "tensordesc<fp16[128,64]>", "tensordesc<fp16[64,64]>"
    tensors = {"q_desc": rows, "k_desc": columns, "v_desc": columns, "out_desc": rows}
    signature = tensors | {"N": "i32", "qk_scale": "fp32"}
    return attention(target, kernel="attention_tma", signature=signature, divisible=())


@pytest.fixture(scope="module")
def compiler():
    with check_compile.compiler(workers=1) as compiler:
        yield compiler


@pytest.fixture
def compile_one(compiler):
    return lambda request: compiler.compile([request])[0]


def test_every_target(compiler):
    results = compiler.compile([attention(target) for target in TARGETS])
    assert [result.target for result in results] == list(TARGETS)
    assert [result.error for result in results] == [""] * len(TARGETS)
    assert [result.matrix_unit for result in results] == ["mma", "wgmma", "tcgen05", "mfma"]
    assert [result.tensor_memory_columns > 0 for result in results] == [False, False, True, False]
    for result in results:
        assert result.ok and result.fits
        assert result.shared_bytes > 0 and 0 < result.registers <= 512
    assert results[1].has_wgmma and not results[1].spills


def test_descriptors_on_every_target(compiler):
    results = compiler.compile([attention_tma(target) for target in TARGETS])
    assert [result.error for result in results] == [""] * len(TARGETS)
    assert results[1].has_wgmma and results[1].registers > 0


def test_divisibility_is_passed_on(compiler):
    aligned, unknown = compiler.compile([attention("sm_90"), attention("sm_90", divisible=())])
    assert aligned.shared_bytes > unknown.shared_bytes > 0


def test_a_tile_too_large_spills(compiler):
    options = {"num_warps": 1, "num_stages": 1}
    large = BLOCKS | {"BLOCK_M": 128, "HEAD_DIM": 128}
    nvidia, amd = compiler.compile(
        [
            attention("sm_80", 64, options=options),
            attention("gfx942", constexprs=large, options=options),
        ]
    )
    assert nvidia.ok and nvidia.spill_store_bytes > 0 and nvidia.spill_load_bytes > 0
    assert amd.ok and amd.spills


def test_what_does_not_fit():
    compiled = CompileResult("sm_80", ok=True, shared_bytes=170_000)
    assert not compiled.fits and replace(compiled, target="sm_90").fits
    assert not replace(compiled, target="sm_100", tensor_memory_columns=1024).fits
    assert not CompileResult("sm_90", ok=False).fits


def test_a_dtype_and_none_as_constexprs(compile_one):
    request = CompileRequest(KERNELS, "fill", {"out_ptr": "*fp32", "N": "i32"}, {"value": None, "DTYPE": "tl.float32"})
    result = compile_one(replace(request, constexprs={**request.constexprs, "BLOCK": 128}))
    assert result.ok, result.error


def line_of(text: str) -> int:
    return 1 + next(i for i, line in enumerate(KERNELS.read_text().split("\n")) if text in line)


@pytest.mark.parametrize("kernel", ["dot_of_vectors", "calls_what_fails"])
def test_a_kernel_that_is_wrong(compile_one, kernel):
    result = compile_one(CompileRequest(KERNELS, kernel, {"out_ptr": "*fp32"}, {"BLOCK": 16}))
    assert not result.ok and not result.fits
    line = line_of("tl.dot(offs, offs)")
    reason = "input and other must have equal ranks >= 2"
    assert result.error == f"attention_kernels.py:{line}: {reason}"


WRONG = {
    "no such kernel": ({"kernel": "nothing"}, "has no @triton.jit function nothing"),
    "not a kernel": ({"kernel": "tl"}, "has no @triton.jit function tl"),
    "unknown argument": ({"constexprs": {"BLOCK": 16, "SIZE": 1}}, "has no argument SIZE"),
    "missing argument": ({"constexprs": {}}, "argument BLOCK of dot_of_vectors needs"),
    "unknown type": ({"signature": {"out_ptr": "*f99"}}, "unknown name 'f99'"),
    "unknown target": ({"target": "sm_ninety"}, "unknown target sm_ninety"),
    "wrong option": ({"options": {"num_warps": 3}}, "num_warps must be a power of 2"),
    "no file": ({"path": KERNELS.with_name("none.py")}, "No such file or directory: 'none.py'"),
    "assembler": (
        {"kernel": "bad_assembly", "constexprs": {}},
        "ptxas: ",
    ),
}


@pytest.mark.parametrize("changes, reason", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_line(compile_one, changes, reason):
    request = CompileRequest(KERNELS, "dot_of_vectors", {"out_ptr": "*i32"}, {"BLOCK": 16})
    result = compile_one(replace(request, **changes))
    assert not result.ok
    assert reason in result.error
    assert "\n" not in result.error and str(KERNELS.parent) not in result.error


def test_a_changed_file_and_a_namesake_are_compiled_anew(compile_one, tmp_path):
    path = tmp_path / "attention_kernels.py"
    shutil.copy(KERNELS, path)
    request = CompileRequest(path, "dot_of_vectors", {"out_ptr": "*i32"}, {"BLOCK": 16})
    assert not compile_one(request).ok
    path.write_text(KERNELS.read_text().replace("tl.dot(offs, offs)", "offs"))
    assert compile_one(request).ok
    assert not compile_one(replace(request, path=KERNELS)).ok


CRASHES = {
    "a crash": ("import os; os.abort()", "the compiler crashed (exit code -6)"),
    "an explained crash": (
        "import os, sys; print('LLVM ERROR: broken', file=sys.stderr, flush=True); os.abort()",
        "the compiler crashed (exit code -6): LLVM ERROR: broken",
    ),
    "a long wait": ("import time; time.sleep(60)", "took more than 1 s to compile"),
}


@pytest.mark.parametrize("code, reason", CRASHES.values(), ids=CRASHES.keys())
def test_a_crash_takes_one_request_only(tmp_path, code, reason):
    bad = tmp_path / "bad.py"
    bad.write_text(code)
    # A cold process may be slow: only the one that sleeps gets a short limit.
    limit_s = 1 if "sleep" in code else 60
    with check_compile.compiler(workers=1, limit_s=limit_s) as compiler:
        result = compiler.compile([CompileRequest(bad, "kernel", {})])[0]
        again = compiler.compile([CompileRequest(KERNELS, "nothing", {})])[0]
    assert not result.ok and result.error == reason
    assert "has no @triton.jit function nothing" in again.error


def test_noise_from_the_kernels_file_is_kept_out(tmp_path):
    path = tmp_path / "noisy.py"
    path.write_text("print('hello')\n" + KERNELS.read_text())
    requests = [attention("sm_90", path=path), attention("sm_80", path=path)]
    assert [result.ok for result in compile_kernels(requests, workers=2)] == [True, True]


def test_nothing_to_do():
    assert compile_kernels([]) == []


def test_one_line():
    folder = "/".join(["", "some", "where"])
    assert one_line(f"in {folder}/a.py:\n  1 / 2 is '{folder}/b'") == "in a.py: 1 / 2 is 'b'"
