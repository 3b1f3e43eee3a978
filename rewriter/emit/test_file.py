"""The pytest file of OUT: the user's program and its rewritten form, side by side, without the rewriter."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rewriter.emit.render import render
from rewriter.load import Loaded
from rewriter.load.inputs import TORCH_DTYPES
from rewriter.load.loaded import DICT, LIST, PAIR
from rewriter.load.prepare import NOT_RUN
from rewriter.load.target import INIT_INPUTS, INPUTS
from rewriter.options import FLOAT_INPUTS, InputSpec, Options

_INIT_CALL = f"user.{INIT_INPUTS}()"
_INPUTS_CALL = f"user.{INPUTS}()"
# A constructor's arguments, and forward's as a pair, from what the user's functions give.
_INIT = {"": "", LIST: f"*{_INIT_CALL}", DICT: f"**{_INIT_CALL}", PAIR: "*args, **kwargs"}
_INPUTS = {"": "", LIST: f"{_INPUTS_CALL}, {{}}", DICT: f"[], {_INPUTS_CALL}", PAIR: _INPUTS_CALL}


@dataclass(frozen=True)
class Draw:
    """One `--input`: a parameter of forward, and the torch call that makes its argument."""

    name: str
    code: str


def equivalence_test(loaded: Loaded, options: Options) -> str:
    """The text of `test_equivalence.py`, which passes as it stands in OUT."""
    args, kwargs = _draws(loaded, options)
    return render(
        "test_equivalence.py.jinja",
        file=loaded.file.name,
        path=_relative(loaded, options),
        package=loaded.package,
        target=loaded.class_name,
        is_module=isinstance(loaded.module, nn.Module),
        init_call=_INIT_CALL if loaded.init_form == PAIR else "",
        init=_INIT[loaded.init_form],
        inputs=_INPUTS[loaded.inputs_form],
        args=args,
        kwargs=kwargs,
        has_masks=any("coins(" in draw.code for draw in (*args, *kwargs)),
        dtype=str(TORCH_DTYPES[options.dtype]) if options.dtype else "",
        zero_rows=options.masked_rows == "zero",
        needs_gpu=_needs_gpu(loaded),
    )


def _relative(loaded: Loaded, options: Options) -> str:
    """From OUT to the user's file, through no link: `..` after a link leads elsewhere."""
    file = os.path.join(os.path.realpath(loaded.file.parent), loaded.file.name)
    return os.path.relpath(file, os.path.realpath(options.out_dir)).replace(os.sep, "/")


def _draws(loaded: Loaded, options: Options) -> tuple[list[Draw], list[Draw]]:
    """The `--input`s that forward takes by position, in its order, and those it takes by name."""
    if not options.inputs:
        return [], []
    specs = {spec.name: spec for spec in options.inputs}
    program = loaded.module.forward if isinstance(loaded.module, nn.Module) else loaded.module
    positional = list(inspect.signature(program).parameters)[: len(loaded.args)]
    args, kwargs = ([Draw(n, _drawn(specs[n])) for n in names] for names in (positional, loaded.kwargs))
    return args, kwargs


def _drawn(spec: InputSpec) -> str:
    """A torch call that draws what `load` would draw."""
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.dtype == "bool":
        return f"coins({spec.shape})" if spec.shape else "torch.tensor(True)"
    if spec.dtype in FLOAT_INPUTS:
        cast = "" if spec.dtype == "fp32" else f".to({dtype})"
        return f"torch.randn({spec.shape}){cast}"
    return f"torch.randint({spec.bound or 2}, {spec.shape}, dtype={dtype})"


def _needs_gpu(loaded: Loaded) -> str:
    """Why the test can't run without a GPU; empty where it can."""
    if any(note.text.startswith(NOT_RUN) for note in loaded.notes):
        return "PyTorch does not run this dtype on CPUs"
    state = [*loaded.module.parameters(), *loaded.module.buffers()] if isinstance(loaded.module, nn.Module) else []
    tensors = [t for t in tree_leaves((loaded.args, loaded.kwargs, state)) if isinstance(t, Tensor)]
    has_bfloat16 = any(t.dtype == torch.bfloat16 for t in tensors)
    return "Triton's interpreter is wrong for bf16 products" if has_bfloat16 else ""
