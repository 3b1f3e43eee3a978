"""One zoo program at a real size on a GPU: error, peak memory, times, and its peers' times. `bench.py` calls it."""

from __future__ import annotations

import copy
import fcntl
import inspect
import os
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import bench_flex
import torch
import triton
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import Program, Sizes, programs

from rewriter.api import rewrite
from rewriter.check.numerics import compare, relative_error, run_float64

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_MIB = 12 * 1024  # that eager may hold: a float64 run holds four times as much
SCALES = {"kv_heads": 4, "window": 256, "chunk": 256, "prefix": 256, "cap": 30.0, "kv_rank": 512, "vocab": 32000}
"""Options at the size that models have them, for every program that takes them; the zoo's own suit tiny tests."""

OPTIONS = {
    "combo_gemma2": {"head_dim": 128},
    "multi_query_einsum": {"kv_heads": 1},
    "sliding_both_sides_sdpa": {"window": 128},
    "dilated_remainder": {"window": 8},  # as `dilated_offsets`, whose predicate grows with it
    "dilated_offsets": {"window": 8},
    "cosine_swin_v2": {"window": 16},
    "swin_window": {"window": 7},
    "vanilla_image_block": {"dim": 512},
    "swin_shifted_block": {"side": 56, "window": 7},
}
SIZES = {  # where batch x S x S is not the size of the program: no batch, one head, fixed or unequal lengths
    "vanilla_matrices": Sizes(1, 8192),
    "vanilla_one_head": Sizes(8, 4096),
    "key_lengths_renormalised": Sizes(32, 2048),
    "relu_squared_gated_unit": Sizes(16, 2048),
    "sink_cat_tokens_only": Sizes(1, 4096),
    "combo_function_alibi_window": Sizes(1, 4096),
    "causal_last_queries": Sizes(4, 2048, 4096),
    "cross_encoder_decoder": Sizes(4, 2048, 4096),
    "cross_text_sdpa": Sizes(4, 4096, 77),
    "cross_latents": Sizes(16, 16, 4096),
    "cross_decode_step": Sizes(16, 1, 8192),
    "cosine_swin_v2": Sizes(16, 256),
    "swin_window": Sizes(128, 49),
    "swin_shifted_block": Sizes(2, 3136),
    "decomposed_grid": Sizes(2, 20, 35),
    "decomposed_grid_indexed": Sizes(2, 20, 35),
}


@dataclass(frozen=True)
class Setup:
    """What all runs share. `dry`: the CPU and the zoo's own tiny sizes, to try the script without a GPU."""

    dim: int
    heads: int
    batch: int
    seq: int
    lock: str
    part: int = 1  # of the zoo
    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Task:
    program: str
    dtype: str
    part: str  # "rewritten", or "peers": the slow compilers come when all else is done


def reason(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:110]}"


def timed(run, device: str) -> float:
    """Milliseconds, the median; on a CPU those of one call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def peak_mib(run, device: str) -> float | None:
    """What a call holds at most, its output included and what was held before not."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


@contextmanager
def gpu_to_itself(setup: Setup):
    """Workers compile side by side and measure one at a time. A file's lock falls with its process."""
    with open(setup.lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if not setup.dry:
                torch.cuda.empty_cache()  # or a float64 run's gigabytes would stay with this worker


def sizes_to_try(program: Program, setup: Setup) -> list[Sizes]:
    """What a program is measured at: of several, the first at which eager has room. Of part 1 all have."""
    if setup.dry:
        return [program.traced]
    if program.name in SIZES or setup.part == 1:
        return [SIZES.get(program.name, Sizes(setup.batch, setup.seq))]
    halved = [setup.seq >> k for k in range(4)]
    batch = setup.batch if program.traced.batch > 1 else 1
    return [*(Sizes(batch, n) for n in halved), program.traced]


def fitting(program: Program, dtype: torch.dtype, setup: Setup):
    """(sizes, module, arguments)"""
    *tried, last = sizes_to_try(program, setup)
    for sizes in tried:
        with suppress(Exception):  # out of memory, or a length that the program can't have
            module, args = made(program, sizes, dtype, setup)
            if eager_mib(module, args, setup) <= MOST_MIB:
                return sizes, module, args
        module = args = None
        torch.cuda.empty_cache()
    return last, *made(program, last, dtype, setup)


def eager_mib(module, args: list, setup: Setup) -> float | None:
    module(*fresh(args))  # or the peak would hold cuBLAS's workspace
    return peak_mib(lambda: module(*args), setup.device)


def made(program: Program, sizes: Sizes, dtype: torch.dtype, setup: Setup):
    """The module (or function) and its arguments, on the device."""
    options = {"dim": setup.dim, "heads": setup.heads, "max_len": max(4096, setup.seq)}
    if not setup.dry:
        names = inspect.getclosurevars(program.build).nonlocals["signature"].parameters
        options |= {k: v for k, v in SCALES.items() if k in names} | OPTIONS.get(program.name, {})
    with torch.device(setup.device):  # drawing on the GPU saves a second a program
        module = program.build(**options)
        generator = torch.Generator(setup.device).manual_seed(1)
        args = program.inputs(sizes, module, generator)
    if isinstance(module, nn.Module):
        module = module.to(setup.device, dtype)
    return module, [a.to(dtype) if a.is_floating_point() else a for a in args]


def fresh(args: list) -> list:
    return [a.clone() for a in args]  # a program may write into its inputs


class Row(dict):
    """Results by name. A step that raises leaves a note, and the others go on."""

    @contextmanager
    def step(self, name: str):
        try:
            yield
        except Exception as error:
            self.note(f"{name}: {reason(error)}")

    def note(self, text: str):
        self["note"] = "; ".join(filter(None, (self.get("note", ""), text)))


def measured(setup: Setup, task: Task) -> Row:
    """Everything about one task. Never raises."""
    row = Row()
    with row.step("build"), torch.no_grad():
        program = next(p for p in programs(setup.part) if p.name == task.program)
        with gpu_to_itself(setup):
            sizes, module, args = fitting(program, DTYPES[task.dtype], setup)
        row |= {"batch": sizes.batch, "q": sizes.q, "kv": sizes.keys}
        if task.part == "rewritten":
            _rewritten(row, program, module, args, DTYPES[task.dtype], setup)
        else:
            _peers(row, task.program, module, args, setup)
    return row


def _rewritten(row: Row, program: Program, module, args: list, dtype: torch.dtype, setup: Setup):
    device = setup.device
    with row.step("eager"), gpu_to_itself(setup):
        row["eager_mib"] = eager_mib(module, args, setup)
        row["eager_ms"] = timed(lambda: module(*args), device)
    row["ok"] = False  # until it is shown to be right
    caught = warnings.catch_warnings(record=True)
    with tempfile.TemporaryDirectory() as folder, row.step("rewrite"), caught as seen:
        warnings.simplefilter("always")
        # A copy: what is rewritten in place may be a part that a shallow copy shares.
        result = rewrite(copy.deepcopy(module), tuple(args), out=folder, rows=program.rows)
        row["chains"] = len(result.report["chains"])
        for unfused in result.report["unfused"]:
            row.note(f"not fused, {unfused['where'].rpartition('/')[2]}: {unfused['reason']}")
        if not row["chains"]:
            row["ok"] = None
            return
        out = result.module(*fresh(args))  # compiles; not under the lock
        causes = [str(w.message) for w in seen if "original code" in str(w.message)]
        if causes:
            row.note(causes[0])
            return
        with gpu_to_itself(setup):
            _check(row, out, module, args, dtype)
            row["mib"] = peak_mib(lambda: result.module(*args), device)
            row["ms"] = timed(lambda: result.module(*args), device)


def _check(row: Row, out, module, args: list, dtype: torch.dtype):
    """Against a float64 run, beside eager."""
    with row.step("check"):
        leaves = [tree_leaves(x) for x in (out, module(*fresh(args)), run_float64(module, args))]
        checks = [compare(*one, dtype) for one in zip(*leaves, strict=True)]
        worst = max(checks, key=lambda c: (not c.ok, c.error / (c.bound or 1.0)))
        row |= {"error": worst.error, "eager_error": worst.eager_error, "ok": worst.ok}
        if worst.reason:
            row.note(worst.reason)


def _peers(row: Row, name: str, module, args: list, setup: Setup):
    with row.step("compile"):
        torch._dynamo.reset()
        compiled = torch.compile(module, dynamic=False)
        compiled(*fresh(args))
        with gpu_to_itself(setup):
            row["compile_ms"] = timed(lambda: compiled(*args), setup.device)
    with row.step("flex"):
        run = bench_flex.of_program(name, module, args)
        if run is None:
            return
        if not (error := relative_error(run(), module(*fresh(args)))) < 0.05:
            row.note(f"flex is {error:.2g} from eager")
        with gpu_to_itself(setup):
            row["flex_ms"] = timed(run, setup.device)


def serve(connection, work, log: str):
    """A worker: tasks in, rows out. It ends when its GPU context is lost, which no call survives."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # torch.export writes graphs there
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with suppress(EOFError, KeyboardInterrupt, RuntimeError):
        while True:
            connection.send(dict(work(connection.recv())))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
