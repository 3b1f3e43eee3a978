"""Captures a module (or function) as an FX graph of ATen calls, before any decomposition, with every size symbolic.

`torch.export` (non-strict) keeps `linear`, `softmax` and `scaled_dot_product_attention` whole, so the graph still reads like the
user's code. Sizes are `Dim.AUTO` under `backed_size_oblivious`, or a batch of 1 would be baked in.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import itertools
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable

import sympy
import torch
import torch.fx.experimental._config as symbolic_config
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from rewriter.errors import RewriteError, Site
from rewriter.ir import Const, Param
from rewriter.trace.effects import effects, unchanged
from rewriter.trace.ones import Dimension, enlarge
from rewriter.trace.sizes import decided, shape_of
from rewriter.trace.source import is_user_file, origin_of, user_site


MODULE_SLOTS = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: not the user's own


@dataclass(frozen=True)
class Attribute:
    """A parameter, buffer or other tensor of the traced module: `path` is what follows `self.`."""

    path: str
    is_parameter: bool

    @property
    def name(self) -> str:
        """`tables` of `layers.0.tables[1]`"""
        return self.path.split(".")[-1].partition("[")[0]


@dataclass(frozen=True)
class FixedSize:
    """A size of an input that is a number in the kernels, why, and the user's line that made it so where one did."""

    placeholder: str
    dimension: Dimension
    size: int
    why: str
    site: Site | None = None


@dataclass(frozen=True)
class TracedModule:
    """A graph with what is needed to print it as the module's forward again.

    `inputs` names the placeholder of each flattened argument (None for what is no tensor); `attributes` says which
    placeholders are the module's own, `constants` which forward makes from numbers; `fixed` lists the input sizes that tracing turned into numbers.
    """

    module: Callable
    graph: fx.Graph
    args: tuple
    kwargs: dict[str, Any]
    inputs: tuple[str | None, ...]
    attributes: dict[str, Attribute]
    constants: dict[str, torch.Tensor]
    out_spec: pytree.TreeSpec
    fixed: tuple[FixedSize, ...]
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

        @functools.wraps(function)  # its parameters are asked for, and name the inputs
        def forward(*args, **kwargs):
            return function(*args, **kwargs)

        self.forward = forward


def capture(
    module: Callable, args: tuple, kwargs: dict[str, Any], bound: frozenset[Dimension] = frozenset()
) -> TracedModule:
    """Traces with every size symbolic but those `bound`, which a kernel keeps whole.

    Raises RewriteError (code FAILED) with the user's line where the program does not trace."""
    traced_as = module if isinstance(module, nn.Module) else _Function(module)
    args, kwargs = _apart(args, _in_order(traced_as, kwargs))
    traced_as = _with_every_parameter(traced_as, kwargs)
    if kept := effects(traced_as, args, kwargs):
        raise RewriteError(f"forward sets {', '.join(f'self.{name}' for name in kept)}: it stays as it is")
    program = _export(traced_as, args, kwargs, bound)
    graph = program.graph_module.graph
    signature = program.graph_signature
    leaves, _ = pytree.tree_flatten((args, kwargs))
    user_inputs = list(signature.user_inputs)
    inputs = tuple(name if torch.is_tensor(leaf) else None for name, leaf in zip(user_inputs, leaves))
    attributes, constants = _attributes(traced_as, program)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            node.meta["constant"] = constants[node.name]
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
        _fixed_sizes(graph, inputs, leaves, bound),
        _conditions(graph),
    )


def _apart(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of which no two are one tensor, as in `attend(x, x, x)`: the tracer would take them for one input."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))


def _in_order(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the order of the parameters, as flattened arguments are told apart by their place."""
    order = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in (*order, *(n for n in kwargs if n not in order))}


def _with_every_parameter(module: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    """A module that has each keyword argument for a parameter: export does not tell them apart below `**kwargs`."""
    signature = inspect.signature(module.forward)
    named = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in named]
    if not extra:
        return module
    forward = module.forward

    @functools.wraps(forward)
    def explicit(*args, **kwargs):
        return forward(*args, **kwargs)

    explicit.__signature__ = signature.replace(parameters=[*named.values(), *extra])
    module = copy.copy(module)
    module.forward = explicit
    return module


def _attributes(module: nn.Module, program) -> tuple[dict[str, Attribute], dict[str, torch.Tensor]]:
    """By placeholder: the tensors that the module holds, and those that forward makes from numbers."""
    signature = program.graph_signature
    held = {id(tensor): path for path, tensor in reversed(tensors_of(module).items())}
    lifted = {p: program.constants[path] for p, path in signature.inputs_to_lifted_tensor_constants.items()}
    attributes = {
        **{p: Attribute(path, True) for p, path in signature.inputs_to_parameters.items()},
        **{p: Attribute(path, False) for p, path in signature.inputs_to_buffers.items()},
        **{p: Attribute(held[id(t)], False) for p, t in lifted.items() if id(t) in held},
    }
    return attributes, {p: t for p, t in lifted.items() if id(t) not in held}


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a module holds, by path: `layers.0.weight`, `mask`, `tables[1]`; shared ones under each."""
    out: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items():
            leaves = pytree.tree_flatten_with_path(value)[0] if name not in MODULE_SLOTS else ()
            at = f"{path}.{name}".lstrip(".")
            out |= {at + pytree.keystr(keys): leaf for keys, leaf in leaves if torch.is_tensor(leaf)}
    return out


def _refuse_mutation(signature) -> None:
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise RewriteError(f"forward changes {', '.join(mutated)} in place: it stays as it is")


def _export(module: nn.Module, args: tuple, kwargs: dict, bound: frozenset[Dimension]):
    """Exports with every size symbolic that the program leaves free, and in-place ops made functional."""
    try:
        grown_args, grown_kwargs, ones = enlarge(module, args, kwargs)
    except Exception as error:  # tensors without sizes: nested ones
        raise _trace_error(error) from error
    try:
        program = _try_export(module, grown_args, grown_kwargs, bound | ones)
    except Exception as error:
        program = _export_piecewise(module, grown_args, grown_kwargs, bound | ones, error)
    if any(_is_inplace(n) for n in program.graph.nodes):
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions({})
    return program


def _is_inplace(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


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

    named = _by_parameter(module, args, pytree.tree_map(dims, (args, kwargs)))
    with (
        symbolic_config.patch(backed_size_oblivious=True),
        warnings.catch_warnings(),
        torch.no_grad(),
        _quiet(),
    ):
        warnings.simplefilter("ignore")
        with _decided(), _every_frame(), unchanged(module):
            return torch.export.export(module, args, kwargs, dynamic_shapes=named, strict=False)


@contextmanager
def _decided() -> Iterator[None]:
    """`is_causal=length > 1` is a branch of the program: decided while tracing, and guarded as any other.

    The argument parser refuses a symbolic truth value before any tracing hook sees it, so the function itself is wrapped.
    """
    original = torch.nn.functional.scaled_dot_product_attention

    def decided(*args, is_causal=False, **kwargs):
        return original(*args, is_causal=bool(is_causal), **kwargs)

    torch.nn.functional.scaled_dot_product_attention = decided
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


@contextmanager
def _every_frame() -> Iterator[None]:
    """A node remembers all of the user's frames, not those of functions called `forward` alone."""

    def users(tracer: Any, stack: traceback.StackSummary) -> traceback.StackSummary:
        start = max(k for k, f in enumerate(stack) if (f.filename, f.name) == (__file__, _try_export.__name__))
        inside = (f for f in stack[start:] if f.filename != __file__)
        return traceback.StackSummary.from_list(
            f for f in inside if f.name == "forward" or is_user_file(f.filename)
        )

    original = fx.proxy.TracerBase._filter_traceback_frames
    fx.proxy.TracerBase._filter_traceback_frames = users
    try:
        yield
    finally:
        fx.proxy.TracerBase._filter_traceback_frames = original


def _by_parameter(module: nn.Module, args: tuple, specs: tuple):
    """`export` wants the shapes by parameter: of `*args` and `**kwargs` as one entry each."""
    positional, keywords = specs
    return dict(inspect.signature(module.forward).bind(*positional, **keywords).arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs each guard it finds and prints the graph it gave up on; that is not worth the user's attention."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _trace_error(error: Exception) -> RewriteError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return RewriteError(
        f"torch.export cannot trace this: {lines[0] if lines else type(error).__name__}",
        site=user_site(error),
    )


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


def _fixed_sizes(graph: fx.Graph, inputs, leaves, bound: frozenset[Dimension]) -> tuple[FixedSize, ...]:
    values = {n.name: n.meta.get("val") for n in graph.nodes if n.op == "placeholder"}
    lines = {
        int(g.rhs): site for g, site in _user_guards(graph) if isinstance(g, sympy.Eq) and g.rhs.is_Integer
    }
    out = []
    for k, name in enumerate(inputs):
        for d, size in enumerate(shape_of(values[name]) if name else ()):
            if isinstance(size, Const):
                if (k, d) in bound:
                    out.append(FixedSize(name, (k, d), size.value, "kept whole by a kernel"))
                    continue
                site = lines.get(size.value) or _first_meeting(graph, name)
                out.append(FixedSize(name, (k, d), size.value, "fixed by the program", site))
    return tuple(out)


def _first_meeting(graph: fx.Graph, placeholder: str) -> Site | None:
    """The line where an input first meets another tensor: what torch's own code found equal has no line of the user's."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.name == placeholder or any(n in reached for n in inputs):
            if len(inputs) > 1:
                origin = origin_of(node)
                return Site(origin.file, origin.line) if origin.file else None
            reached.add(node)
    return None


def _conditions(graph: fx.Graph) -> tuple[sympy.Expr, ...]:
    """What must hold of the sizes for the traced branches to be the right ones."""
    environment = _environment(graph)
    conditions = [environment.replace(g) for g, _ in _user_guards(graph)]
    for node in graph.nodes:
        for size in _symbols(node.meta.get("val")):
            conditions += [environment.replace(c) for c in decided(size)[1]]
    return tuple(dict.fromkeys(c for c in conditions if c.free_symbols))


def _symbols(value: Any) -> list[torch.SymInt]:
    return [s for s in value.shape if isinstance(s, torch.SymInt)] if torch.is_tensor(value) else []