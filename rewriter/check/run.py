"""The stage: numerics on the GPU or in Triton's interpreter, and every kernel compiled for every target."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rewriter.check.compile import (
    SHARED_LIMIT,
    TMA,
    CompileRequest,
    CompileResult,
    compile_kernels,
    one_line,
)
from rewriter.check.launches import ALIGNMENT, Launch
from rewriter.check.messages import Request, Result
from rewriter.emit import Entry, KernelFile
from rewriter.load import Loaded
from rewriter.options import Options

_OPTIONS = (
    "num_warps",
    "num_stages",
    "num_ctas",
    "maxnreg",
)  # Triton's own, among a launch's arguments
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Verdict:
    """What the check found, as `report.json` shows it.

    Attributes:
        ok: whether nothing failed.
        outputs: by output, its error, the eager program's own, the bound, and what is wrong.
        compiled: a line per kernel and target.
        failures: a line each.
        notes: what was not checked, and why.
        device: what the numerics ran on.
    """

    ok: bool
    outputs: dict[str, dict[str, Any]]
    compiled: tuple[str, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    device: str


def check_package(
    files: Mapping[str, str], kernels: Sequence[KernelFile], loaded: Loaded, options: Options
) -> dict[str, Any]:
    """Run the package beside the original and a float64 run of it, and compile its kernels.

    Args:
        files: the package, name → text.
        kernels: those of its kernel files that must run, and compile.
        loaded: the user's model; the check loads it anew, in a process of its own.
        options: what the command line says; `targets` are compiled for.

    Returns:
        A `Verdict` in its JSON form.
    """
    with tempfile.TemporaryDirectory(prefix="flashlight_check_") as name:
        folder = Path(name)
        _write(files, folder / "package")
        numerics = _numerics(folder, kernels, options)
        requests, results = _compiled(folder / "package", kernels, numerics.launches, options)
    failures = [*numerics.failures, *_compile_failures(requests, results)]
    lines = [_compile_line(q, r) for q, r in zip(requests, results, strict=True)]
    verdict = Verdict(
        not failures,
        numerics.outputs,
        tuple(lines),
        tuple(failures),
        numerics.notes,
        numerics.device,
    )
    return json.loads(json.dumps(asdict(verdict)))


def _write(files: Mapping[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# --- numerics


def _numerics(folder: Path, kernels: Sequence[KernelFile], options: Options) -> Result:
    """On the GPU where there is one and the user's program runs on it, else in the interpreter."""
    names = tuple((kernel.name, entry.function) for kernel in kernels for entry in kernel.entries)
    instead = {entry.function: entry.instead for kernel in kernels for entry in kernel.entries if entry.instead}
    request = Request(options, names, "cuda" if torch.cuda.is_available() else "cpu", instead=instead)
    notes: tuple[str, ...] = ()
    if request.device == "cuda":
        result = _asked(folder, request)
        if not result.eager_error:
            return result
        notes = (f"the original does not run on the GPU: {result.eager_error}",)
        request = replace(request, device="cpu")
    if _has_bfloat16(kernels):  # Triton's interpreter multiplies bf16 tiles wrongly
        notes += ("bf16 numerics need a GPU: compiled only",)
        request = replace(request, numerics=False)
    result = _asked(folder, request)
    if result.eager_error:
        notes += (f"the original does not run at this dtype here: compiled only ({result.eager_error})",)
    return replace(result, notes=(*notes, *result.notes))


def _has_bfloat16(kernels: Sequence[KernelFile]) -> bool:
    return any("bf16" in kind for k in kernels for entry in k.entries for kind in entry.signature.values())


def _asked(folder: Path, request: Request) -> Result:
    """What a process of its own answers."""
    (folder / "request.pickle").write_bytes(pickle.dumps(request))
    answer = folder / "result.json"
    answer.unlink(missing_ok=True)
    with open(folder / "log", "w+") as log:
        command = [sys.executable, "-P", "-m", "rewriter.check.worker", str(folder)]
        code = subprocess.run(
            command, env=_environment(request, folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ).returncode
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip()]
    if not answer.exists():
        last = one_line(said[-1]) if said else "no output"
        return Result(request.device, failures=(f"the check's process ended with code {code}: {last}",))
    fields = json.loads(answer.read_text())
    fields["launches"] = {name: Launch(**launch) for name, launch in fields["launches"].items()}
    return Result(**fields)


def _environment(request: Request, folder: Path) -> dict[str, str]:
    """The caller's, with Triton's interpreter switched on or off, its cache in `folder`, and this rewriter to import."""
    environment = {"TRITON_CACHE_DIR": str(folder / "triton")}
    environment |= {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if request.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


# --- compiling


def _compiled(
    package: Path, kernels: Sequence[KernelFile], launches: Mapping[str, Launch], options: Options
) -> tuple[list[CompileRequest], list[CompileResult]]:
    requests = [
        compile_request(package, kernel, entry, launches.get(entry.function), target)
        for kernel in kernels
        for entry in kernel.entries
        for target in options.targets
    ]
    return requests, compile_kernels(requests)


def compile_request(
    package: Path, kernel: KernelFile, entry: Entry, launch: Launch | None, target: str
) -> CompileRequest:
    """The kernel specialised as `launch` would; where there was none, all is taken to be aligned."""
    values = launch.values if launch else entry.values or entry.likely | _config(kernel.text, entry.config)
    has_tma = target in TMA
    types = {name: _described(kind, has_tma) for name, kind in entry.signature.items()}
    values = values | dict.fromkeys(entry.flags, has_tma)
    sizes = {n: v for n, v in values.items() if n in types and type(v) is int}
    ones = {name: 1 for name, value in sizes.items() if value == 1}
    types |= {name: "i64" for name, value in sizes.items() if not -(2**31) <= value < 2**31}
    multiples = [name for name, value in sizes.items() if value % ALIGNMENT == 0]
    return CompileRequest(
        path=package / "kernels" / f"{kernel.name}.py",
        kernel=entry.function,
        signature={name: kind for name, kind in types.items() if name not in ones},
        constexprs=ones | {n: v for n, v in values.items() if n not in types and n not in _OPTIONS},
        target=target,
        options={name: values[name] for name in _OPTIONS if name in values},
        divisible=tuple(
            name
            for name in ((*launch.aligned, *multiples) if launch else types)
            if name not in ones and not types[name].startswith("tensordesc")
        ),
    )


def _described(kind: str, has_tma: bool) -> str:
    """`*bf16[1,BLOCK_N]` → `tensordesc<bf16[1,BLOCK_N]>`, or `*bf16` where boxes are loaded by pointers"""
    pointer, _, sizes = kind.partition("[")
    return f"tensordesc<{kind.lstrip('*')}>" if sizes and has_tma else pointer


def _config(text: str, name: str) -> dict[str, Any]:
    """The first of `CONFIGS = (dict(...), ...)` of an emitted file."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return {k.arg: ast.literal_eval(k.value) for k in node.value.elts[0].keywords}
    return {}


def _compile_failures(requests: Sequence[CompileRequest], results: Sequence[CompileResult]) -> list[str]:
    pairs = zip(requests, results, strict=True)
    return [_compile_line(q, r) for q, r in pairs if not (r.ok and r.fits)]


def _compile_line(request: CompileRequest, result: CompileResult) -> str:
    """`model_kernel for sm_90: wgmma, 168 registers, 96 KiB shared, no spills`"""
    where = f"{request.kernel} for {result.target}"
    if not result.ok:
        return f"{where}: {result.error}"
    limit = SHARED_LIMIT.get(result.target, 0)
    if not result.fits:
        return f"{where}: does not fit: {result.shared_bytes} bytes of shared memory of {limit}"
    unit = f"{result.matrix_unit}, " if result.matrix_unit else ""
    spills = f"spills {result.spill_store_bytes} bytes" if result.spills else "no spills"
    kib = f"{result.shared_bytes / 1024:.4g} KiB shared"
    note = f"; {result.note}" if result.note else ""
    return f"{where}: {unit}{result.registers} registers, {kib}, {spills}{note}"
