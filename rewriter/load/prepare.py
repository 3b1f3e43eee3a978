"""Making the model ready: inference mode, the dtype asked for, and one run to see that it works."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_iter, tree_map

from rewriter.errors import Reason, RewriteError
from rewriter.load.build import Call
from rewriter.load.running import blaming, said
from rewriter.load.source import Source
from rewriter.load.weight import too_large

Model = nn.Module | Callable[..., Any]

NOT_RUN = "not run at this dtype"  # how the note begins where PyTorch lacks a kernel for it here


def for_inference(source: Source, model: Model, line: int) -> list[Reason]:
    """Call `eval()` unless the file did; the note says so where that changes what it computes."""
    if not isinstance(model, nn.Module) or not model.training:
        return []
    changes = _reads_training(source.tree) or any(map(_acts_in_training, model.modules()))
    with blaming(source, "eval()", line):
        model.eval()
    text = "rewritten for inference: eval() was called, so dropout and batch statistics are off"
    return [Reason(text, source.site(line))] if changes else []


def _acts_in_training(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    return isinstance(module, (_NormBase, _DropoutNd))


def _reads_training(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "training" for node in ast.walk(tree))


def cast(model: Model, call: Call, dtype: torch.dtype | None) -> Call:
    """Cast floating parameters and buffers in place, and return the inputs cast."""
    if dtype is None:
        return call
    if isinstance(model, nn.Module):
        # Not Module.to: that drops the imaginary part of complex buffers (rotary tables).
        model._apply(lambda tensor: _cast_tensor(tensor, dtype))  # type: ignore[no-untyped-call]
    done: dict[int, torch.Tensor] = {}  # one tensor passed twice stays one tensor

    def cast_input(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return done.setdefault(id(value), _cast_tensor(value, dtype))

    args, kwargs = tree_map(cast_input, call)
    return args, kwargs


def _cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    if is_lazy(tensor) or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return tensor.to(dtype)
    # A mask's finite fill (finfo.min) stays finite: -inf would make NaN of rows masked throughout.
    limit = torch.finfo(dtype).max
    return torch.where(tensor.isfinite(), tensor.clamp(-limit, limit), tensor).to(dtype)


def prove(source: Source, model: Model, call: Call, line: int, *, was_cast: bool) -> list[Reason]:
    """Run forward once, on copies: nothing of the model or its inputs changes. What this machine is too small for is
    not run, with a note.

    A kernel that this build of PyTorch lacks for the dtype asked for is a note, not a failure: the
    machine that will run the model may have it.

    Raises:
        RewriteError: with code BAD_INPUT and the user's line, where forward raises.
    """
    if _is_on_cpu(call) and (reason := too_large(model, call)):
        return [Reason(f"not run at these sizes: {reason}", source.site(line))]
    model, (args, kwargs) = _copied(model), tree_map(_cloned, call)
    try:
        with blaming(source, "forward", line), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    except RewriteError as error:
        cause = error.__cause__
        if not (was_cast and cause and "not implemented for" in str(cause)):
            raise
        return [Reason(f"{NOT_RUN}, which PyTorch lacks here: {said(cause)}", error.reason.site)]
    return []


def _is_on_cpu(call: Call) -> bool:
    return all(t.device.type == "cpu" for t in tree_iter(call) if isinstance(t, torch.Tensor))


def _copied(model: Model) -> Model:
    if not isinstance(model, nn.Module) or any(map(is_lazy, model.parameters())):
        return model  # a lazy module gets its shapes from this run
    try:
        return copy.deepcopy(model)
    except Exception:  # locks, open files, tensors with a history: run the model itself
        return model


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
