"""Whole emitted kernels, kept in goldens/: compared with what is emitted now, and run as they are.

After a change of the emitter: `scripts/test tests/test_goldens.py --update-goldens`, then read the difference.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_programs import GOLDENS

from rewriter.api import rewrite
from rewriter.check.numerics import compare, run_float64
from rewriter.pipeline import _is_free

FOLDER = Path(__file__).parent / "goldens"
LARGEST = {"B": 3, "H": 3}  # a length may be up to 70: more than one tile, and none full

every_golden = pytest.mark.parametrize("name", GOLDENS)


def emitted(name: str, folder: Path) -> str:
    golden = GOLDENS[name]
    model = golden.build().half().eval()
    sources = rewrite(model, golden.arguments(), out=folder).sources
    assert [file for file in sources if file.startswith("kernels/") and "__" not in file] == [f"kernels/{name}.py"]
    return sources[f"kernels/{name}.py"]


@every_golden
def test_a_kernel_is_called_otherwise_than_what_its_file_defines(name):
    """Its op is the last function of the file: one of another's name would take that one's place."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    *others, own = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    imported = [a.asname or a.name for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    mine = [n for n in others if not n.startswith(("_", f"{own}_"))]
    assert own == name and not any(map(_is_free, [n for n in (*mine, *imported) if n.islower()]))


@every_golden
def test_emitted_as_before(name, tmp_path, request):
    text = emitted(name, tmp_path)
    path = FOLDER / f"{name}.py"
    if request.config.getoption("--update-goldens"):
        path.write_text(text)
    before = path.read_text() if path.exists() else ""
    assert before == text, difference(before, text, path.name)


def difference(before: str, after: str, name: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), name, "emitted now", n=1, lineterm="")
    return "\n".join(["see the head of this file", *lines])


def test_no_golden_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(GOLDENS)


@every_golden
@pytest.mark.parametrize("seed", range(2))
def test_kernel_is_right_by_its_own_reference(name, seed):
    file = imported(FOLDER / f"{name}.py")
    args = arguments(file, GOLDENS[name].sizes, seed)
    out, eager = file.launch(*args), file.reference(*args)
    verdict = compare(out, eager, run_float64(file.reference, args), eager.dtype)
    assert verdict.ok, f"{[tuple(t.shape) for t in args]}: {verdict.reason}"


@every_golden
def test_other_shapes_are_refused(name):
    file = imported(FOLDER / f"{name}.py")
    first, *rest = arguments(file, GOLDENS[name].sizes, 0)
    with pytest.raises(ValueError, match="expected .*got"):
        file.launch(first[..., :-1], *rest)
    with pytest.raises(ValueError, match="expected .*got"):
        file.launch(first.double(), *rest)


def imported(path: Path) -> ModuleType:
    """The golden alone: it needs no rewriter."""
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(file: ModuleType, sizes: dict[str, int], seed: int) -> list[torch.Tensor]:
    """Tensors of shapes and dtypes as `launch` documents them, at `sizes` or random ones, not all contiguous."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lines = re.findall(r"^ *(\w+): (\(.*\)), (torch\.\w+), any strides$", file.launch.__doc__, re.M)
    assert lines
    letters = sorted(set(re.findall(r"\b[A-Z]\w*\b", " ".join(shape for _, shape, _ in lines))))
    sizes = {letter: draw.randint(1, LARGEST.get(letter, 70)) for letter in letters} | sizes
    return [tensor(eval(shape, sizes), getattr(torch, dtype[6:])) for _, shape, dtype in lines]


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Some with their dimensions in the opposite order in memory."""
    if not dtype.is_floating_point:
        return torch.randint(3, shape, dtype=dtype)
    if torch.rand(()) < 0.5:
        return torch.randn(shape, dtype=dtype)
    return torch.randn(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
