"""A rewritten module takes the original's place: in a model, in its state, under torch.compile and torch.export."""

from __future__ import annotations

import copy
import shutil
import sys
from collections import OrderedDict, namedtuple
from typing import NamedTuple

import pytest
import torch
from library_programs import (
    Attention,
    Emitted,
    Model,
    attend,
    attention,
    close,
    said,
    tensors,
    tokens,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_structure

from rewriter import rewrite
from rewriter.api import import_package
from rewriter.errors import RewriteError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Emitted:
    return Emitted(attend, tmp_path_factory.mktemp("plain"), tensors(2, 2, 9, 16))


@pytest.fixture(scope="module")
def unmasked(tmp_path_factory) -> Emitted:
    return Emitted(attention(), tmp_path_factory.mktemp("unmasked"), (tokens(),))


def test_the_original_is_left_as_it_was(unmasked):
    original = unmasked.program
    assert type(original) is Attention and unmasked.rewrite.module is not original
    assert isinstance(unmasked.rewrite.module, Attention)
    with torch.no_grad(), said(kernels=1):
        close(unmasked.rewrite.module(tokens()), original(tokens()))


def test_apply_swaps_every_layer_in_place(unmasked):
    torch.manual_seed(0)
    model = Model().eval()
    expected, keys, parameters = model(tokens()), list(model.state_dict()), list(model.parameters())
    rewritten = unmasked.apply(model)
    assert rewritten is model and type(model) is Model
    assert all(type(layer) is not Attention and isinstance(layer, Attention) for layer in model.layers)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad(), said(kernels=2):
        close(model(tokens()), expected)


def test_applied_twice_is_applied_once(unmasked):
    package = import_package(unmasked.folder)
    once = type(package.apply(module := attention()))
    assert type(package.apply(module)) is once


def test_a_model_without_the_host_is_refused(unmasked):
    with pytest.raises(ValueError, match="no Attention in this model"):
        unmasked.apply(nn.Linear(4, 4))


def test_state_hooks_and_modes(unmasked):
    module = attention()
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: out + 1)
    expected = module(tokens())
    unmasked.apply(module)
    assert not module.training and not module.qkv.training
    with torch.no_grad(), said(kernels=1):
        close(module(tokens()), expected)
    assert seen == ["before"] * 2
    module.load_state_dict(Attention().state_dict())
    assert module.train().training and module.qkv.training


def test_a_rewritten_module_can_be_copied(unmasked):
    module = unmasked.apply(attention())
    copied = copy.deepcopy(module)
    with torch.no_grad(), said(kernels=1):
        close(copied(tokens()), attention()(tokens()))
    assert copied.qkv.weight is not module.qkv.weight


def test_nothing_to_fuse_returns_the_original():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    result = rewrite(model, (torch.randn(2, 8),))
    assert result.module is model and not result.sources and not result.report["chains"]


def test_dtype_casts_a_copy(tmp_path):
    original = attention()
    result = rewrite(original, (tokens(),), dtype=torch.float16, out=tmp_path)
    assert original.qkv.weight.dtype is torch.float32
    with torch.no_grad(), said(kernels=1):
        out = result.module(tokens().half())
    assert out.dtype is torch.float16
    torch.testing.assert_close(out.float(), original(tokens()), rtol=1e-2, atol=1e-2)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.[pmj]*") if p.suffix != ".pyc"} == set(
        result.sources
    )


# --- what it returns


class Pair(NamedTuple):
    weighted: torch.Tensor
    given: torch.Tensor
    name: str = "pair"


class Paired(nn.Module):
    def forward(self, q, k, v):
        return Pair(torch.softmax(q @ k.mT, -1) @ v, q)


def several(q, k, v):
    weighted = torch.softmax(q @ k.mT, -1) @ v
    return OrderedDict(a=[weighted, {"b": (q, None)}], best=weighted.max(-1), top=Pair(weighted, v), n=float("inf"))


@pytest.mark.parametrize("program", [several, Paired()])
def test_what_is_returned_is_of_the_users_classes(program):
    args = tensors(2, 9, 16)
    rewritten = rewrite(program, args).module
    with said(kernels=1):
        out = rewritten(*args)
    expected = program(*args)
    assert tree_structure(out) == tree_structure(expected) and type(out) is type(expected)
    compiled = torch.compile(rewritten, backend="eager", fullgraph=True)(*args)
    for found in (out, compiled):
        for mine, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert mine == theirs if not torch.is_tensor(theirs) else close(mine, theirs) is None


def test_a_class_without_a_name_is_refused():
    def local(q, k, v):
        return kind(torch.softmax(q @ k.mT, -1) @ v)

    kind = namedtuple("kind", "x")
    with pytest.raises(RewriteError, match="returns a kind, which its file has no name for"):
        rewrite(local, tensors(2, 9, 16))


# --- torch.library


def kernel_calls(graph: torch.fx.GraphModule) -> int:
    return sum(str(node.target).startswith("flashlight.") for node in graph.graph.nodes)


def test_the_op_is_traced_with_free_sizes(plain):
    graph = make_fx(plain.apply(attend), tracing_mode="symbolic")(*tensors(2, 2, 9, 16))
    assert kernel_calls(graph) == 1
    others = tensors(1, 3, 20, 16)
    close(graph(*others), attend(*others))


def test_the_op_is_exported_with_free_sizes(unmasked):
    module = unmasked.apply(attention()).requires_grad_(False)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module, (tokens(),), dynamic_shapes=sizes)
    assert kernel_calls(exported.graph_module) == 1
    close(exported.module()(tokens(3, 20)), attention()(tokens(3, 20)))


def kernel_file(emitted: Emitted):
    """The imported file of the one kernel of a package."""
    package = import_package(emitted.folder)
    package.apply(emitted.program)
    return sys.modules[f"{package.__name__}.kernels.attend"]


def test_the_op_is_as_torch_wants_it(plain):
    op = getattr(torch.ops.flashlight, kernel_file(plain).OP).default
    q, k, v = tensors(2, 2, 9, 16)
    torch.library.opcheck(op, (q, k.mT, v))  # schema, autograd, fake tensors, tracing with free sizes


def test_the_op_never_loses_a_gradient(plain):
    q, k, v = tensors(2, 2, 9, 16, requires_grad=True)
    call = kernel_file(plain).attend
    with pytest.raises(NotImplementedError, match="no backward"):
        call(q, k.mT, v)
    with torch.no_grad():
        close(call(q, k.mT, v), attend(q, k, v))


def test_an_edited_kernel_is_another_op(plain, tmp_path):
    folder = shutil.copytree(plain.folder, tmp_path / "edited")
    kernel = folder / "kernels" / "attend.py"
    kernel.write_text(kernel.read_text().replace("acc /", "2 * acc /"))
    edited, args = import_package(folder).apply(attend), tensors(2, 2, 9, 16)
    close(edited(*args), 2 * plain.apply(attend)(*args))


def test_fake_tensors_become_a_fake_tensor(plain):
    function = plain.apply(attend)
    with FakeTensorMode() as mode:
        with said(kernels=1):
            out = function(*(mode.from_tensor(t) for t in tensors(2, 2, 9, 16)))
        assert out.shape == (2, 2, 9, 16) and out.dtype is torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(unmasked, dynamic):
    module, graphs = unmasked.apply(attention()), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for x in (tokens(), tokens(3, 20)):
            close(compiled(x), attention()(x))
    assert graphs and all(kernel_calls(graph) == 1 for graph in graphs)
