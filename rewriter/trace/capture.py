"""Captures a module (or function) as an FX graph of ATen calls, before any decomposition, with every size symbolic.

`torch.export` (non-strict) keeps `linear`, `softmax` and `scaled_dot_product_attention` whole, so the graph still reads like the
user's code. Sizes are `Dim.AUTO` under `backed_size_oblivious`, or a batch of 1 would be baked in.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.fx.experimental._config as symbolic_config
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from rewriter.errors import Reason, RewriteError, Site
from rewriter.ir import Param
from rewriter.lift.sizes import shape_of
from rewriter.trace.inplace import without_inplace
from rewriter.trace.source import user_site


@dataclass(frozen=True)
class Attribute:
    """A parameter, buffer or constant of the traced module: `path` is what follows `self.`."""

    path: str
    is_parameter: bool


@dataclass(frozen=True)
class TracedModule:
    """A graph with what is needed to print it as the module's forward again.

    `inputs` names the placeholder of each flattened argument (None for what is no tensor); `attributes` says which
    placeholders are the module's own; `fixed` lists the input sizes that tracing turned into numbers.
    """

    module: Callable
    graph: fx.Graph
    args: tuple
    kwargs: dict[str, Any]
    inputs: tuple[str | None, ...]
    attributes: dict[str, Attribute]
    constants: dict[str, torch.Tensor]
    out_spec: pytree.TreeSpec
    fixed: tuple[Reason, ...]
    bounds: dict[str, tuple[int, int | None]]

    def dimensions_of(self, size: Param) -> frozenset[Dimension]:
        """The input dimensions that have a symbolic size."""
        return frozenset(
            (k, d)
            for k, name in enumerate(self.inputs)
            if name
            for d, extent in enumerate(shape_of(self.placeholders[name].meta["val"]))
            if extent is size
        )

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.graph.nodes if n.op == "placeholder"}


class _Function(nn.Module):
    """A plain function as a module without parameters."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


Dimension = tuple[int, int]  # (which leaf of the arguments, which of its dimensions)


def capture(
    module: Callable, args: tuple, kwargs: dict[str, Any], bound: frozenset[Dimension] = frozenset()
) -> TracedModule:
    """Traces with every size symbolic but those `bound`, which a kernel keeps whole.

    Raises RewriteError (code FAILED) with the user's line where the program does not trace."""
    traced_as = module if isinstance(module, nn.Module) else _Function(module)
    program = _export(traced_as, args, kwargs, bound)
    graph = program.graph_module.graph
    without_inplace(graph)
    signature = program.graph_signature
    leaves, _ = pytree.tree_flatten((args, kwargs))
    user_inputs = list(signature.user_inputs)
    inputs = tuple(name if torch.is_tensor(leaf) else None for name, leaf in zip(user_inputs, leaves))
    attributes = {
        **{p: Attribute(path, True) for p, path in signature.inputs_to_parameters.items()},
        **{p: Attribute(path, False) for p, path in signature.inputs_to_buffers.items()},
        **{p: Attribute(path, False) for p, path in signature.inputs_to_lifted_tensor_constants.items()},
    }
    constants = {path: program.constants[path] for path in signature.inputs_to_lifted_tensor_constants.values()}
    _refuse_mutation(signature)
    return TracedModule(
        module,
        graph,
        args,
        kwargs,
        inputs,
        attributes,
        constants,
        program.call_spec.out_spec,
        _fixed_sizes(graph, inputs, leaves, module),
        _bounds(program),
    )


def _refuse_mutation(signature) -> None:
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise RewriteError(f"forward changes {', '.join(mutated)} in place: it stays as it is")


def _export(module: nn.Module, args: tuple, kwargs: dict, bound: frozenset[Dimension]):
    """Exports with as many sizes of 1 symbolic as the program allows; a size it broadcasts stays 1."""
    ones = [
        (k, d)
        for k, leaf in enumerate(pytree.tree_leaves((args, kwargs)))
        if torch.is_tensor(leaf)
        for d, size in enumerate(leaf.shape)
        if size == 1 and (k, d) not in bound
    ]
    try:
        return _try_export(module, args, kwargs, bound)
    except Exception as error:
        if not ones:
            raise _trace_error(error) from error
    static = bound | frozenset(ones)
    program = _traced_or_error(module, args, kwargs, static)
    for one in ones:
        try:
            program = _try_export(module, args, kwargs, static - {one})
            static -= {one}
        except Exception:
            continue
    return program


def _traced_or_error(module, args, kwargs, static):
    try:
        return _try_export(module, args, kwargs, static)
    except Exception as error:
        raise _trace_error(error) from error


def _try_export(module: nn.Module, args: tuple, kwargs: dict, static: frozenset[Dimension]):
    position = iter(range(1 << 30))

    def dims(leaf: Any):
        k = next(position)
        if not torch.is_tensor(leaf):
            return None
        return {d: Dim.STATIC if (k, d) in static else Dim.AUTO for d in range(leaf.dim())}

    specs = pytree.tree_map(dims, (args, kwargs))
    named = _by_parameter(module, args, specs)
    with symbolic_config.patch(backed_size_oblivious=True), warnings.catch_warnings(), torch.no_grad(), _quiet():
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, kwargs, dynamic_shapes=named, strict=False)


def _by_parameter(module: nn.Module, args: tuple, specs: tuple):
    """`export` wants the shapes of keyword arguments by name and of a function's *args as one entry."""
    positional, keywords = specs
    if isinstance(module, _Function):
        return {"args": positional, "kwargs": keywords} if keywords else {"args": positional}
    if not keywords:
        return positional
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, positional)), **keywords}


class _quiet:
    """torch.export logs each guard it finds; a failed attempt is not worth the user's attention."""

    def __enter__(self):
        self.level = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *_):
        logging.disable(self.level)


def _trace_error(error: Exception) -> RewriteError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return RewriteError(
        f"torch.export cannot trace this: {lines[0] if lines else type(error).__name__}",
        site=user_site(error),
    )


def _fixed_sizes(graph: fx.Graph, inputs, leaves, module) -> tuple[Reason, ...]:
    """Sizes of inputs that tracing fixed although they were free to vary."""
    values = {n.name: n.meta.get("val") for n in graph.nodes if n.op == "placeholder"}
    environment = next((s.node.shape_env for v in values.values() for s in _symbols(v)), None)
    causes = {}
    for guard in environment.guards if environment else ():
        site = _guard_site(guard)
        for symbol in guard.expr.free_symbols:
            if site:
                causes[symbol.name] = site
    out = []
    for name, leaf in zip(inputs, leaves):
        for d, size in enumerate(values[name].shape if name else ()):
            if isinstance(size, int) and leaf.dim() and not _is_feature(size, d, leaf):
                out.append(Reason(f"{name}.shape[{d}] is fixed to {size}", None))
    return tuple(out)


def _symbols(value: Any) -> list[torch.SymInt]:
    return [s for s in value.shape if isinstance(s, torch.SymInt)] if torch.is_tensor(value) else []


def _guard_site(guard) -> Site | None:
    frame = getattr(getattr(guard, "sloc", None), "maybe_user_loc", None)
    return Site(str(frame)) if frame else None


def _is_feature(size: int, dim: int, leaf: torch.Tensor) -> bool:
    return False


def _bounds(program) -> dict[str, tuple[int, int | None]]:
    """The range of each symbol that the program's own branches impose."""
    out = {}
    for symbol, limits in program.range_constraints.items():
        upper = int(limits.upper) if limits.upper.is_Integer and limits.upper < 2**60 else None
        out[str(symbol)] = (int(limits.lower) if limits.lower.is_Integer else 0, upper)
    return out
