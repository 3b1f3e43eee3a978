"""What the library promises of a rewritten module: a drop-in that falls back to the original wherever it must."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter import rewrite
from rewriter.api import import_package
from rewriter.check.launches import record


class Attention(nn.Module):
    """Self-attention, masked where `keep` is given."""

    def __init__(self, dim=32, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("gain", torch.ones(heads, 1, 1))

    def forward(self, x, keep=None, *, scale=0.25):
        b, s, dim = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * scale * self.gain
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, dim))


class Model(nn.Module):
    """Two layers, each of a norm and an attention."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def attend(q, k, v):
    """A plain function."""
    return torch.softmax(q @ k.mT / 4, dim=-1) @ v


class Emitted:
    """A package written once, and imported anew for each test: warnings are given once a package."""

    def __init__(self, program, folder: Path, args: tuple, kwargs: dict | None = None):
        self.program, self.folder = program, folder
        self.rewrite = rewrite(program, args, kwargs, out=folder)
        (self.kernel,) = [chain["name"] for chain in self.rewrite.report["chains"]]

    def apply(self, program):
        """(`program` rewritten, what counts its launches)"""
        package = import_package(self.folder)
        rewritten = package.apply(program)
        return rewritten, record(package, [self.kernel])


def tensors(*shape: int, count: int = 3, **kwargs) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, **kwargs) for _ in range(count))


def tokens(batch=2, length=9) -> torch.Tensor:
    return tensors(batch, length, 32, count=1)[0]


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@contextmanager
def said(*causes: str) -> Iterator[None]:
    """Each of `causes` is warned of once inside, and nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(found) == len(causes), found
    for cause, message in zip(causes, found, strict=True):
        assert cause in message and "runs its original code" in message


def close(out, expected) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# --- kernels run


def test_a_function_runs_its_kernel_at_any_size(plain):
    function, recorder = plain.apply(attend)
    for shape in [(2, 2, 9, 16), (1, 3, 40, 16), (5, 1, 1, 16)]:
        recorder.clear()
        with said():
            close(function(*tensors(*shape)), attend(*tensors(*shape)))
        assert recorder.launches


def test_a_batch_of_none(plain):
    function, _ = plain.apply(attend)
    with said():
        assert function(*tensors(0, 2, 9, 16)).shape == (0, 2, 9, 16)


def test_a_function_keeps_its_name_and_keywords(plain):
    function, _ = plain.apply(attend)
    q, k, v = tensors(2, 2, 9, 16)
    assert function.__name__ == "attend" and function.__doc__ == "A plain function."
    close(function(q, v=v, k=k), attend(q, k, v))


def test_keywords_are_taken_as_the_original_takes_them(masked):
    module, recorder = masked.apply(attention())
    x, keep = tokens(3, 20), torch.rand(3, 20) < 0.5
    expected = attention()(x, keep)
    with torch.no_grad(), said():
        for out in (module(x, keep), module(x, keep=keep), module(keep=keep, x=x, scale=0.25)):
            close(out, expected)
    assert recorder.launches


def test_tensors_that_are_not_contiguous(plain):
    function, recorder = plain.apply(attend)
    q, k, v = (t.transpose(1, 2) for t in tensors(2, 9, 2, 16))
    wide = tensors(2, 2, 9, 33, count=1)[0][..., ::2][..., :16]
    with said():
        close(function(q, wide, v), attend(q, wide, v))
        close(function(q[:1].expand(2, -1, -1, -1), k, v), attend(q[:1].expand(2, -1, -1, -1), k, v))
    assert recorder.launches


# --- where the original runs


def fallback(emitted: Emitted, program, calls: list[tuple[tuple, dict]], cause: str) -> None:
    """Each call twice: right, no kernel, one warning in all."""
    rewritten, recorder = emitted.apply(copy.deepcopy(program))
    with torch.no_grad(), said(cause):
        for args, kwargs in calls * 2:
            close(rewritten(*args, **kwargs), program(*args, **kwargs))
    assert not recorder.launches


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
    rewritten, recorder = unmasked.apply(copy.deepcopy(original))
    original(x).square().sum().backward()
    expected, x.grad = x.grad, None
    with said("needs a gradient"):
        for _ in range(2):
            out = rewritten(x)
    out.square().sum().backward()
    close(x.grad, expected)
    for mine, theirs in zip(rewritten.parameters(), original.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    assert not recorder.launches


def test_each_cause_is_said_once_and_kernels_run_again(plain):
    function, recorder = plain.apply(attend)
    with said("q is not torch.float32", "needs a gradient"):
        for _ in range(2):
            function(*tensors(2, 2, 9, 16, dtype=torch.float64))
            function(*tensors(2, 2, 9, 16, requires_grad=True))
    assert not recorder.launches
    with said():
        function(*tensors(2, 2, 9, 16))
    assert recorder.launches


WITHOUT_INTERPRETER = """\
import sys, warnings
import torch
sys.path.insert(0, {tests!r})
from test_library import attend, attention, tensors, tokens
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


# --- a drop-in


def test_the_original_is_left_as_it_was(unmasked):
    original = unmasked.program
    assert type(original) is Attention and unmasked.rewrite.module is not original
    assert isinstance(unmasked.rewrite.module, Attention)
    with torch.no_grad(), said():
        close(unmasked.rewrite.module(tokens()), original(tokens()))


def test_apply_swaps_every_layer_in_place(unmasked):
    torch.manual_seed(0)
    model = Model().eval()
    expected, keys, parameters = model(tokens()), list(model.state_dict()), list(model.parameters())
    rewritten, recorder = unmasked.apply(model)
    assert rewritten is model and type(model) is Model
    assert all(type(layer) is not Attention and isinstance(layer, Attention) for layer in model.layers)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad(), said():
        close(model(tokens()), expected)
    assert recorder.launches


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
    with torch.no_grad(), said():
        close(module(tokens()), expected)
    assert seen == ["before"] * 2
    module.load_state_dict(Attention().state_dict())
    assert module.train().training and module.qkv.training


def test_a_rewritten_module_can_be_copied(unmasked):
    module, recorder = unmasked.apply(attention())
    copied = copy.deepcopy(module)
    with torch.no_grad(), said():
        close(copied(tokens()), attention()(tokens()))
    assert recorder.launches and copied.qkv.weight is not module.qkv.weight


def test_nothing_to_fuse_returns_the_original():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    result = rewrite(model, (torch.randn(2, 8),))
    assert result.module is model and not result.sources and not result.report["chains"]


def test_dtype_casts_a_copy(tmp_path):
    original = attention()
    result = rewrite(original, (tokens(),), dtype=torch.float16, out=tmp_path)
    assert original.qkv.weight.dtype is torch.float32
    with torch.no_grad(), said():
        out = result.module(tokens().half())
    assert out.dtype is torch.float16
    torch.testing.assert_close(out.float(), original(tokens()), rtol=1e-2, atol=1e-2)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.[pmj]*") if p.suffix != ".pyc"} == set(
        result.sources
    )


# --- torch.library


def test_the_op_is_registered(plain):
    args = tensors(2, 2, 9, 16)
    out, names = plain.rewrite.module(*args), []
    graph = make_fx(plain.rewrite.module, tracing_mode="symbolic")(*args)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            names.append(str(node.target))
    assert any(name.startswith("flashlight.attend") for name in names), names
    close(graph(*tensors(1, 3, 20, 16)), attend(*tensors(1, 3, 20, 16)))
    close(out, attend(*args))


def test_the_op_is_as_torch_wants_it(plain):
    (name,) = [n for n in dir(torch.ops.flashlight) if n.startswith("attend_")]
    op = getattr(torch.ops.flashlight, name).default
    args = (tensors(2, 2, 9, 16)[0], tensors(2, 2, 9, 16)[1].mT, tensors(2, 2, 9, 16)[2])
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_fake_tensors_reach_the_op_and_not_the_kernel(plain):
    function, recorder = plain.apply(attend)
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(t) for t in tensors(2, 2, 9, 16)]
        out = function(*args)
    assert out.shape == (2, 2, 9, 16) and out.dtype is torch.float32
    assert not recorder.launches


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(unmasked, dynamic):
    module, recorder = unmasked.apply(attention())
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), said():
        for x in (tokens(), tokens(3, 20)):
            close(compiled(x), attention()(x))
    assert recorder.launches
