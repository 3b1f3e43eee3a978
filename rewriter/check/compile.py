"""Compile emitted Triton kernels for GPUs that need not be here; read what the compilers say.

The work is done in worker processes (`compile_worker.py`): a process that runs Triton's interpreter
cannot compile, and a compiler that crashes takes only its worker with it, not the rewriter.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

TMA = ("sm_90", "sm_100")
"""Those that load boxes of tensors by themselves."""

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""The GPUs that `--check` compiles for: A100, H100/H200, B200, MI300."""

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one program may have, by target; a launch that wants more fails."""

TENSOR_MEMORY_LIMIT = 512
"""Columns of Blackwell's tensor memory that one program may have."""

_WORKER = Path(__file__).with_name("compile_worker.py")
# How MLIR and LLVM explain themselves; Python is told only "PassManager::run failed".
_EXPLANATION = re.compile(r"(?:\berror:|LLVM ERROR:|Assertion\b|UNREACHABLE)[^\n]*")


@dataclass(frozen=True)
class CompileRequest:
    """One kernel, specialised as one launch would specialise it, for one GPU.

    Attributes:
        path: the Python file that holds the kernel. It is imported, under a name of its own.
        kernel: name of the `@triton.jit` function in it.
        signature: Triton type of each runtime argument: "*fp16", "i32", "i64", "fp32", "i1", and
            for a host `TensorDescriptor` its dtype and block shape, "tensordesc<fp16[BLOCK_M,64]>",
            sizes by number or by the name of a constexpr, on every target: sm_90 and sm_100 load it
            by TMA; sm_80 and gfx942 take pointers and strides from it, of unknown alignment.
        constexprs: value of every other argument: int, float, bool, None, str, or "tl.float16" for
            that dtype. A launch turns runtime integers equal to 1 and arguments that are None into
            constexprs: put them here.
        target: "sm_80", "sm_90", "sm_100", "gfx942", or another "sm_N" or "gfxN".
        options: `num_warps`, `num_stages` and the like.
        divisible: names of pointers and integers that are multiples of 16. A launch finds these out
            by itself. Without them all loads are scalar, and registers and shared memory mean
            nothing.
    """

    path: str | Path
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    target: str = "sm_90"
    options: Mapping[str, object] = field(default_factory=dict)
    divisible: Sequence[str] = ()


@dataclass(frozen=True)
class CompileResult:
    """What the compilers say of one kernel on one GPU. Holds no path.

    Attributes:
        target: as in the request.
        ok: it compiled and assembled. `fits` says whether it can be launched too.
        error: one line, "kernel.py:41: reason" where the line is known; empty where ok.
        shared_bytes: shared memory of one program.
        registers: per thread; on AMD the VGPRs, accumulators included.
        spill_store_bytes, spill_load_bytes: per thread, as ptxas counts instructions. AMD's
            assembly counts the registers that were spilled: 4 bytes each, in both.
        tensor_memory_columns: of 512, on Blackwell; 0 elsewhere.
        matrix_unit: what `tl.dot` became: "wgmma", "tcgen05", "mma", "mfma", or "" where none is
            used.
        note: a performance remark of the assembler, such as that wgmma instructions were
            serialised; else "".
    """

    target: str
    ok: bool
    error: str = ""
    shared_bytes: int = 0
    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    tensor_memory_columns: int = 0
    matrix_unit: str = ""
    note: str = ""

    @property
    def has_wgmma(self) -> bool:
        """Whether Hopper's asynchronous matrix instructions are used."""
        return self.matrix_unit == "wgmma"

    @property
    def spills(self) -> bool:
        """Whether any register was spilled to memory."""
        return bool(self.spill_store_bytes or self.spill_load_bytes)

    @property
    def fits(self) -> bool:
        """Whether it compiled and one program of it fits on the GPU, as far as SHARED_LIMIT knows."""
        shared = SHARED_LIMIT.get(self.target, self.shared_bytes)
        return self.ok and self.shared_bytes <= shared and self.tensor_memory_columns <= TENSOR_MEMORY_LIMIT


class Compiler:
    """A few worker processes, started when first needed and kept; `compiler()` makes one."""

    def __init__(self, workers: Sequence[_Worker]):
        self._size = len(workers)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)

    def compile(self, requests: Sequence[CompileRequest]) -> list[CompileResult]:
        """Compile each; one result per request, in their order. Never raises for a kernel's sake."""
        with ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(self._compile_one, requests))

    def _compile_one(self, request: CompileRequest) -> CompileResult:
        worker = self._idle.get()
        try:
            return worker.compile(request)
        finally:
            self._idle.put(worker)


@contextmanager
def compiler(*, workers: int = 2, limit_s: int = 300) -> Iterator[Compiler]:
    """A Compiler whose workers end with the block: `with compiler() as c: c.compile(...)`.

    Args:
        workers: processes, at least 1.
        limit_s: seconds that one kernel may take; one that takes more has failed.
    """
    with ExitStack() as stack:
        yield Compiler([stack.enter_context(_Worker(limit_s)) for _ in range(workers)])


def compile_kernels(requests: Sequence[CompileRequest], *, workers: int = 2, limit_s: int = 300) -> list[CompileResult]:
    """Compile each kernel for its GPU, in at most `workers` processes; no GPU is needed.

    Start-up costs some seconds a process: pass many requests at once, or keep a `compiler()`.

    Args:
        requests: any number, in any order.
        workers: processes, at least 1.
        limit_s: seconds that one kernel may take.

    Returns:
        One result per request, in their order. Never raises for a kernel's sake.
    """
    if not requests:
        return []
    with compiler(workers=min(workers, len(requests)), limit_s=limit_s) as pool:
        return pool.compile(requests)


class _Worker:
    """One process: a request is a line of JSON on its stdin, a result a line on its stdout."""

    def __init__(self, limit_s: int):
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed on exit)
        self._cache = tempfile.TemporaryDirectory(prefix="flashlight_triton_")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._log.close()
        self._cache.cleanup()

    def compile(self, request: CompileRequest) -> CompileResult:
        said = self._log_size()
        answer = self._ask(_line(request))
        if answer is None:
            answer = {"ok": False, "error": self._how_it_ended()}
        if not answer["ok"] and (explanation := _EXPLANATION.search(self._log_since(said))):
            answer["error"] = f"{answer['error']}: {explanation[0]}"
        return CompileResult(target=request.target, **answer | {"error": one_line(answer["error"])})

    def _ask(self, line: str) -> dict | None:
        """The answer to one request, or None if the worker ended instead of giving one."""
        process = self._process = self._process or self._start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else None

    def _start(self) -> subprocess.Popen[str]:
        # A cache of its own: we write nowhere but in OUT.
        env = {"TRITON_CACHE_DIR": self._cache.name}
        env |= {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # -P: a module beside the worker must not stand in for one that Triton imports.
        command = [sys.executable, "-P", str(_WORKER), str(self._limit_s)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=env)

    def _stop(self) -> int:
        """End the process; its exit code, 0 if there was none."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _how_it_ended(self) -> str:
        code = self._stop()
        if code == -14:  # SIGALRM: the worker set itself an alarm
            return f"took more than {self._limit_s} s to compile"
        return f"the compiler crashed (exit code {code})"

    def _log_size(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def _log_since(self, position: int) -> str:
        self._log.seek(position)
        return self._log.read()


def _line(request: CompileRequest) -> str:
    return json.dumps(asdict(request) | {"path": str(request.path)}) + "\n"


def one_line(text: str) -> str:
    """`text` on one line, with no folder in it: a path becomes the name of its file."""
    return re.sub(r"(?<![\w.<])(?:~|\.{1,2})?/(?:[^\s/:'\"`]+/)*(?=[^\s/])", "", " ".join(text.split()))
