"""What tracing makes of a program that does more than call ops: its chains, or the reason and the line."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from library_programs import close, said, tensors, tokens
from torch.utils._pytree import tree_flatten

from rewriter import rewrite
from rewriter.emit.spelling import does_the_same
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


class Counting(torch.nn.Module):
    """Its state is changed by a slice, in a method of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 2, 64, 16))

    def forward(self, q, k, v):
        self.keep(k)
        return attend(q, self.cache[: k.shape[0], :, : k.shape[2]], v)

    def keep(self, k):
        self.cache[: k.shape[0], :, : k.shape[2]] = k


def test_what_changes_a_buffer_is_named():
    with pytest.raises(RewriteError, match="forward changes cache in place") as caught:
        rewrite(Counting(), tensors(2, 2, 9, 16))
    lines, first = inspect.getsourcelines(Counting.keep)
    assert "= k" in lines[caught.value.reason.site.line - first]


MEMORY = torch.randn(40, 16)


def test_a_tensor_from_around_a_function_is_to_be_passed():
    def recalled(x):
        return (x @ MEMORY.mT).softmax(-1) @ MEMORY

    with pytest.raises(RewriteError, match="640 elements that is neither an argument .*: pass it"):
        rewrite(recalled, (torch.randn(2, 9, 16),))


def test_parts_of_the_program_as_arguments_are_refused():
    def program(q, k, v):
        return torch.cond(q.sum() > 4, lambda x: x * 2, lambda x: x * 3, (attend(q, k, v),))

    with pytest.raises(RewriteError, match="cond takes parts of the program"):
        rewrite(program, tensors(2, 2, 9, 16))


Pair = namedtuple("Pair", "out most")


@dataclass
class Result:
    """As a model returns several values."""

    out: torch.Tensor
    norms: tuple


torch.utils._pytree.register_dataclass(Result)


def returning(kind):
    def program(q, k, v):
        out = attend(q, k, v)
        return {
            "a named tuple": lambda: Pair(out, [out.amax(), None]),
            "a tuple of torch's": lambda: out.max(-1),
            "a dataclass": lambda: Result(out, (out.sum(),)),
            "an ordered dictionary": lambda: OrderedDict(out=out, count=3),
            "a dictionary": lambda: {"out": out, 1: ("x", float("inf"))},
        }[kind]()

    return program


KINDS = ("a named tuple", "a tuple of torch's", "a dataclass", "an ordered dictionary", "a dictionary")


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_of_the_users_kind(kind):
    program, args = returning(kind), tensors(2, 2, 9, 16)
    out, expected = rewrite(program, args).module(*args), program(*args)
    assert type(out) is type(expected)
    (leaves, spec), (wanted, wanted_spec) = map(tree_flatten, (out, expected))
    assert spec == wanted_spec and len(leaves) == len(wanted)
    for leaf, value in zip(leaves, wanted, strict=True):
        close(leaf, value) if torch.is_tensor(value) else None
        assert torch.is_tensor(value) or leaf == value


CALLS = ["o.real", "o.mH", "torch.broadcast_tensors(o, o[:, :1])[1]", "torch.block_diag(o[0, 0], o[0, 1])"]
CALLS += ["torch.cartesian_prod(o[0, 0, 0], o[0, 1, 0])", "torch.tensordot(o, torch.ones(16, 3), 1)", "o[0, 0].H"]
CALLS += ["o.to(torch.complex64).imag", "torch.tensor_split(o, 3, dim=2)[1]", "o.std(-1, unbiased=False)"]
CALLS += ["torch.nn.functional.mse_loss(o, v)", "o.sort(-1, descending=True)[0]", "torch.linalg.norm(o, dim=-1)"]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_after_a_chain_is_the_users(call):
    names = {"torch": torch}
    exec(f"def program(q, k, v):\n    o = (q @ k.mT).softmax(-1) @ v\n    return {call}", names)
    function = rewrite(names["program"], tensors(2, 2, 9, 16)).module
    for args in (tensors(2, 2, 9, 16), tensors(3, 2, 20, 16)):
        with torch.no_grad(), said(kernels=1):
            torch.testing.assert_close(function(*args), names["program"](*args), rtol=1e-4, atol=1e-5)


class Masked(torch.nn.TransformerEncoder):
    """Called without `is_causal`, it looks at what the mask holds."""

    def __init__(self):
        layer = torch.nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
        super().__init__(layer, 1, enable_nested_tensor=False)
        self.requires_grad_(False)

    def forward(self, x, mask):
        return super().forward(x, mask=mask)


def test_a_mask_is_not_looked_at():
    module, causal = Masked(), torch.nn.Transformer.generate_square_subsequent_mask
    original = copy.deepcopy(module)
    function = rewrite(module, (tokens(1, 7), causal(7))).module
    for batch, n in ((1, 7), (2, 9), (3, 1)):
        for mask in (causal(n), tensors(n, n, count=1)[0]):
            with said(kernels=1):
                close(function(tokens(batch, n), mask), original(tokens(batch, n), mask))


def test_nothing_is_warned_of_a_program_without_sizes():
    traced = capture(lambda x: x.relu(), (torch.tensor(1.0),), {})
    (node,) = (n for n in traced.graph.nodes if n.op == "call_function")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert does_the_same(node, f"torch.relu({node.args[0].name})")


class Padded(torch.nn.Module):
    """In eval mode torch leaves padding at the end of rows out, and gives 0 for it, before the norm."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 1, norm=torch.nn.LayerNorm(32))
        self.requires_grad_(False)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


@torch.no_grad()
def test_padding_that_torch_leaves_out_is_zero():
    torch.manual_seed(0)
    module = Padded().eval()
    at_the_end, before = torch.zeros(2, 2, 9, dtype=torch.bool)
    at_the_end[1, 6:] = before[0, :3] = True
    rewritten = rewrite(module, (tokens(2, 9), at_the_end)).module
    for padding in (at_the_end, before, at_the_end | before):
        with said(kernels=1):
            close(rewritten(tokens(2, 9), padding), module(tokens(2, 9), padding))
