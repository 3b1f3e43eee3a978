"""Captures a module (or function) as an FX graph of ATen calls, before any decomposition, with every size symbolic.

`torch.export` (non-strict) keeps `linear`, `softmax` and `scaled_dot_product_attention` whole, so the graph still
reads like the user's code. Sizes are `Dim.AUTO` under `backed_size_oblivious`, or a batch of 1 would be baked in.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import linecache
import re
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import sympy
import torch
import torch.fx.experimental._config as symbolic_config
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from rewriter.errors import Reason, RewriteError, Site
from rewriter.ir import Node, Param
from rewriter.state import nothing_remembered
from rewriter.trace.assumed import assumed, conditions_of
from rewriter.trace.attributes import watched, without_hooks
from rewriter.trace.caches import caches
from rewriter.trace.contexts import any_function, autocasts, masks_as_given, quiet
from rewriter.trace.idle import loosen_views, without_idle
from rewriter.trace.masks import mark_masks
from rewriter.trace.ones import Dimension, enlarge, loose
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import is_user_file, origin_of, user_site
from rewriter.trace.spelled import spelled

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
class TracedModule:
    """A graph with what is needed to print it as the module's forward again.

    `inputs` names the placeholder of each flattened argument (None for what is no tensor); `attributes` says which
    placeholders are the module's own, `constants` which forward makes from numbers; `out_spec` is that of (what forward
    returns, what it `assigned`); `touched` are the attributes that it read, `absent` those it asked for in vain;
    `packed` submodules that return something else than a tensor; `autocast` are the device types on which it casts by
    itself; `fixed` lists the input sizes that tracing turned into numbers, and the branches on sizes that it took; `conditions` are what must hold of the sizes for the graph to be the program. `loose` are
    input dimensions that were 1 in the example and share their size with others, of which the program still makes the
    same calls where they are 1.
    """

    module: Callable
    graph: fx.Graph
    args: tuple
    kwargs: dict[str, Any]
    inputs: tuple[str | None, ...]
    attributes: dict[str, Attribute]
    constants: dict[str, torch.Tensor]
    out_spec: pytree.TreeSpec
    assigned: tuple[str, ...]
    touched: frozenset[str]
    absent: tuple[str, ...]
    packed: frozenset[str]
    autocast: frozenset[str]
    fixed: tuple[Reason, ...]
    conditions: tuple[sympy.Expr, ...]
    loose: frozenset[Dimension]

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
    def sizes(self) -> tuple[Param, ...]:
        """The symbolic sizes of the inputs, in order."""
        extents = (e for name in self.inputs if name for e in shape_of(self.placeholders[name].meta["val"]))
        return tuple(dict.fromkeys(e for e in extents if isinstance(e, Param)))

    @property
    def example(self) -> dict[Param, int]:
        """What the symbolic sizes of the inputs were in the call that was traced."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        given = [(shape_of(self.placeholders[n].meta["val"]), leaf.shape) for n, leaf in zip(self.inputs, leaves) if n]
        sizes = [(e, size) for extents, shape in given for e, size in zip(extents, shape) if isinstance(e, Param)]
        return dict(sorted(sizes, key=lambda s: s[1]))  # of several the largest: others are broadcast

    @property
    def parameters(self) -> dict[str, str]:
        """The user's parameter for each placeholder that is an argument as it was passed."""
        return _parameters(self.module, self.args, self.kwargs, self.inputs)

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.graph.nodes if n.op == "placeholder"}


def _parameters(module: Callable, args: tuple, kwargs: dict, inputs: tuple[str | None, ...]) -> dict[str, str]:
    function = module.forward if isinstance(module, nn.Module) else module
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    by_leaf = {id(value): name for name, value in bound.items() if torch.is_tensor(value)}
    leaves = pytree.tree_leaves((args, kwargs))
    return {p: by_leaf[id(leaf)] for p, leaf in zip(inputs, leaves) if p and id(leaf) in by_leaf}


class _Function(nn.Module):
    """A plain function as a module without parameters."""

    def __init__(self, function: Callable):
        super().__init__()

        @functools.wraps(function)  # its parameters are asked for, and name the inputs
        def forward(*args, **kwargs):
            return function(*args, **kwargs)

        self.forward = forward


def capture(
    module: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    bound: Mapping[Dimension, Site | None] = MappingProxyType({}),
) -> TracedModule:
    """Traces with every size symbolic but those `bound`, which a kernel keeps whole: each with the line that wants it.

    Raises RewriteError (code FAILED) with the user's line where the program does not trace."""
    traced_as = module if isinstance(module, nn.Module) else _Function(module)
    args, kwargs = _apart(args, _in_order(traced_as, kwargs))
    traced_as = _with_every_parameter(traced_as, kwargs)
    remembered = nothing_remembered(module)
    with (
        remembered,
        masks_as_given(),
        without_hooks(traced_as),
        watched(traced_as, caches(traced_as, args, kwargs)) as state,
        autocasts() as autocast,
    ):
        try:
            enlarged = enlarge(traced_as, args, kwargs, bound)
        except Exception as error:  # tensors without sizes: nested ones
            raise _trace_error(error) from error
        program = _export(traced_as, enlarged.args, enlarged.kwargs, enlarged.kept.union(bound))
        graph, inputs = program.graph_module.graph, _inputs(program, args, kwargs)
        shared = enlarged.grown & _shared(graph, inputs)
        may_be_one = loose(traced_as, enlarged.args, enlarged.kwargs, shared)
    _drop_unread(graph)
    attributes, constants = _attributes(traced_as, program)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            node.meta["constant"] = constants[node.name]
    held = tensors_of(traced_as)
    given = {name: leaf for name, leaf in zip(inputs, pytree.tree_leaves((args, kwargs))) if name}
    given |= {name: held[a.path] for name, a in attributes.items() if not a.is_parameter and a.path in held}
    mark_masks(graph, given)
    _refuse_mutation(program)
    return TracedModule(
        module,
        graph,
        args,
        kwargs,
        inputs,
        attributes,
        constants,
        program.call_spec.out_spec,
        tuple(state.assigned),
        frozenset(state.touched),
        tuple(sorted(state.absent)),
        frozenset(state.packed),
        frozenset(autocast),
        assumed(graph, inputs, _parameters(module, args, kwargs, inputs), bound),
        conditions_of(graph),
        may_be_one,
    )


def _inputs(program, args: tuple, kwargs: dict) -> tuple[str | None, ...]:
    """The placeholder of each flattened argument that is a tensor."""
    names = program.graph_signature.user_inputs
    return tuple(n if torch.is_tensor(leaf) else None for n, leaf in zip(names, pytree.tree_leaves((args, kwargs))))


def _shared(graph: fx.Graph, inputs: tuple[str | None, ...]) -> frozenset[Dimension]:
    """Input dimensions of one symbolic size with others."""
    held = {n.name: n.meta.get("val") for n in graph.nodes if n.op == "placeholder"}
    by_size: dict[Node, list[Dimension]] = {}
    for k, name in enumerate(inputs):
        for d, extent in enumerate(shape_of(held[name]) if name else ()):
            by_size.setdefault(extent, []).append((k, d))
    return frozenset(d for size, dims in by_size.items() if isinstance(size, Param) and len(dims) > 1 for d in dims)


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
    held = {_identity(tensor): path for path, tensor in reversed(tensors_of(module).items())}
    lifted = {p: program.constants[path] for p, path in signature.inputs_to_lifted_tensor_constants.items()}
    attributes = {
        **{p: Attribute(path, True) for p, path in signature.inputs_to_parameters.items()},
        **{p: Attribute(path, False) for p, path in signature.inputs_to_buffers.items()},
        **{p: Attribute(held[_identity(t)], False) for p, t in lifted.items() if _identity(t) in held},
    }
    return attributes, {p: t for p, t in lifted.items() if _identity(t) not in held}


def _identity(tensor: torch.Tensor) -> Hashable:
    """The same for a parameter and what export has detached from it."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    data = tensor.data_ptr() if is_plain and tensor.device.type != "meta" else 0
    return (data, tensor.dtype, tensor.shape, tensor.stride()) if data else id(tensor)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a module holds, by path: `layers.0.weight`, `mask`, `tables[1]`; shared ones under each.

    Those of modules in its lists, which it does not register, are `kept[0].weight`.
    """
    out: dict[str, torch.Tensor] = {}
    parts = list(module.named_modules(remove_duplicate=False))
    known = {part for _, part in parts}
    for path, part in parts:  # which may grow
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items():
            leaves = pytree.tree_flatten_with_path(value)[0] if name not in MODULE_SLOTS else ()
            at = f"{path}.{name}".lstrip(".")
            out |= {at + pytree.keystr(keys): leaf for keys, leaf in leaves if torch.is_tensor(leaf)}
            for keys, hidden in leaves:
                if isinstance(hidden, nn.Module) and hidden not in known:
                    inside = hidden.named_modules(prefix=at + pytree.keystr(keys))
                    parts += [(p, m) for p, m in inside if m not in known]
                    known.update(hidden.modules())
    return out


def _drop_unread(graph: fx.Graph) -> None:
    """Without what nothing reads or what changes nothing, and without the notes on types that export adds for
    `.to(dtype)`: they are no readers. Views ask nothing of strides.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    without_idle(graph)
    loosen_views(graph)
    graph.eliminate_dead_code()


def _refuse_mutation(program) -> None:
    """Raises RewriteError at the line that changes a buffer or an argument."""
    signature = program.graph_signature
    mutated = signature.buffers_to_mutate | signature.user_inputs_to_mutate
    if not mutated:
        return
    made = {n.name: n for n in program.graph.nodes}
    origins = (origin_of(made[name]) for name in mutated)
    site = next((Site(o.file, o.line) for o in origins if o.file), None)
    raise RewriteError(f"forward changes {', '.join(mutated.values())} in place: it stays as it is", site=site)


def _export(module: nn.Module, args: tuple, kwargs: dict, static: frozenset[Dimension]):
    """Exports with every size symbolic that the program leaves free, in-place ops made functional, and what wraps
    parts of it (autocast, modes of gradients, vmap) written out.
    """
    try:
        program = _try_export(module, args, kwargs, static)
    except RewriteError:
        raise
    except Exception as error:
        program = _export_piecewise(module, args, kwargs, static, error)
    program = _plain(program) if any(_is_inplace(n) or _wraps(n) for n in program.graph.nodes) else program
    _count_users(program.graph)
    return program


def _count_users(graph: fx.Graph) -> None:
    """Every node that reads another is among its users: export forgets some where the program returns what it reads
    as well.
    """
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users.setdefault(node)


def _plain(program):
    try:
        with _tracing():
            return program.run_decompositions({})
    except Exception as error:
        raise _trace_error(error) from error


def _wraps(node: fx.Node) -> bool:
    """A call that holds or marks a part of the program; of those that choose or repeat one, like `cond`, there is no
    other form.
    """
    holds = isinstance(node.target, HigherOrderOperator) and node.target.name().startswith("wrap")
    return holds or getattr(node.target, "__module__", "").startswith("torch._functorch")


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
    with _tracing(), spelled(module), _every_frame():
        return torch.export.export(module, args, kwargs, dynamic_shapes=named, strict=False)


@contextmanager
def _tracing() -> Iterator[None]:
    """Sizes are never assumed to be what they are in the example, where torch can do without; nothing is printed.

    Choosing among the kernels of `scaled_dot_product_attention` would ask for sizes: it is kept whole anyway.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        symbolic_config.patch(backed_size_oblivious=True),
        torch.no_grad(),
        any_function(),
        quiet(),
    ):
        yield


@contextmanager
def _every_frame() -> Iterator[None]:
    """A node remembers all of the user's frames, not those of functions called `forward` alone."""

    def users(tracer: Any, stack: traceback.StackSummary) -> traceback.StackSummary:
        start = max(k for k, f in enumerate(stack) if (f.filename, f.name) == (__file__, _try_export.__name__))
        inside = (f for f in stack[start:] if f.filename != __file__)
        return traceback.StackSummary.from_list(f for f in inside if f.name == "forward" or is_user_file(f.filename))

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


def _trace_error(error: Exception) -> RewriteError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    site = user_site(error)
    if unknown := re.match(r"Found <class '(?:.*\.)?(\w+)'> in output", str(error)):
        return RewriteError(f"forward returns a {unknown[1]}, which no graph holds: it stays as it is", site=site)
    if "data-dependent" in str(error):
        code = linecache.getline(site.file, site.line).strip() if site else ""
        shown = f": `{code}`" if code else ""
        return RewriteError(
            f"a branch or a size that depends on the values of a tensor cannot be traced{shown}", site=site
        )
    return RewriteError(f"torch.export cannot trace this: {lines[0] if lines else type(error).__name__}", site=site)
