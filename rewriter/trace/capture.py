"""Captures a module (or function) as an FX graph of ATen calls, before any decomposition, with every size symbolic.

`torch.export` (non-strict) keeps `linear`, `softmax` and `scaled_dot_product_attention` whole, so the graph still reads like the
user's code. Sizes are `Dim.AUTO` under `backed_size_oblivious`, or a batch of 1 would be baked in.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import operator
from dataclasses import dataclass
from typing import Any, Callable

import sympy
import torch
import torch.fx.experimental._config as symbolic_config
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim
from torch.utils import _pytree as pytree

from rewriter.errors import Reason, RewriteError, Site
from rewriter.ir import Param
from rewriter.trace.attributes import Attributes, watched
from rewriter.trace.contexts import autocasts, decided, quiet
from rewriter.trace.ones import Dimension, enlarge
from rewriter.trace.sizes import decided as decided_size
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import is_user_file, user_site


@dataclass(frozen=True)
class Attribute:
    """A parameter, buffer or other tensor of the traced module: `path` is what follows `self.`.

    A tensor that is not `registered` stays on its device when the module moves."""

    path: str
    is_registered: bool


@dataclass(frozen=True)
class TracedModule:
    """A graph with what is needed to print it as the module's forward again.

    `inputs` names the placeholder of each flattened argument (None for what is no tensor); `attributes` says which
    placeholders are the module's own; `fixed` lists the input sizes that tracing turned into numbers. `out_spec` is that of
    (what forward returns, what it assigned); `state` tells what it read and assigned, `autocast` the device types it autocasts on.
    """

    module: Callable
    graph: fx.Graph
    args: tuple
    kwargs: dict[str, Any]
    inputs: tuple[str | None, ...]
    attributes: dict[str, Attribute]
    out_spec: pytree.TreeSpec
    state: Attributes
    autocast: frozenset[str]
    fixed: tuple[Reason, ...]
    conditions: tuple[sympy.Expr, ...]

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
    def parameters(self) -> dict[str, str]:
        """The user's parameter for each placeholder that is an argument as it was passed."""
        function = self.module.forward if isinstance(self.module, nn.Module) else self.module
        bound = inspect.signature(function).bind(*self.args, **self.kwargs).arguments
        by_leaf = {id(value): name for name, value in bound.items() if torch.is_tensor(value)}
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return {p: by_leaf[id(leaf)] for p, leaf in zip(self.inputs, leaves) if p and id(leaf) in by_leaf}

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


def capture(
    module: Callable, args: tuple, kwargs: dict[str, Any], bound: frozenset[Dimension] = frozenset()
) -> TracedModule:
    """Traces with every size symbolic but those `bound`, which a kernel keeps whole.

    Raises RewriteError (code FAILED) with the user's line where the program does not trace."""
    traced_as = module if isinstance(module, nn.Module) else _Function(module)
    with watched(traced_as) as state, autocasts() as autocast:
        program = _export(traced_as, args, kwargs, bound)
    graph = program.graph_module.graph
    _drop_unread(graph)
    signature = program.graph_signature
    leaves, _ = pytree.tree_flatten((args, kwargs))
    user_inputs = list(signature.user_inputs)
    inputs = tuple(name if torch.is_tensor(leaf) else None for name, leaf in zip(user_inputs, leaves))
    attributes = {
        **{p: Attribute(path, True) for p, path in signature.inputs_to_parameters.items()},
        **{p: Attribute(path, True) for p, path in signature.inputs_to_buffers.items()},
    }
    for name, path in signature.inputs_to_lifted_tensor_constants.items():
        if _is_attribute(traced_as, path, program.constants[path]):
            attributes[name] = Attribute(path, False)
        else:
            next(n for n in graph.nodes if n.name == name).meta["constant"] = program.constants[path]
    _refuse_mutation(signature)
    return TracedModule(
        module,
        graph,
        args,
        kwargs,
        inputs,
        attributes,
        program.call_spec.out_spec,
        state,
        frozenset(autocast),
        _fixed_sizes(graph, inputs, leaves, bound),
        _conditions(graph),
    )


def _drop_unread(graph: fx.Graph) -> None:
    """Without what nothing reads, and without the notes on types that export adds for `.to(dtype)`: they are no readers."""
    for node in graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _is_attribute(module: nn.Module, path: str, value: torch.Tensor) -> bool:
    """Whether a constant of the graph is a tensor that the module holds; others are made in forward."""
    try:
        return operator.attrgetter(path)(module) is value
    except AttributeError:
        return False


def _refuse_mutation(signature) -> None:
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise RewriteError(f"forward changes {', '.join(mutated)} in place: it stays as it is")


def _export(module: nn.Module, args: tuple, kwargs: dict, bound: frozenset[Dimension]):
    """Exports with every size symbolic that the program leaves free, in-place ops made functional, and what wraps parts of it
    (autocast, modes of gradients, vmap) written out."""
    grown_args, grown_kwargs, ones = enlarge(module, args, kwargs)
    try:
        program = _try_export(module, grown_args, grown_kwargs, bound | ones)
    except RewriteError:
        raise
    except Exception as error:
        program = _export_piecewise(module, grown_args, grown_kwargs, bound | ones, error)
    if any(_is_inplace(n) or _wraps(n) for n in program.graph.nodes):
        program = _without_wrappers(program)
    return program


def _without_wrappers(program):
    try:
        with quiet():
            return program.run_decompositions({})
    except Exception as error:
        raise _trace_error(error) from error


def _is_inplace(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _wraps(node: fx.Node) -> bool:
    """A call that holds or marks a part of the program."""
    return isinstance(node.target, HigherOrderOperator) or getattr(node.target, "__module__", "").startswith("torch._functorch")


def _export_piecewise(module, args: tuple, kwargs: dict, bound: frozenset[Dimension], error: Exception):
    """Where a size cannot be symbolic (a branch on it that export does not take), the others still can: equal sizes are
    freed together, one after the other."""
    leaves = pytree.tree_leaves((args, kwargs))
    sizes: dict[int, set[Dimension]] = {}
    for k, leaf in enumerate(leaves):
        for d, n in enumerate(leaf.shape if torch.is_tensor(leaf) else ()):
            if (k, d) not in bound:
                sizes.setdefault(n, set()).add((k, d))
    static = bound.union(*sizes.values())
    try:
        program = _try_export(module, args, kwargs, static)
    except Exception:
        raise _trace_error(error) from error
    for group in sizes.values():
        try:
            program = _try_export(module, args, kwargs, static - group)
            static -= group
        except Exception:
            continue
    return program


def _try_export(module: nn.Module, args: tuple, kwargs: dict, static: frozenset[Dimension]):
    position = itertools.count()

    def dims(leaf: Any):
        k = next(position)
        if not torch.is_tensor(leaf):
            return None
        return {d: Dim.STATIC if (k, d) in static else Dim.AUTO for d in range(leaf.dim())}

    named = _by_parameter(module, pytree.tree_map(dims, (args, kwargs)))
    with symbolic_config.patch(backed_size_oblivious=True), torch.no_grad(), quiet(), decided():
        return torch.export.export(module, args, kwargs, dynamic_shapes=named, strict=False)


def _by_parameter(module: nn.Module, specs: tuple[tuple, dict]) -> dict[str, Any]:
    """`export` wants shapes by parameter, those of *args as one tuple."""
    positional, keywords = specs
    signature = module.forward.__signature__ = _without_keywords(inspect.signature(module.forward), keywords)
    return dict(signature.bind(*positional, **keywords).arguments)


def _without_keywords(signature: inspect.Signature, keywords: dict) -> inspect.Signature:
    """f(q, **kw) called with k and v  →  f(q, *, k, v), for which `export` takes shapes."""
    named = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in keywords if n not in named]
    return signature.replace(parameters=[*named.values(), *more])


def _trace_error(error: Exception) -> RewriteError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    site = user_site(error)
    if "data-dependent" in str(error):
        code = linecache.getline(site.file, site.line).strip() if site else ""
        shown = f": `{code}`" if code else ""
        return RewriteError(f"a branch or a size that depends on the values of a tensor cannot be traced{shown}", site=site)
    return RewriteError(f"torch.export cannot trace this: {lines[0] if lines else type(error).__name__}", site=site)


def _environment(graph: fx.Graph):
    """The tracer's record of guards, None for a program without symbolic sizes."""
    values = (n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    symbols = (s for v in values if torch.is_tensor(v) for s in v.shape if isinstance(s, torch.SymInt))
    first = next(symbols, None)
    return first.node.shape_env if first is not None else None


def _user_guards(graph: fx.Graph) -> list[tuple[sympy.Expr, Site]]:
    """Conditions on sizes that the user's own lines decided; torch's own are about speed, not meaning."""
    environment = _environment(graph)
    out = []
    for guard in environment.guards if environment else ():
        frame = guard.sloc.framework_loc
        file = getattr(frame, "filename", "<")
        if is_user_file(file) or file == __file__:
            out.append((guard.expr, Site(frame.filename, frame.lineno)))
    return out


def _fixed_sizes(graph: fx.Graph, inputs, leaves, bound: frozenset[Dimension]) -> tuple[Reason, ...]:
    """Sizes of inputs that are numbers in the kernels, with the user's line that made them so where one did."""
    values = {n.name: n.meta.get("val") for n in graph.nodes if n.op == "placeholder"}
    lines = {
        int(g.rhs): site for g, site in _user_guards(graph) if isinstance(g, sympy.Eq) and g.rhs.is_Integer
    }
    out = []
    for k, name in enumerate(inputs):
        for d, size in enumerate(values[name].shape if name else ()):
            if isinstance(size, int):
                why = "kept whole by a kernel" if (k, d) in bound else "fixed by the program"
                out.append(Reason(f"{name}.shape[{d}] = {size}, {why}", lines.get(size)))
    return tuple(out)


def _conditions(graph: fx.Graph) -> tuple[sympy.Expr, ...]:
    """What must hold of the sizes for the traced branches to be the right ones."""
    environment = _environment(graph)
    conditions = [environment.replace(g) for g, _ in _user_guards(graph)]
    for node in graph.nodes:
        for size in _symbols(node.meta.get("val")):
            conditions += [environment.replace(c) for c in decided_size(size)[1]]
    return tuple(dict.fromkeys(c for c in conditions if c.free_symbols))


def _symbols(value: Any) -> list[torch.SymInt]:
    return [s for s in value.shape if isinstance(s, torch.SymInt)] if torch.is_tensor(value) else []