"""What tracing makes of a program that does more than call ops: its chains, or the reason and the line."""

from __future__ import annotations

import inspect

import pytest
import torch
from library_programs import close, said, tensors

from rewriter import rewrite
from rewriter.errors import RewriteError
from rewriter.trace import capture


def attend(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def without_autocast(q, k, v):
    with torch.autocast("cuda", enabled=False):
        weights = (q.float() @ k.float().mT).softmax(-1)
    return weights.to(v.dtype) @ v


def changing_gradients(q, k, v):
    with torch.enable_grad():
        s = q @ k.mT
    return s.softmax(-1) @ v


def mapped(q, k, v):
    return torch.vmap(attend)(q, k, v)


def in_steps(q, k, v):
    s = q @ k.mT
    total = torch.logsumexp(s, -1, keepdim=True).cummax(2).values
    return (s - total).exp() @ v


def in_place(q, k, v):
    s = q @ k.mT
    s.sub_(s.amax(-1, keepdim=True)).exp_()
    return s.div_(s.sum(-1, keepdim=True)) @ v


def double_slopes(q, k, v):
    away = torch.arange(k.shape[2], dtype=torch.float64) / 3
    return (q @ k.mT - away.to(q.dtype)).softmax(-1) @ v


def by_position(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, True)


def packed(*qkv):
    return attend(*qkv)


KERNELS = {without_autocast: 1, changing_gradients: 1, mapped: 1, in_steps: 2, in_place: 1, double_slopes: 1}
KERNELS |= {by_position: 1, packed: 1}


@pytest.mark.parametrize("program, kernels", KERNELS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_program_is_traced_through(program, kernels):
    function = rewrite(program, tensors(2, 2, 9, 16)).module
    for shape in ((2, 2, 9, 16), (3, 2, 20, 16)):
        args = tensors(*shape)
        with torch.no_grad(), said(kernels=kernels):
            close(function(*args), program(*args))


def test_casts_of_autocast_are_those_of_one_device():
    def program(q, k, v):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return attend(q, k, v)

    assert capture(program, tensors(2, 2, 9, 16), {}).autocast == {"cuda"}
    assert capture(without_autocast, tensors(2, 2, 9, 16), {}).autocast == set()
    assert 'if not (q.device.type != "cuda")' in rewrite(program, tensors(2, 2, 9, 16)).sources["module.py"]


def test_casts_of_autocast_are_traced():
    def program(q, k):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return q @ k.mT

    traced = capture(program, tensors(2, 2, 9, 16, count=2), {})
    assert [n.meta["val"].dtype for n in traced.graph.nodes if "matmul" in n.name] == [torch.bfloat16]
    assert 'if not (q.device.type == "cpu")' not in traced.graph.python_code("self").src
    assert traced.autocast == {"cpu"}


def test_only_sizes_of_a_result_are_asked():
    report = rewrite(lambda q, k, v: attend(q, k, v).shape, tensors(2, 2, 9, 16)).report
    assert not report["chains"]


def branch(q, k, v):
    s = q @ k.mT
    if s.max() > 50:
        s = s / 2
    return s.softmax(-1) @ v


def length(q, k, v):
    n = int(q.max())
    return attend(q, k[:, :, :n], v[:, :, :n])


@pytest.mark.parametrize("program, line", {branch: "if s.max() > 50:", length: "n = int(q.max())"}.items())
def test_what_depends_on_values_is_named(program, line):
    with pytest.raises(RewriteError, match="depends on the values of a tensor") as caught:
        rewrite(program, tensors(2, 2, 9, 16))
    lines, first = inspect.getsourcelines(program)
    assert line in str(caught.value) and line in lines[caught.value.reason.site.line - first]


def test_parts_of_the_program_as_arguments_are_refused():
    def program(q, k, v):
        return torch.cond(q.sum() > 4, lambda x: x * 2, lambda x: x * 3, (attend(q, k, v),))

    with pytest.raises(RewriteError, match="cond takes parts of the program"):
        rewrite(program, tensors(2, 2, 9, 16))
