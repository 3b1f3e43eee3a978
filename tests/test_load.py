"""Loading: each way a file may lay out its model and inputs, and what is done to them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rewriter.errors import RewriteError
from rewriter.load import Loaded, load
from rewriter.options import InputSpec, Options, identifier, parse_file

HEAD = "import torch\nfrom torch import nn\n"
MODEL = """
class Model(nn.Module):
    def __init__(self, dim=8, *, heads=1):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None, *, scale=1.0):
        return self.proj(x) * scale
"""
INPUTS = "\ndef get_inputs():\n    return [torch.randn(2, 8)]\n"


def loaded(folder: Path, text: str, name: str | None = None, **options: object) -> Loaded:
    file = folder / "m.py"
    file.write_text(HEAD + text)
    return load(Options(file, name, **options))


def specs(*texts: str) -> tuple[InputSpec, ...]:
    return tuple(InputSpec.parse(text) for text in texts)


@pytest.mark.parametrize(
    "init, expected",
    [
        ("", (8, 1)),
        ("def get_init_inputs(): return []", (8, 1)),
        ("def get_init_inputs(): return [4]", (4, 1)),
        ("def get_init_inputs(): return {'dim': 4, 'heads': 2}", (4, 2)),
        ("def get_init_inputs(): return [[4], {'heads': 2}]", (4, 2)),
        ("def get_init_inputs(): return [[], {'dim': 4}]", (4, 1)),
    ],
)
def test_init_inputs(init, expected, tmp_path):
    inputs = INPUTS.replace("8", str(expected[0]))
    model = loaded(tmp_path, MODEL + init + inputs).module
    assert (model.dim, model.heads) == expected


@pytest.mark.parametrize(
    "given, positional, named",
    [
        ("[x]", 1, []),
        ("(x, None)", 2, []),
        ("{'x': x, 'scale': 2.0}", 0, ["x", "scale"]),
        ("[[x], {'scale': 2.0}]", 1, ["scale"]),
    ],
)
def test_inputs_of_the_file(given, positional, named, tmp_path):
    text = f"def get_inputs():\n    x = torch.randn(2, 8)\n    return {given}\n"
    found = loaded(tmp_path, MODEL + text)
    assert (len(found.args), list(found.kwargs)) == (positional, named)
    assert found.inputs_from == "get_inputs"


def test_the_only_module_and_where_it_came_from(tmp_path):
    found = loaded(tmp_path, MODEL.replace("Model", "Mine") + INPUTS)
    assert (found.class_name, found.line, found.file) == ("Mine", 4, tmp_path / "m.py")
    assert type(found.module).__module__ == found.module_name
    assert found.module_name.startswith("flashlight_user_m")
    assert "self.proj(x) * scale" in inspect.getsource(type(found.module))
    assert found.notes == ()


def test_model_comes_before_other_modules(tmp_path):
    assert loaded(tmp_path, MODEL.replace("Model", "Part") + MODEL + INPUTS).class_name == "Model"


def test_a_function(tmp_path):
    text = "def attend(q, k, *, mask):\n    return (q @ k.mT).masked_fill(~mask, 0)\n"
    inputs = specs("q=fp16[3,8]", "mask=bool[3,3]", "k=float16[3,8]")
    found = loaded(tmp_path, text, "attend", inputs=inputs)
    assert inspect.isfunction(found.module) and found.inputs_from == "--input"
    assert [x.dtype for x in found.args] == [torch.float16] * 2 and list(found.kwargs) == ["mask"]
    assert found.kwargs["mask"].any(-1).all()


def test_named_inputs_win_over_the_files(tmp_path):
    found = loaded(tmp_path, MODEL + INPUTS, inputs=specs("x=fp32[3,8]", "scale=fp32[]"))
    assert found.args[0].shape == (3, 8) and found.kwargs["scale"].shape == ()


def test_random_integers_keep_to_their_bound_and_repeat(tmp_path):
    text = "def f(a, b): return a\n"
    inputs = specs("a=int64[200]", "b=uint8[2000]<255")
    first, second = (loaded(tmp_path, text, "f", inputs=inputs).args for _ in range(2))
    assert set(first[0].tolist()) == {0, 1} and first[1].max() == 254
    assert all(map(torch.equal, first, second))


def test_weights_and_inputs_repeat(tmp_path):
    first, second = (loaded(tmp_path, MODEL + INPUTS) for _ in range(2))
    assert torch.equal(first.module.proj.weight, second.module.proj.weight)
    assert torch.equal(first.args[0], second.args[0])


def test_dtype_casts_what_floats_and_nothing_else(tmp_path):
    text = """
class Model(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        fills = [torch.finfo(torch.float32).min, -torch.inf]
        self.register_buffer("fill", torch.tensor(fills))
        self.register_buffer("turn", torch.ones(2, dtype=torch.complex64) * 1j)

    def forward(self, x, keep):
        return super().forward(x)

def get_inputs():
    return [torch.randn(2, 8), torch.tensor([True, False])]
"""
    found = loaded(tmp_path, text, dtype="bf16")
    assert found.module.weight.dtype == found.args[0].dtype == torch.bfloat16
    assert found.args[1].dtype == torch.bool
    assert found.module.turn.dtype == torch.complex64 and found.module.turn.imag.all()
    fill = found.module.fill
    assert fill[0] == torch.finfo(torch.bfloat16).min, "a finite fill stays finite"
    assert fill[1] == -torch.inf


def test_one_tensor_passed_twice_stays_one(tmp_path):
    text = "def f(q, k): return q\ndef get_inputs():\n    x = torch.randn(2)\n    return [x, x]\n"
    q, k = loaded(tmp_path, text, "f", dtype="fp16").args
    assert q is k and q.dtype == torch.float16


@pytest.mark.parametrize(
    "line, noted",
    [
        ("", False),
        ("self.drop = nn.Dropout(0.1)", True),
        ("self.norm = nn.BatchNorm1d(8)", True),
        ("self.attn = nn.MultiheadAttention(8, 1, dropout=0.1)", True),
        ("self.attn = nn.MultiheadAttention(8, 1)", False),
        ("self.flag = self.training", True),
        ("self.drop = nn.Dropout(0.1); self.eval()", False),
    ],
)
def test_inference_mode_is_noted_where_it_matters(line, noted, tmp_path):
    found = loaded(tmp_path, MODEL.replace("self.proj =", f"{line}\n        self.proj =") + INPUTS)
    assert not found.module.training
    assert [str(note.site) for note in found.notes] == [f"{tmp_path}/m.py:4"] * noted


def test_a_mode_the_file_chose_stays(tmp_path):
    line = "self.drop = nn.Dropout(0.1); self.eval(); self.drop.train()"
    found = loaded(tmp_path, MODEL.replace("self.proj =", f"{line}\n        self.proj =") + INPUTS)
    assert found.module.drop.training and not found.module.training


def test_the_run_changes_nothing(tmp_path):
    text = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.add_(self.calls)

def get_inputs():
    return [torch.zeros(3, requires_grad=True) * 1]
"""
    found = loaded(tmp_path, text)
    assert found.module.calls == 0 and not found.args[0].any()


def test_a_lazy_module_gets_its_shapes(tmp_path):
    found = loaded(tmp_path, MODEL.replace("nn.Linear(dim, dim)", "nn.LazyLinear(3)") + INPUTS)
    assert found.module.proj.weight.shape == (3, 8)


def test_a_kernel_missing_on_this_machine_is_a_note(tmp_path, monkeypatch):
    text = 'def f(x):\n    raise RuntimeError("\\"mm\\" not implemented for \'Half\'")\n'
    found = loaded(tmp_path, text, "f", inputs=specs("x=fp32[2]"), dtype="fp16")
    assert "not implemented for 'Half'" in found.notes[0].text and found.notes[0].site.line == 4
    with pytest.raises(RewriteError):
        loaded(tmp_path, text, "f", inputs=specs("x=fp32[2]"))


def test_siblings_are_found_and_do_not_mix(tmp_path):
    text = "from sibling import SIZE\n" + MODEL.replace("heads=1", "heads=SIZE") + INPUTS
    path = list(sys.path)
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "sibling.py").write_text(f"SIZE = {size}\n")
        assert loaded(folder, text).module.heads == size
        assert not (folder / "__pycache__").exists()
    assert sys.path == path


@pytest.mark.parametrize("inits", [[], ["pkg/models"], ["pkg", "pkg/models"]])
@pytest.mark.parametrize("climb", [".", ".."])
def test_relative_imports(inits, climb, tmp_path):
    folder = tmp_path / "pkg" / "models"
    folder.mkdir(parents=True)
    for name in inits:
        (tmp_path / name / "__init__.py").touch()
    (folder / climb / "sizes.py").write_text("SIZE = 3\n")
    text = f"from {climb}sizes import SIZE\n" + MODEL.replace("heads=1", "heads=SIZE") + INPUTS
    path = list(sys.path)
    found = loaded(folder, text)
    assert found.module.heads == 3 and sys.path == path
    assert f"pkg.{found.package}".endswith("pkg.models")


def test_the_command_line_is_that_of_the_file(tmp_path):
    text = "import sys\nARGV = list(sys.argv)\n"
    argv = list(sys.argv)
    found = loaded(tmp_path, text + MODEL + INPUTS)
    assert sys.modules[found.module_name].ARGV == [str(tmp_path / "m.py")] and sys.argv == argv


def test_files_of_one_name_are_two_modules(tmp_path):
    names = []
    for folder in ("a", "b", "a"):
        (tmp_path / folder).mkdir(exist_ok=True)
        names.append(loaded(tmp_path / folder, MODEL + INPUTS).module_name)
    assert names[0] == names[2] != names[1]


def test_an_edited_file_is_read_anew(tmp_path):
    first = loaded(tmp_path, MODEL + INPUTS)
    second = loaded(tmp_path, MODEL.replace("dim=8", "dim=9") + INPUTS.replace("8", "9"))
    assert (first.module.dim, second.module.dim) == (8, 9)
    assert "dim=9" in inspect.getsource(type(second.module))


def test_a_module_from_the_library(tmp_path):
    text = "from torch.nn import Linear\nclass Model(Linear): pass\n"
    text += "def get_init_inputs(): return [8, 8]\n"
    found = loaded(tmp_path, text + INPUTS)
    assert isinstance(found.module, nn.Linear) and found.line == 4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("m.py", ("m.py", None)),
        ("a/m.py:Attn", ("a/m.py", "Attn")),
        ("a:b/m.py:Attn", ("a:b/m.py", "Attn")),
        (":Attn", (":Attn", None)),
    ],
)
def test_file_and_class(text, expected):
    assert parse_file(text) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("q=fp32[1, 4,37]", InputSpec("q", "fp32", (1, 4, 37))),
        ("x=bfloat16[]", InputSpec("x", "bf16", ())),
        ("ids=int64[2]<100", InputSpec("ids", "int64", (2,), 100)),
    ],
)
def test_input_grammar(text, expected):
    assert InputSpec.parse(text) == expected


def test_out_is_importable_whatever_the_file_is_called():
    assert Options(Path("a/my_model.py")).out_dir == Path("a/my_model_flashlight")
    assert identifier("97_Cosine-Loss") == "_97_Cosine_Loss"
