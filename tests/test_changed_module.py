"""Another instance, or one that was changed: the kernels run where the program is the same, else the original does."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from configured_program import ANOTHER_PROGRAM, THE_SAME_PROGRAM, configured
from library_programs import Attention, Emitted, Model, attention, close, said, tensors, tokens
from torch import nn

from rewriter import rewrite
from rewriter.api import import_package

X = tensors(2, 9, 16, count=1)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory) -> Emitted:
    return Emitted(configured(), tmp_path_factory.mktemp("configured"), X)


@pytest.fixture(scope="module")
def layer(tmp_path_factory) -> Emitted:
    return Emitted(attention(), tmp_path_factory.mktemp("layer"), (tokens(),))


def both(emitted: Emitted, change: Callable, order: str) -> tuple[nn.Module, nn.Module]:
    """(the original, the rewritten one), changed alike, the latter before or after `apply`."""
    original, rewritten = configured(), configured()
    rewritten.load_state_dict(original.state_dict())
    change(original)
    if order == "changed, applied":
        change(rewritten)
    rewritten = emitted.apply(rewritten)
    if order == "applied, changed":
        change(rewritten)
    return original, rewritten


orders = pytest.mark.parametrize("order", ["changed, applied", "applied, changed"])


def seeded(module: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    return module(*X)


@orders
@pytest.mark.parametrize("change, cause", ANOTHER_PROGRAM.values(), ids=ANOTHER_PROGRAM)
def test_another_program_runs_its_own_code(change, cause, order, emitted):
    original, rewritten = both(emitted, change, order)
    with torch.no_grad(), said(cause):
        for _ in range(2):
            close(seeded(rewritten), seeded(original))


@orders
@pytest.mark.parametrize("change", THE_SAME_PROGRAM.values(), ids=THE_SAME_PROGRAM)
def test_the_same_program_runs_the_kernels(change, order, emitted):
    with torch.no_grad():
        original, rewritten = both(emitted, change, order)
        with said(kernels=1):
            close(seeded(rewritten), seeded(original))


def test_parameters_of_another_dtype_with_inputs_of_the_same():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 16)

        def forward(self, ids):
            x = self.table(ids)
            return torch.softmax(x @ x.mT, -1) @ x

    ids, original = torch.randint(10, (2, 9)), Embedded().eval()
    rewritten = rewrite(original, (ids,)).module
    with torch.no_grad(), said("self.table.weight is not torch.float32", kernels=1):
        close(rewritten(ids), original(ids))
        close(copy.deepcopy(rewritten).double()(ids), copy.deepcopy(original).double()(ids))


# --- which modules are taken for the one that was rewritten


def test_layers_of_several_sorts_in_one_model(layer):
    torch.manual_seed(0)
    model = Model().eval()
    model.layers[1] = Attention(heads=4).eval()
    expected = model(tokens())
    layer.apply(model)
    assert type(model.layers[0]) is type(model.layers[1])
    with torch.no_grad(), said("self.heads is not 2", kernels=1):
        close(model(tokens()), expected)


def test_a_class_of_that_name_with_other_code_is_left_alone(layer):
    other = type("Attention", (nn.Module,), {"forward": lambda self, x: 2 * x, "__qualname__": "Attention"})
    with pytest.raises(ValueError, match="no Attention in this model of the code that was rewritten"):
        layer.apply(nn.Sequential(other()))
    model = nn.Sequential(attention(), other())
    with pytest.warns(UserWarning, match="an? Attention of other code than was rewritten is left"):
        layer.apply(model)
    assert type(model[1]) is other and type(model[0]) is not Attention


def test_a_subclass_is_another_class(layer):
    kind = type("Special", (Attention,), {})
    with pytest.raises(ValueError, match="no Attention in this model"):
        layer.apply(kind())


SOURCE = """\
import torch
from torch import nn

class Layer(nn.Module):
    def forward(self, q, k, v):
        return self.weights(q, k) @ v

    def weights(self, q, k):
        return torch.softmax(q @ k.mT * SCALE, -1)
"""


def imported(folder: Path, name: str, scale: str) -> type[nn.Module]:
    (folder / f"{name}.py").write_text(SOURCE.replace("SCALE", scale))
    namespace = import_package_file(folder / f"{name}.py")
    return namespace.Layer


def import_package_file(path: Path):
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_file_imported_twice_and_one_that_was_edited(tmp_path):
    first, again, edited = (
        imported(tmp_path, name, scale) for name, scale in [("a", "0.25"), ("b", "0.25"), ("c", "0.5")]
    )
    q, k, v = tensors(1, 9, 16)
    out = tmp_path / "out"
    rewrite(first(), (q, k, v), out=out)
    with said(kernels=1):
        close(import_package(out).apply(again())(q, k, v), first()(q, k, v))
    with pytest.raises(ValueError, match="of the code that was rewritten"):
        import_package(out).apply(edited())


def test_a_rewritten_module_is_rewritten_as_the_original(layer):
    once = layer.apply(attention())
    twice = rewrite(once, (tokens(),))
    assert twice.report["chains"]
    with torch.no_grad(), said(kernels=1):
        close(twice.module(tokens()), attention()(tokens()))


# --- copies


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replicated(module: nn.Module) -> nn.Module:
    """As DataParallel does it: parameters become plain attributes."""
    copied = copy.copy(module)
    replica = copied._replicate_for_data_parallel()
    for name, part in module.named_children():
        replica._modules[name] = replicated(part)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        setattr(replica, name, tensor.clone())
    return replica


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickled, saved, replicated])
def test_a_copy_is_rewritten_too(copying, layer):
    torch.manual_seed(0)
    model = Model().eval()
    expected, keys = model(tokens()), list(model.state_dict())
    copied = copying(layer.apply(model))
    if copying is not replicated:
        assert list(copied.state_dict()) == keys
    with torch.no_grad(), said(kernels=2):
        close(copied(tokens()), expected)


LOADING = """\
import sys, torch
module = torch.load(sys.argv[1], weights_only=False)
torch.set_grad_enabled(False)
print(type(module).forward.__module__, float(module(torch.ones(1, 4, 32)).sum()))
"""


def test_a_saved_module_is_loaded_by_another_process(tmp_path, monkeypatch):
    module = rewrite(attention(), (tokens(),), out=tmp_path / "attention_kernels").module
    torch.save(module, tmp_path / "module.pt")
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    run = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path / "module.pt")],
        env={"TRITON_INTERPRET": "1", "PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    name, total = run.stdout.split()
    assert name == "attention_kernels.module"
    close(torch.tensor(float(total)), attention()(torch.ones(1, 4, 32)).sum().detach())


def test_the_copy_that_rewrite_gives_has_tables_of_its_own(layer):
    original = attention()
    drop_in = rewrite(original, (tokens(),)).module
    assert all(a is b for a, b in zip(original.parameters(), drop_in.parameters(), strict=True))
    drop_in.register_forward_hook(lambda *_: 1 / 0)
    drop_in.extra = nn.Linear(2, 2)
    original(tokens())
    assert "extra.weight" not in original.state_dict()


# --- modes in which an op without a derivative would be wrong, or would not run


def test_autocast_runs_the_original(layer):
    module, x = layer.apply(attention()), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), said("autocast is on"):
        close(module(x), attention()(x))


def test_forward_mode_runs_the_original(layer):
    module, x = layer.apply(attention()).requires_grad_(False), tokens()
    with said("forward-mode"):
        out = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    close(out, torch.func.jvp(attention(), (x,), (torch.ones_like(x),)))


def test_functional_calls_and_vmap(layer):
    module, xs = layer.apply(attention()), torch.stack([tokens(), 2 * tokens()])
    state = {name: tensor / 2 for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        close(
            torch.func.functional_call(module, state, (xs[0],)),
            torch.func.functional_call(attention(), state, (xs[0],)),
        )
        close(torch.vmap(module)(xs), torch.stack([attention()(x) for x in xs]))


def test_a_sparse_tensor_runs_the_original():
    def weigh(x, y):
        return torch.softmax(x @ y.mT, -1) @ y

    x, y = tensors(9, 16, count=2)
    function = rewrite(weigh, (x, y)).module
    with said("a tensor is not strided"):
        close(function(x.to_sparse(), y), weigh(x, y))


def test_train_step(layer):
    torch.manual_seed(0)
    original = attention().requires_grad_()
    rewritten = layer.apply(copy.deepcopy(original))
    with said("needs a gradient"):
        for module in (original, rewritten):
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                module(tokens()).square().sum().backward()
                optimizer.step()
    for mine, theirs in zip(rewritten.parameters(), original.parameters(), strict=True):
        close(mine, theirs)
