"""The check stage: what is wrong is found, and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rewriter.check.compile import SHARED_LIMIT
from rewriter.check.launches import Launch
from rewriter.check.run import check_package, compile_request
from rewriter.check.smaller import other_sizes, short_sizes, shown_sizes
from rewriter.load import load
from rewriter.options import parse_options
from rewriter.command import package_files
from rewriter.hosts import rewrite_model
from rewriter.pipeline import rewrite_module

MODEL = """\
import torch
from torch import nn


class Model(nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(20 * torch.tanh(q @ k.mT / 20), -1) @ v


def get_inputs():
    return [torch.randn(2, 2, 37, 64) for _ in range(3)]
"""

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")


class Package:
    """A rewritten model, and checks of what becomes of it."""

    def __init__(self, folder: Path, *words: str):
        (folder / "model.py").write_text(MODEL)
        self.options = parse_options([str(folder / "model.py"), *words])
        self.loaded = load(self.options)
        rewritten = rewrite_model(self.loaded.module, self.loaded.args, self.loaded.kwargs)
        self.kernels = rewritten.kernels
        self.files = package_files(rewritten, "A test.")

    def check(self, name: str = "", old: str = "", new: str = "", targets: tuple = ()) -> dict:
        """The verdict after `old` has become `new` in the file `name`."""
        files, kernels = dict(self.files), self.kernels
        if name:
            assert old in files[name], f"{name} has changed: adapt this test"
            files[name] = files[name].replace(old, new)
            kernels = [replace(k, text=files[f"kernels/{k.name}.py"]) for k in kernels]
        options = replace(self.options, targets=targets)
        verdict = check_package(files, kernels, self.loaded, options)
        assert verdict["ok"] == (not verdict["failures"])
        assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict
        return verdict

    def failure(self, *change: str, targets: tuple = ()) -> str:
        verdict = self.check(*change, targets=targets)
        assert len(verdict["failures"]) == 1 and "\n" not in verdict["failures"][0], verdict
        return verdict["failures"][0]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(tmp_path_factory.mktemp("check"))


KERNEL = "kernels/model.py"


def test_what_is_right_passes(package):
    verdict = package.check(targets=("sm_80", "gfx942"))
    assert verdict["ok"]
    assert list(verdict["outputs"])[0] == "output" and len(verdict["outputs"]) == 2
    assert [line.split(":")[0] for line in verdict["compiled"]] == [
        "model_kernel for sm_80",
        "model_kernel for gfx942",
    ]


def test_a_wrong_result_is_found(package):
    reason = package.failure(KERNEL, "tl.sum(p, 1)", "tl.sum(p, 1) * 1.001")
    assert reason.startswith("output: error ") and "eager's own" in reason


def test_a_kernel_that_is_right_for_whole_tiles_only_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "MODEL", MODEL.replace("37", "64"))
    reason = Package(tmp_path).failure(KERNEL, "tl.where(offs_n[None, :] < N, ", "tl.where(True, ")
    assert reason.startswith("output at (2, 2, 43, 64): ")


def test_a_module_that_falls_back_is_no_success(package):
    reason = package.failure("module.py", "return _unfit(", "return 'of a whim' or _unfit(")
    assert reason == "Model runs its original code: of a whim"


def test_a_kernel_that_is_not_called_is_found(package):
    text = package.files["module.py"]
    call = next(line.strip() for line in text.splitlines() if "= model(q" in line)
    new = f"{call.split(' = ')[0]} = torch.softmax(20 * torch.tanh(q @ k.mT / 20), -1) @ v"
    assert package.failure("module.py", call, new) == "kernels that never ran: model_kernel"


def test_what_the_rewritten_program_raises_is_told(package):
    start = "\n    def go("
    reason = package.failure(KERNEL, start, f"\n    raise OSError('no')\n{start}")
    assert reason == "the rewritten program raised OSError: no"


def test_a_process_that_dies_is_a_failure(package):
    reason = package.failure(KERNEL, "import torch\n", "import os\nimport torch\nos._exit(7)\n")
    assert reason == "the check's process ended with code 7: no output"


def test_a_kernel_that_does_not_compile_is_a_failure_of_that_target(package):
    change = (
        KERNEL,
        "    pid = tl.program_id(0)\n",
        "    pid = tl.program_id(0)\n    [].append(1)\n",
    )
    reason = package.failure(*change, targets=("sm_90",))
    assert reason.startswith("model_kernel for sm_90: model.py:")


def test_a_kernel_that_does_not_fit_is_a_failure_of_that_target(package, monkeypatch):
    monkeypatch.setitem(SHARED_LIMIT, "sm_90", 100)
    reason = package.failure(targets=("sm_90",))
    assert reason.startswith("model_kernel for sm_90: does not fit: ")


@without_gpu
def test_bfloat16_without_a_gpu_is_compiled_only(tmp_path):
    verdict = Package(tmp_path, "--dtype", "bf16").check(targets=("sm_90",))
    assert verdict["ok"] and verdict["outputs"] == {}
    assert verdict["notes"] == ["bf16 numerics need a GPU: compiled only"]
    assert "wgmma" in verdict["compiled"][0]


@without_gpu
def test_large_inputs_are_cut_for_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "MODEL", MODEL.replace("2, 2, 37, 64", "16, 2, 300, 64"))
    verdict = Package(tmp_path).check()
    assert verdict["ok"]
    (note,) = verdict["notes"]
    assert note.startswith("run at (2, 2, 97, 64), not (16, 2, 300, 64): ")


# --- the parts


def test_a_kernel_is_compiled_as_it_was_launched(package):
    (kernel,) = package.kernels
    values = {"stride_qm": 64, "stride_qd": 1, "stride_vb": 24, "stride_vn": 2**40, "M": 37}
    meta = {"BLOCK_M": 64, "num_warps": 8}
    request = compile_request(Path(), kernel, kernel.entries[0], Launch(3, values | meta, ("q_ptr",)), "sm_90")
    assert set(values) <= set(kernel.entries[0].signature), "the kernel's names have changed: adapt this test"
    assert request.constexprs == {"stride_qd": 1, "BLOCK_M": 64}
    assert request.options == {"num_warps": 8}
    assert request.signature["stride_vn"] == "i64" and request.signature["M"] == "i32"
    assert set(request.divisible) == {"q_ptr", "stride_qm", "stride_vn"}


def test_a_kernel_that_was_not_launched_is_compiled_for_aligned_arguments_and_dense_rows(package):
    (kernel,) = package.kernels
    request = compile_request(Path(), kernel, kernel.entries[0], None, "sm_90")
    dense = {name for name, value in request.constexprs.items() if not name.startswith("BLOCK_")}
    assert dense == {
        name for name in kernel.entries[0].signature if name in ("stride_qd", "stride_kd", "stride_ve", "stride_out_e")
    }
    assert set(request.divisible) == set(request.signature) == set(kernel.entries[0].signature) - dense
    assert {request.constexprs[name] for name in dense} == {1}
    assert request.options.keys() == {"num_warps", "num_stages"}


def attended_columns(q, k, v):
    return 2 * (torch.softmax(q @ k.mT, -1) @ v).mT


def test_outputs_that_eager_writes_column_by_column_are_dense_so():
    q, k, v = (torch.randn(2, n, 64) for n in (2, 3000, 3000))
    (fused,) = rewrite_module(attended_columns, (q, k, v), {}).fused
    whole, _, merge = fused.kernel.entries
    for entry in (whole, merge):
        request = compile_request(Path(), fused.kernel, entry, None, "sm_90")
        assert request.constexprs["stride_out_e"] == 1 and "stride_out_m" in request.divisible


def call_of(*shapes: tuple[int, ...]):
    return tuple(torch.zeros(shape) for shape in shapes), {}


def fits_one(call):
    return call[0][0].shape[-1] == 64


def test_sizes_are_cut_together_and_only_where_that_fits():
    call = call_of((4, 300, 64), (4, 64, 300))

    def fits(call):
        (x, y), _ = call
        return x.shape[::2] == y.shape[:2] and x.shape[1] == y.shape[2] and x.shape[2] == 64

    assert shown_sizes(other_sizes(call, fits)) == "(3, 200, 64), (3, 64, 200)"
    assert shown_sizes(short_sizes(call, fits)) == "(2, 97, 64), (2, 64, 97)"
    assert other_sizes(call, lambda _: False) is None
    assert shown_sizes(other_sizes(call_of((4, 64, 64)), fits_one)) == "(3, 43, 64)"
    assert short_sizes(call_of((2, 50, 64)), fits) is None


def test_what_no_kernel_has_written_is_a_position():
    """A launch that is only recorded leaves its outputs: an index read from one must not be what memory held."""
    from rewriter.check.launches import Recorder

    torch.use_deterministic_algorithms(True)  # fills what is not initialised with the largest number
    try:
        assert torch.empty((64,), dtype=torch.int64).all()
        with Recorder().dry_run():
            assert not torch.empty((64,), dtype=torch.int64).any()
    finally:
        torch.use_deterministic_algorithms(False)
