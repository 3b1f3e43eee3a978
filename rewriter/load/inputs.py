"""Random inputs from `--input`, matched to the parameters of forward by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from rewriter.errors import Site
from rewriter.load.build import Call
from rewriter.load.running import said
from rewriter.load.source import bad_input
from rewriter.options import InputSpec

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}

_POSITIONAL = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def random_inputs(specs: tuple[InputSpec, ...], forward: Callable[..., Any], site: Site) -> Call:
    """Draw each input, the same in every run, and place it as forward's parameters want it.

    Raises:
        RewriteError: with code BAD_INPUT, at `site`, where the names are not forward's or an input
            can't be made.
    """
    parameters = inspect.signature(forward).parameters
    _verify_names([spec.name for spec in specs], parameters, site)
    generator = torch.Generator().manual_seed(0)
    values = {spec.name: _draw(spec, generator, site) for spec in specs}
    args = []
    for name, parameter in parameters.items():
        if name not in values or parameter.kind not in _POSITIONAL:
            break
        args.append(values.pop(name))
    return tuple(args), values


def _verify_names(names: list[str], parameters: Any, site: Site) -> None:
    named = [name for name, p in parameters.items() if p.kind not in _VARIADIC]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in names:
        if names.count(name) > 1:
            raise bad_input(f"--input gives {name} twice", site)
        if name not in named and not takes_any:
            near = difflib.get_close_matches(name, named, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(named) or 'none'}"
            raise bad_input(f"--input {name}: forward has no such parameter; {hint}", site)
    missing = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in names]
    if missing:
        raise bad_input(f"no --input for {', '.join(missing)}, which forward needs", site)


def _draw(spec: InputSpec, generator: torch.Generator, site: Site) -> torch.Tensor:
    dtype = TORCH_DTYPES[spec.dtype]
    try:
        if dtype == torch.bool:
            return _draw_mask(spec.shape, generator)
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator).to(dtype)
        bound = 2 if spec.bound is None else spec.bound
        return torch.randint(bound, spec.shape, generator=generator, dtype=dtype)
    except (RuntimeError, ValueError, OverflowError) as error:  # too large, or out of the dtype
        raise bad_input(f"--input {spec.name}: can't be made: {said(error)}", site) from error


def _draw_mask(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A fair coin each, but at least one True per row: rows of nothing are no example of use."""
    mask = torch.rand(shape, generator=generator) < 0.5
    if not shape:
        return mask | True
    kept = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
    return mask.scatter(-1, kept, True)
