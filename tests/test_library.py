"""A rewritten function or module is called as the original is, and falls back to it wherever it must."""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from library_programs import Attention, Emitted, attend, attention, close, said, tensors, tokens

from rewriter import rewrite
from rewriter.errors import RewriteError


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


def gathered(*tensors, **options):
    """As `attend`, of however many values."""
    q, k = tensors[:2]
    values = sum((*tensors[2:], *options.get("values", ()), options.get("value", 0)))
    return torch.softmax(q @ k.mT, -1) @ values


def scaled(q, k, v, scale=float("inf"), *, shift=(0.0, 1.0)):
    return torch.softmax((q @ k.mT).clamp(max=scale) * shift[1], -1) @ v


def of_pairs(q, kv=None):
    k, v = (q, q) if kv is None else kv
    return torch.softmax(q @ k.mT, -1) @ v


class Pair(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor


def of_named(q, kv):
    return torch.softmax(q @ kv[0].mT, -1) @ kv[1]


Q, K, V = tensors(2, 9, 16)
# A call to rewrite for, calls that run its kernel, and one that does not, with the cause.
CALLS = {
    "keywords in another order": (attend, ((), {"v": V, "k": K, "q": Q}), [((Q,), {"k": K, "v": V})], None),
    "a list": (gathered, ((Q, K), {"values": [V, V]}), [], ((Q, K), {"values": [V]}, "len(options['values'])")),
    "more positions": (gathered, ((Q, K, V), {}), [], ((Q, K, V, V), {}, "len(tensors) is not 3")),
    "more keywords": (gathered, ((Q, K, V), {}), [], ((Q, K, V), {"value": K}, "set(options) is not set()")),
    "other keywords": (
        gathered,
        ((Q, K, V), {"value": K}),
        [((Q, K, V), {"value": V})],
        ((Q, K, V), {"values": [K]}, "set(options) is not {'value'}"),
    ),
    "a pair": (of_pairs, ((Q, (K, V)), {}), [((Q, [K, V]), {})], ((Q,), {}, "kv is no list or tuple")),
    "a named pair": (of_named, ((Q, Pair(K, V)), {}), [], ((Q, (K, V)), {}, "kv is no Pair")),
    "keywords in a dict": (
        lambda q, kv: of_pairs(q, kv and kv.values()),
        ((Q, {"k": K, "v": V}), {}),
        [],
        ((Q, None), {}, "kv is no dict"),
    ),
    "a tensor for a number": (scaled, ((Q, K, V, 2.0), {}), [], ((Q, K, V, Q[..., :9]), {}, "scale is not 2.0")),
    "an infinite default": (scaled, ((Q, K, V), {}), [((Q, K, V, torch.inf), {})], ((Q, K, V, 0.5), {}, "scale")),
    "a tuple for a default": (
        scaled,
        ((Q, K, V), {}),
        [((Q, K, V), {"shift": (0.0, 1.0)})],
        ((Q, K, V), {"shift": (0.0, 2.0)}, "shift is not (0.0, 1.0)"),
    ),
}


@pytest.mark.parametrize("function, example, runs, falls_back", CALLS.values(), ids=CALLS)
def test_calls_are_told_apart_by_all_they_pass(function, example, runs, falls_back):
    rewritten = rewrite(function, *example).module
    for args, kwargs in (example, *runs):
        with said(kernels=1):
            close(rewritten(*args, **kwargs), function(*args, **kwargs))
    if falls_back:
        args, kwargs, cause = falls_back
        with said(cause):
            close(rewritten(*args, **kwargs), function(*args, **kwargs))


def test_one_tensor_for_several_arguments_is_not_one_input():
    rewritten = rewrite(attend, (Q, Q, Q)).module
    with said(kernels=2):
        close(rewritten(Q, Q, Q), attend(Q, Q, Q))
        close(rewritten(Q, K, V), attend(Q, K, V))


@pytest.mark.parametrize("name", ["apply", "launch", "tl", "torch", "function", "print", "<lambda>", "ünder_"])
def test_names_of_functions_and_classes_do_not_clash_with_ours(name):
    function = lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v  # noqa: E731
    function.__name__ = name
    kind = type(name.title(), (torch.nn.Module,), {"forward": lambda self, q, k, v: function(q, k, v)})
    for program in (function, kind().eval()):
        with said(kernels=1):
            close(rewrite(program, (Q, K, V)).module(Q, K, V), function(Q, K, V))


def test_arguments_are_called_as_what_guards_read():
    class Projected(torch.nn.Linear):
        def forward(self, tensors, changed, own=None, q_shape=None):
            return attend(super().forward(tensors), changed, own) + q_shape

    module = Projected(16, 16).eval().requires_grad_(False)
    with said(kernels=1):
        close(rewrite(module, (Q, K, V, Q)).module(Q, K, V, Q), module(Q, K, V, Q))


def test_another_function_is_refused(plain):
    def attend(q, k, v):
        return torch.softmax(q @ k.mT / 2, dim=-1) @ v

    with pytest.raises(ValueError, match="attend has other code than the attend that was rewritten"):
        plain.apply(attend)


def test_what_torch_compile_made_is_rewritten_beneath_it():
    compiled = rewrite(torch.compile(attention()), (tokens(),)).module
    assert isinstance(compiled, Attention)
    with torch.no_grad(), said(kernels=2):
        close(compiled(tokens()), attention()(tokens()))
        close(rewrite(torch.compile(attend), (Q, K, V)).module(Q, K, V), attend(Q, K, V))


BAD_CALLS = {
    "no program": (("attend", (Q, K, V)), {}, TypeError, "not a str"),
    "a partial": ((functools.partial(attend, Q), (K, V)), {}, TypeError, "not a partial"),
    "a built-in": ((F.scaled_dot_product_attention, (Q, K, V)), {}, TypeError, "not a builtin"),
    "a method": ((attention().forward, (tokens(),)), {}, TypeError, "takes the Attention itself"),
    "one tensor": ((attend, Q), {}, TypeError, "args is a Tensor"),
    "too few": ((attend, (Q, K)), {}, RewriteError, "missing a required argument: 'v'"),
    "too many": ((attend, (Q, K, V, V)), {}, RewriteError, "too many positional arguments"),
    "an unknown one": ((attend, (Q, K, V), {"w": V}), {}, RewriteError, "unexpected keyword argument 'w'"),
    "that do not fit": ((attend, (Q, K.mT, V)), {}, RewriteError, "cannot trace this"),
    "an object": ((scaled, (Q, K, V, object())), {}, RewriteError, "cannot trace this"),
    "dtype": ((attend, (Q, K, V)), {"dtype": "fp8"}, ValueError, "dtype is 'fp8'"),
    "integer dtype": ((attend, (Q, K, V)), {"dtype": torch.int8}, ValueError, "not a floating one"),
    "masked rows": ((attend, (Q, K, V)), {"masked_rows": "nan"}, ValueError, "not one of match, zero"),
}


@pytest.mark.parametrize("args, kwargs, error, says", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_say_what_is_wrong(args, kwargs, error, says):
    with pytest.raises(error, match=re.escape(says)):
        rewrite(*args, **kwargs)


def test_out_is_not_overwritten_where_it_was_edited(tmp_path):
    out = tmp_path / "out"
    rewrite(attend, (Q, K, V), out=out)
    kernel = out / "kernels" / "attend.py"
    written = kernel.read_text()
    kernel.write_text(written.replace("acc /", "2 * acc /"))
    assert kernel.read_text() != written
    with pytest.warns(UserWarning, match="attend.py: kept, because it was edited"):
        edited = rewrite(attend, (Q, K, V), out=out).module
    close(edited(Q, K, V), 2 * attend(Q, K, V))
    close(rewrite(attend, (Q, K, V), out=out, force=True).module(Q, K, V), attend(Q, K, V))
    assert kernel.read_text() == written
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    with pytest.raises(RewriteError, match="was not written by flashlight-rewrite"):
        rewrite(attend, (Q, K, V), out=tmp_path / "theirs")


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
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("runs its original code: tensors on cpu without TRITON_INTERPRET=1") == 2, run.stderr


def test_bfloat16_on_a_cpu_runs_the_original():
    """Triton's interpreter would multiply it wrongly."""
    model = attention().bfloat16()
    x = tokens().bfloat16()
    with torch.no_grad(), said("bfloat16 on a CPU"):
        assert torch.equal(rewrite(model, (x,)).module(x), model(x))
