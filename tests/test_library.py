"""A rewritten function or module is called as the original is, and falls back to it wherever it must."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from library_programs import Emitted, attend, attention, close, said, tensors, tokens


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Emitted:
    return Emitted(attend, tmp_path_factory.mktemp("plain"), tensors(2, 2, 9, 16))


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Emitted:
    keep = torch.rand(2, 9) < 0.7
    return Emitted(attention(), tmp_path_factory.mktemp("masked"), (tokens(),), {"keep": keep})


@pytest.fixture(scope="module")
def unmasked(tmp_path_factory) -> Emitted:
    return Emitted(attention(), tmp_path_factory.mktemp("unmasked"), (tokens(),))


def test_a_function_runs_its_kernel_at_any_size(plain):
    function = plain.apply(attend)
    for shape in [(2, 2, 9, 16), (1, 3, 40, 16), (5, 1, 1, 16)]:
        with said(kernels=1):
            close(function(*tensors(*shape)), attend(*tensors(*shape)))


def test_a_batch_of_none(plain):
    function = plain.apply(attend)
    with said(kernels=1):
        assert function(*tensors(0, 2, 9, 16)).shape == (0, 2, 9, 16)


def test_a_function_keeps_its_name_and_keywords(plain):
    function = plain.apply(attend)
    q, k, v = tensors(2, 2, 9, 16)
    assert function.__name__ == "attend" and function.__doc__ == "A plain function."
    close(function(q, v=v, k=k), attend(q, k, v))


def test_keywords_are_taken_as_the_original_takes_them(masked):
    module = masked.apply(attention())
    x, keep = tokens(3, 20), torch.rand(3, 20) < 0.5
    expected = attention()(x, keep)
    with torch.no_grad(), said(kernels=3):
        for out in (module(x, keep), module(x, keep=keep), module(keep=keep, x=x, scale=0.25)):
            close(out, expected)


def test_tensors_that_are_not_contiguous(plain):
    function = plain.apply(attend)
    q, k, v = (t.transpose(1, 2) for t in tensors(2, 9, 2, 16))
    wide = tensors(2, 2, 9, 33, count=1)[0][..., ::2][..., :16]
    repeated = q[:1].expand(2, -1, -1, -1)
    with said(kernels=2):
        close(function(q, wide, v), attend(q, wide, v))
        close(function(repeated, k, v), attend(repeated, k, v))


# --- where the original runs


def fallback(emitted: Emitted, program, calls: list[tuple[tuple, dict]], cause: str) -> None:
    """Each call twice: right, no kernel, one warning in all."""
    rewritten = emitted.apply(copy.deepcopy(program))
    with torch.no_grad(), said(cause):
        for args, kwargs in calls * 2:
            close(rewritten(*args, **kwargs), program(*args, **kwargs))


OTHER = {
    "dtype": (tensors(2, 2, 9, 16, dtype=torch.float64), "q is not torch.float32"),
    "head dim": (tensors(2, 2, 9, 24), "q.shape[3] is not 16"),
    "rank": (tensors(2, 9, 16), "q has not 4 dimensions"),
    "broadcast": ((tensors(1, 2, 9, 16)[0], *tensors(2, 2, 9, 16)[1:]), "differs from"),
}


@pytest.mark.parametrize("args, cause", OTHER.values(), ids=OTHER)
def test_other_tensors_than_traced(plain, args, cause):
    fallback(plain, attend, [(args, {})], cause)


def test_another_number(unmasked):
    fallback(unmasked, attention(), [((tokens(),), {"scale": 0.5})], "scale")


def test_none_where_there_was_a_tensor(masked):
    fallback(masked, attention(), [((tokens(),), {}), ((tokens(), None), {})], "keep is no tensor")


def test_a_tensor_where_there_was_none(unmasked):
    keep = torch.rand(2, 9) < 0.7
    fallback(unmasked, attention(), [((tokens(), keep), {})], "keep is not None")


def test_training_mode(unmasked):
    fallback(unmasked, attention().train(), [((tokens(),), {})], "training mode")


def test_a_module_of_another_dtype(unmasked):
    fallback(unmasked, attention().double(), [((tokens().double(),), {})], "torch.float32")


def test_gradients_flow(unmasked):
    original, x = attention(), tokens().requires_grad_()
    rewritten = unmasked.apply(copy.deepcopy(original))
    original(x).square().sum().backward()
    expected, x.grad = x.grad, None
    with said("needs a gradient"):
        for _ in range(2):
            out = rewritten(x)
    out.square().sum().backward()
    close(x.grad, expected)
    for mine, theirs in zip(rewritten.parameters(), original.parameters(), strict=True):
        close(mine.grad, theirs.grad)


def test_each_cause_is_said_once_and_kernels_run_again(plain):
    function = plain.apply(attend)
    with said("q is not torch.float32", "needs a gradient"):
        for _ in range(2):
            function(*tensors(2, 2, 9, 16, dtype=torch.float64))
            function(*tensors(2, 2, 9, 16, requires_grad=True))
    with said(kernels=1):
        function(*tensors(2, 2, 9, 16))


WITHOUT_INTERPRETER = """\
import sys, warnings
import torch
sys.path.insert(0, {tests!r})
from library_programs import attend, attention, tensors, tokens
from rewriter import rewrite
warnings.simplefilter("always")
torch.set_grad_enabled(False)
for program, args in ((attend, tensors(2, 2, 9, 16)), (attention(), (tokens(),))):
    module = rewrite(program, args).module
    for _ in range(2):
        assert torch.equal(module(*args), program(*args))
"""


def test_a_cpu_without_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = str(Path(__file__).parent)
    environment["PYTHONPATH"] = str(Path(tests).parent)
    code = WITHOUT_INTERPRETER.format(tests=tests)
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (
        run.stderr.count("runs its original code: tensors on cpu without TRITON_INTERPRET=1") == 2
    ), run.stderr
