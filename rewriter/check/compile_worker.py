"""The process behind `compile.py`: reads requests, compiles them with Triton, writes results.

Run by file name, so that it imports Triton and the kernel's own imports but not the rewriter. A
request is one line of JSON on stdin (the fields of `CompileRequest`), a result one line on stdout
(those of `CompileResult`, less `target`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

MATRIX_UNITS = (
    ("wgmma", "wgmma.mma_async"),
    ("tcgen05", "tcgen05.mma"),
    ("mma", "mma.sync"),
    ("mfma", "v_mfma"),
)


def compile_one(request: dict) -> dict:
    """The fields of a CompileResult. Raises what Triton, the file or the assembler raises."""
    fn = find_kernel(request["path"], request["kernel"], request["target"])
    source = ASTSource(fn, arg_types(fn, request), constants(request), alignments(fn, request))
    kernel = triton.compile(source, target=target(request["target"]), options=request["options"])
    text = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    read = ptx_resources if "ptx" in kernel.asm else amd_resources
    return {
        "ok": True,
        "error": "",
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory_columns": getattr(kernel.metadata, "tmem_size", None) or 0,
        "matrix_unit": next((unit for unit, opcode in MATRIX_UNITS if opcode in text), ""),
        **read(kernel, text),
    }


def find_kernel(path: str, name: str, request_target: str) -> JITFunction:
    """The jitted function `name` of the file, out of any autotuner or heuristics around it."""
    fn = getattr(load(path, Path(path).read_bytes(), request_target.startswith("sm_")), name, None)
    while fn is not None and not isinstance(fn, JITFunction):
        fn = getattr(fn, "fn", None)
    if fn is None:
        raise ValueError(f"{Path(path).name} has no @triton.jit function {name}")
    return fn


@cache
def load(path: str, text: bytes, on_nvidia: bool) -> ModuleType:
    """The file as a module named by its content: files may share a stem, and may change. What it found out about the GPU
    here is replaced by what holds of the target.
    """
    name = f"kernel_{hashlib.sha256(path.encode() + text).hexdigest()[:16]}_{on_nvidia}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if hasattr(module, "ON_NVIDIA"):
        module.ON_NVIDIA = tl.constexpr(on_nvidia)
    return module


def arg_types(fn: JITFunction, request: dict) -> dict[str, str]:
    """Every argument's type, in the function's order, which is the order Triton reads them in."""
    types, values = request["signature"], request["constexprs"]
    for name in types.keys() | values.keys():
        if name not in fn.arg_names:
            raise ValueError(f"{request['kernel']} has no argument {name}")
    for name in fn.arg_names:
        if (name in types) == (name in values):
            raise ValueError(f"argument {name} of {request['kernel']} needs a type or a value, one of them")
    return {name: sized(types.get(name, "constexpr"), values) for name in fn.arg_names}


def sized(kind: str, values: dict[str, object]) -> str:
    """ "tensordesc<fp16[BLOCK_M,64]>" → "tensordesc<fp16[128,64]>" """
    head, bracket, sizes = kind.partition("[")
    if not bracket:
        return kind
    shape, end = sizes.split("]")
    return f"{head}[{','.join(str(values.get(size, size)) for size in shape.split(','))}]{end}"


def constants(request: dict) -> dict[str, object]:
    """Values of the constexpr arguments. JSON has no dtypes: they come as "tl.float16"."""
    return {name: dtype_or_same(value) for name, value in request["constexprs"].items()}


def dtype_or_same(value: object) -> object:
    is_dtype = isinstance(value, str) and value.startswith("tl.")
    return getattr(tl, value.removeprefix("tl.")) if is_dtype else value


def alignments(fn: JITFunction, request: dict) -> dict[tuple[int, ...], list]:
    return {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in request["divisible"]}


def target(name: str) -> GPUTarget:
    """ "sm_90" → CUDA 90, "gfx942" → HIP; the gfx9 family has wavefronts of 64 threads."""
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"unknown target {name}: give sm_N or gfxN")


def ptx_resources(kernel: CompiledKernel, ptx: str) -> dict:
    """Registers and spills: Triton learns them from a driver only, so ptxas is run once more."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        said = run_ptxas(kernel, ptx, source)
    return {
        "registers": number(r"Used (\d+) registers", said),
        "spill_store_bytes": number(r"(\d+) bytes spill stores", said),
        "spill_load_bytes": number(r"(\d+) bytes spill loads", said),
        "note": first(r"Potential Performance Loss: ([^\n]*)", said),
    }


def run_ptxas(kernel: CompiledKernel, ptx: str, source: Path) -> str:
    """What `ptxas -v` says, given the options that Triton gives it, which move the numbers."""
    arch = first(r"^\.target (\w+)", ptx)
    options = ["-v", "-lineinfo", f"--gpu-name={arch}"]
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        options.append("--regAllocOptLevel=2")
    if not kernel.metadata.enable_fp_fusion:
        options.append("--fmad=false")
    command = [get_ptxas(kernel.metadata.target.arch).path, *options, source, "-o", os.devnull]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr}")
    return done.stderr


def amd_resources(_kernel: CompiledKernel, assembly: str) -> dict:
    """Registers and spills, from the metadata at the assembly's end."""
    spilled = 4 * number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)", assembly),
        "spill_store_bytes": spilled,
        "spill_load_bytes": spilled,
    }


def first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else ""


def number(pattern: str, text: str) -> int:
    return int(first(pattern, text) or 0)


def explain(error: BaseException, path: str) -> str:
    """One reason, with the line of the kernel's file where Triton knows it."""
    while isinstance(error, CompilationError) and isinstance(error.__cause__, CompilationError):
        error = error.__cause__  # the outer ones only say where the failing function was called
    if isinstance(error, CompilationError):
        return f"{Path(path).name}{line_of(error, path)}: {error.error_message or error.__cause__}"
    if isinstance(error, KeyError):
        return f"unknown name {error}"
    return ptxas_reason(str(error)) or f"{type(error).__name__}: {error}"


def ptxas_reason(text: str) -> str:
    """ptxas' own complaint, out of a report that repeats the command and its files."""
    reason = first(r"ptxas.*?(?:; error\s*:|fatal\s*:|error\s*:)\s*([^\n]*)", text)
    return f"ptxas: {reason}" if reason else ""


def line_of(error: CompilationError, path: str) -> str:
    """ ":41", or "" for code not in the file: Triton counts lines from the function's `def`."""
    text = Path(path).read_text()
    start = text.find(error.src or "\0")
    line = getattr(error.node, "lineno", None)
    if start < 0 or line is None:
        return ""
    before = text.count("\n", 0, start)
    return f":{before + line}"


def answer(request: dict, limit_s: int) -> dict:
    # The alarm is left to its default, which ends the process: no handler would run inside LLVM.
    signal.alarm(limit_s)
    try:
        return compile_one(request)
    except Exception as error:
        return {"ok": False, "error": explain(error, request["path"])}
    finally:
        signal.alarm(0)


def main() -> None:
    """Answer each line of stdin until it ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Triton and the kernel's file may print; that must not get among the replies
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), int(sys.argv[1]))), file=replies, flush=True)


if __name__ == "__main__":
    main()
