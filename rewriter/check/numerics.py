"""How far a result is from the truth, and how far it may be: twice as far as the eager program.

The truth is a float64 run of the user's own program.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

MARGIN = 2.0
"""How many times the eager program's own error a rewritten program may make."""

ERROR_FLOOR = {torch.float32: 2e-6, torch.float64: 1e-13}
"""Relative error allowed in any case, by dtype: eager is now and then right by luck."""

_NARROWER = (torch.float32, torch.float16, torch.bfloat16)
_TO_NARROWER = (Tensor.float, Tensor.half, Tensor.bfloat16)
_MODULE_SLOTS = frozenset(nn.Module().__dict__)  # parameters, buffers, hooks: not the user's own


@dataclass(frozen=True)
class OutputCheck:
    """The verdict on one output.

    Attributes:
        error: ‖out − ref64‖ / ‖ref64‖; NaN where shape or dtype left nothing to compare.
        eager_error: the same of the eager program's output.
        bound: what `error` may be at most.
        ok: within the bound, and NaN and inf only where they belong.
        reason: one line; empty where ok.
    """

    error: float
    eager_error: float
    bound: float
    ok: bool
    reason: str = ""


def relative_error(out: Tensor, ref64: Tensor) -> float:
    """‖out − ref64‖ / ‖ref64‖ in float64, over the positions where both are finite.

    Args:
        out: any dtype, shape of `ref64`, any device.
        ref64: the float64 reference.

    Returns:
        A number ≥ 0. The absolute error ‖out‖ where the reference is zero throughout; 0 where no
        position counts.
    """
    wide = _float64(out).to(ref64.device)
    ref64 = _float64(ref64)
    finite = torch.isfinite(wide) & torch.isfinite(ref64)
    wide, ref64 = wide[finite], ref64[finite]
    # Both are scaled, or squares of large numbers would overflow and those of small ones vanish.
    scale = ref64.abs().max().item() if ref64.numel() else 0.0
    if scale == 0.0:
        return torch.linalg.vector_norm(wide).item()
    norm = torch.linalg.vector_norm(ref64 / scale)
    return (torch.linalg.vector_norm((wide - ref64) / scale) / norm).item()


def compare(out: object, eager: object, ref64: object, dtype: torch.dtype) -> OutputCheck:
    """Judge one output of the rewritten program beside eager's and the float64 run's.

    Floating outputs: the error is at most MARGIN times eager's, or ERROR_FLOOR[dtype] where that is
    more; each position is NaN, inf, -inf or finite as it is in eager or in the float64 run (which
    differ where eager overflows). Integer and boolean outputs equal eager's; or, as they may hang on how scores are
    rounded (the nearest code), at most MARGIN times as many as of eager's differ from the float64 run's. What is no
    tensor equals eager's.

    Args:
        out, eager: outputs of the same inputs at `dtype`; shape and dtype must be the same.
        ref64: the output of `run_float64`.
        dtype: what the programs ran at, which may not be the output's dtype.
    """
    if not isinstance(out, Tensor) or not isinstance(eager, Tensor):
        return _compare_values(out, eager)
    if reason := _mismatch(out, eager, ref64):
        return OutputCheck(math.nan, math.nan, math.nan, False, reason)
    if not (eager.is_floating_point() or eager.is_complex()):
        return _compare_exactly(out, eager, ref64)
    return _compare_floats(out, eager, ref64, dtype)


def _compare_values(out: object, eager: object) -> OutputCheck:
    same = type(out) is type(eager) and out == eager
    reason = "" if same else f"is {_name(out)}, eager has {_name(eager)}"
    return OutputCheck(0.0 if same else math.nan, 0.0, 0.0, same, reason)


def _name(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _mismatch(out: Tensor, eager: Tensor, ref64: object) -> str:
    if out.shape != eager.shape:
        return f"shape {tuple(out.shape)}, eager has {tuple(eager.shape)}"
    if out.dtype != eager.dtype:
        return f"dtype {out.dtype}, eager has {eager.dtype}"
    if not isinstance(ref64, Tensor) or ref64.shape != eager.shape:
        return "the float64 run has no output of this shape"
    return ""


def _compare_exactly(out: Tensor, eager: Tensor, ref64: Tensor) -> OutputCheck:
    """Errors are the shares of values that differ from the float64 run's."""
    out, eager = (t.to(ref64.device) for t in (out, eager))
    error, eager_error = (_share(t != ref64) for t in (out, eager))
    bound = MARGIN * eager_error
    ok = error <= bound or torch.equal(out, eager)
    reason = "" if ok else f"{int((out != ref64).sum())} of {out.numel()} values differ"
    return OutputCheck(error, eager_error, bound, ok, reason)


def _share(where: Tensor) -> float:
    return where.double().mean().item() if where.numel() else 0.0


def _compare_floats(out: Tensor, eager: Tensor, ref64: Tensor, dtype: torch.dtype) -> OutputCheck:
    error, eager_error = relative_error(out, ref64), relative_error(eager, ref64)
    bound = max(MARGIN * eager_error, ERROR_FLOOR.get(dtype, 0.0))
    reason = _stray_non_finite(out, eager, ref64)
    if not reason and not error <= bound:
        reason = f"error {error:.2g}, more than {bound:.2g} (eager's own is {eager_error:.2g})"
    return OutputCheck(error, eager_error, bound, not reason, reason)


def _stray_non_finite(out: Tensor, eager: Tensor, ref64: Tensor) -> str:
    """Where `out` is NaN, inf, -inf or finite and neither eager nor the float64 run is so."""
    kind, eager_kind, ref_kind = (_kind(tensor).to(ref64.device) for tensor in (out, eager, ref64))
    stray = (kind != eager_kind) & (kind != ref_kind)
    if not stray.any():
        return ""
    first = tuple(stray.nonzero()[0].tolist())
    found, wanted = _KINDS[int(kind[first])], _KINDS[int(ref_kind[first])]
    return f"{int(stray.sum())} of {stray.numel()} values: {found} for {wanted}, first at {first}"


_KINDS = ("a finite value", "NaN", "inf", "-inf")


def _kind(tensor: Tensor) -> Tensor:
    """Index into _KINDS of each value, int8; a complex value goes by its magnitude."""
    tensor = tensor.abs() if tensor.is_complex() else tensor
    kind = torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device)
    kind[tensor.isnan()] = 1
    kind[tensor == math.inf] = 2
    kind[tensor == -math.inf] = 3
    return kind


def _float64(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def run_float64(
    module_or_fn: nn.Module | Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
) -> object:
    """Run the program in float64: the reference that others are measured against.

    A module is copied, and its parameters, buffers and plain tensor attributes made float64, as are
    floating inputs and tensors from elsewhere (a file's own `BIAS = torch.randn(...)`); none of them
    is changed. Code that asks for a narrower dtype gets it (`x.float()`), unless the two then do not
    go together (`x.float() @ self.weight`): such a program is run again with every float made float64.

    Returns:
        What the program returns, without gradients.

    Raises:
        Whatever the program raises.
    """
    try:
        return _run(module_or_fn, args, kwargs or {}, _OthersWide())
    except RuntimeError:  # what torch says of dtypes that do not match is worded in many ways
        return _run(module_or_fn, args, kwargs or {}, _EveryFloatWide())


def _run(
    program: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], mode: TorchFunctionMode
) -> object:
    program = _widened(program) if isinstance(program, nn.Module) else program
    args, kwargs = tree_map_only(Tensor, _wide_copy, (tuple(args), dict(kwargs)))
    with torch.no_grad(), _default_float64(), mode:
        return program(*args, **kwargs)


def _widened(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module).double()
    for part in module.modules():
        for name in part.__dict__.keys() - _MODULE_SLOTS:
            if any(map(_is_narrow, tree_leaves(part.__dict__[name]))):
                part.__dict__[name] = tree_map(_wide, part.__dict__[name])
    return module


def _is_narrow(value: object) -> bool:
    dtype = value.dtype if isinstance(value, Tensor) else value
    return isinstance(dtype, torch.dtype) and dtype in _NARROWER


def _wide(value: object) -> object:
    """A floating tensor as float64, a floating dtype as torch.float64, anything else as it is."""
    if not _is_narrow(value):
        return value
    return value.double() if isinstance(value, Tensor) else torch.float64


def _wide_copy(tensor: Tensor) -> Tensor:
    return _wide(tensor.detach().clone())


@contextmanager
def _default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _OthersWide(TorchFunctionMode):
    """Narrow tensors that the program did not make itself are float64."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, object] = {}
        self.wide: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, self._widened, (args, kwargs or {}))
        out = func(*args, **kwargs)
        self.made |= {id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and _is_narrow(leaf)}
        return out

    def _widened(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.made or not _is_narrow(tensor):
            return tensor
        return self.wide.setdefault(id(tensor), (tensor, _wide_copy(tensor)))[1]


class _EveryFloatWide(_OthersWide):
    """`x.float()` and `dtype=torch.float32` mean float64, too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func in _TO_NARROWER else func
        args, kwargs = tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)
