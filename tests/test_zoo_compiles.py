"""Every program of the zoo in half precision: right, and compiled for GPUs that are not here."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import Program, programs
from zoo_checks import at_dtype, built, check_at, held_tensors, unformatted

from rewriter.api import Rewrite, import_package
from rewriter.check import compile as check_compile
from rewriter.check.compile import TARGETS, CompileRequest, CompileResult
from rewriter.check.launches import Launch, record
from rewriter.check.run import compile_request
from rewriter.command import package_files
from rewriter.emit import KernelFile
from rewriter.hosts import rewrite_model

FUSED = [p for p in programs() if p.fused]
FIRST = {p.family: p for p in reversed(FUSED)}  # one spelling of each family, for every target
NEVER_SPILL = ("vanilla", "causal", "softcap", "documents")
OF_MAPS = ("_map_kernel", "_flags_kernel")  # which multiply nothing


@dataclass(frozen=True)
class Half:
    """A program rewritten in half precision; `requests` are its kernels for one target."""

    program: Program
    model: Any
    rewrite: Rewrite
    folder: Path
    kernels: list[KernelFile]
    launches: dict[str, Launch]

    def requests(self, target: str) -> list[CompileRequest]:
        return [
            compile_request(self.folder, k, entry, self.launches.get(entry.function), target)
            for k in self.kernels
            for entry in k.entries
        ]


def half_dtype(program: Program) -> torch.dtype:
    """fp16, unless only bf16 is wide enough for the program."""
    return torch.float16 if "fp16" in program.dtypes else torch.bfloat16


@unformatted()
def rewritten(program: Program, model: Any, folder: Path, dtype: torch.dtype | None = None) -> Half:
    args = at_dtype(program.inputs(program.traced, model), dtype or half_dtype(program))
    # A title of its own: kernels of the same text are one op, whose launches the first recorder would get.
    result = rewrite_model(model, args, {}, title=f"Kernels of {folder.name}.")
    assert result.hosts, result.unfused
    sources = package_files(result, program.name)
    assert not held_tensors(sources)
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    package = import_package(folder)
    module = package.apply(copy.deepcopy(model) if isinstance(model, nn.Module) else model)
    recorder = record(package, [(k.name, e.function) for k in result.kernels for e in k.entries])
    with recorder.dry_run(), torch.no_grad():
        module(*args)
    return Half(
        program,
        model,
        Rewrite(module, {}, sources),
        folder,
        result.kernels,
        dict(recorder.launches),
    )


@pytest.fixture(scope="session")
def compiler():
    with check_compile.compiler(workers=1) as compiler:
        yield compiler


@pytest.fixture(scope="module", params=FUSED, ids=lambda program: program.name)
def half(request, tmp_path_factory) -> Half:
    """Rewritten once for all tests of it."""
    program: Program = request.param
    model = built(program, half_dtype(program))
    return rewritten(program, model, tmp_path_factory.mktemp(program.name))


def test_right_in_fp16(half):
    if half_dtype(half.program) is not torch.float16:
        pytest.skip("Triton's interpreter multiplies bf16 tiles wrongly")
    for sizes in (half.program.traced, *half.program.others[:1]):
        check_at(half.program, half.model, half.rewrite, sizes, torch.float16)


def test_compiles(half, compiler):
    targets = TARGETS if half.program is FIRST[half.program.family] else ("sm_90",)
    requests = [r for target in targets for r in half.requests(target)]
    for request, result in zip(requests, compiler.compile(requests), strict=True):
        assert_good(request, result)


def assert_good(request: CompileRequest, result: CompileResult) -> None:
    assert result.ok and result.fits, result
    if request.kernel.endswith(OF_MAPS):
        assert not result.matrix_unit and not result.spills, result
    elif result.target == "sm_90" and request.constexprs.get("BLOCK_M", 0) >= 64:
        assert result.has_wgmma and not result.note, result


@pytest.mark.parametrize("family", NEVER_SPILL)
def test_no_register_is_spilled_at_head_dim_64(family, compiler, tmp_path):
    program = FIRST[family]
    model = program.build(dim=256)
    model = model.to(torch.float16) if isinstance(model, nn.Module) else model
    requests = rewritten(program, model, tmp_path).requests("sm_90")
    for request, result in zip(requests, compiler.compile(requests), strict=True):
        assert_good(request, result)
        assert not result.spills, result
