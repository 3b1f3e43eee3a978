"""The stages in order. Each turns one value into the next; this file is the architecture.

load → trace → lift → derive → plan → emit → patch → check → report
"""

from __future__ import annotations

import builtins
import hashlib
import inspect
import keyword
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import fx, nn

from rewriter.derive import Chain, NotDerivable, derive
from rewriter.emit import KernelFile, NotEmittable, Source, emit_kernel
from rewriter.emit.names import Names
from rewriter.emit.render import helper_names
from rewriter.errors import Reason, Site
from rewriter.ir import Axis, Tensor
from rewriter.ir.printer import show_output, show_program
from rewriter.lift import Region, Rows, lift, lift_rows
from rewriter.lift.alike import meaning_of
from rewriter.lift.region import LiftResult, site_of
from rewriter.patch import Patched, module_text, patch
from rewriter.plan import ChainPlan, NeedsFixed, NotPlannable, plan
from rewriter.plan.show import show_plan
from rewriter.trace import Dimension, TracedModule, capture


@dataclass(frozen=True)
class Fused:
    """One chain on its way through the stages. `reads` are its tensors, in an order that equal chains share."""

    region: Region
    chain: Chain
    reads: tuple[Tensor, ...] = ()
    plan: ChainPlan | None = None
    kernel: KernelFile | None = None

    def for_region(self, region: Region, reads: tuple[Tensor, ...]) -> Fused:
        """The same for a region of the same meaning."""
        own = {tensor.name: its for tensor, its in zip(self.reads, reads)}  # planning may see it in another shape
        kernel = self.kernel and replace(self.kernel, tensors=tuple(own[t.name] for t in self.kernel.tensors))
        return replace(self, region=region, reads=reads, kernel=kernel)


@dataclass(frozen=True)
class Rewritten:
    """A module rewritten: texts by relative name, and what there is to say."""

    traced: TracedModule
    fused: tuple[Fused, ...]
    patched: Patched | None
    unfused: tuple[Reason, ...]
    printed: dict[str, str] = field(default_factory=dict)
    refused_rows: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def kernels(self) -> list[KernelFile]:
        """One of each file."""
        return list({f.kernel.name: f.kernel for f in self.fused if f.kernel}.values())


@dataclass(frozen=True)
class Work:
    """What goes from pass to pass: the call that is rewritten and how, and what the passes so far have made of it.

    taken: names of kernels that are another module's. known: chains of other modules, whose kernels do for what means
    the same here. left: names of nodes that no chain takes into its epilogue. done: the pass that ran last. lone: rows
    that no chain has taken, where they are asked for. needed: sizes that must be fixed, each by the line of the chain
    that wants it.
    """

    module: Callable
    args: tuple
    kwargs: dict[str, Any]
    title: str = ""
    masked_rows: str = "match"
    rows: bool = False
    taken: frozenset[str] = frozenset()
    known: tuple[Fused, ...] = ()
    bound: Mapping[Dimension, Site | None] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    done: str = ""
    traced: TracedModule | None = None
    lifted: LiftResult | None = None
    lone: Rows = Rows((), {})
    fused: tuple[Fused, ...] = ()
    unfused: tuple[Reason, ...] = ()
    needed: Mapping[Dimension, Site | None] = field(default_factory=dict)
    patched: Patched | None = None
    printed: Mapping[str, str] = field(default_factory=dict)

    def says(self, **printed: str) -> Work:
        return replace(self, printed={**self.printed, **printed})

    def each(self, step: Callable[[Fused], Fused]) -> Work:
        """A pass over every chain."""
        unfused = list(self.unfused)
        fused = _each(self.fused, step, lambda f: f.region, unfused)
        return replace(self, fused=tuple(fused), unfused=tuple(unfused))

    @property
    def is_stuck(self) -> bool:
        """Whether there is nothing left to emit, or too little is known to."""
        return bool(self.needed.keys() - self.bound.keys()) or ("emit" in self.printed and not self.fused)

    @property
    def again(self) -> Work | None:
        """The beginning once more, where sizes have turned out to be needed."""
        if not self.needed.keys() - self.bound.keys():
            return None
        bound = {**self.needed, **self.bound}
        given = self.module, self.args, self.kwargs, self.title, self.masked_rows, self.rows
        return Work(*given, self.taken, self.known, bound, self.left)

    def without(self, following: Iterable[fx.Node]) -> Work:
        """As it was when it had been traced, with these nodes in no epilogue."""
        left = self.left.union(n.name for n in following)
        start = Work(self.module, self.args, self.kwargs)
        made = {name: getattr(start, name) for name in ("lifted", "lone", "fused", "unfused", "needed", "patched")}
        return replace(self, left=left, done="trace", **made)

    @property
    def rewritten(self) -> Rewritten:
        refused = _refused(self.lone, self.fused)
        return Rewritten(self.traced, self.fused, self.patched, self.unfused, dict(self.printed), refused)


def rewrite_module(module: Callable, args: tuple, kwargs: dict[str, Any], stop_after: str = "", **how) -> Rewritten:
    """One module, whatever its submodules are: trace → lift → derive → plan → emit → patch.

    how: as the fields of `Work`. What does not get through a stage is reported and stays eager. Raises RewriteError
    where the module does not trace, or its forward can't be written down.
    """
    return completed(Work(module, args, kwargs, **how), stop_after).rewritten


def completed(work: Work, stop_after: str = "", progress: Callable[[str], None] = lambda stage: None) -> Work:
    """The passes that are still to do.

    Planning finds which sizes a kernel keeps whole; where they are not fixed yet, tracing starts again with them bound.
    """
    work = through(work, stop_after, progress)
    while again := work.again:
        work = through(again, stop_after, progress)
    return work


def through(work: Work, last: str, progress: Callable[[str], None] = lambda stage: None) -> Work:
    """Once through the passes after the one that is done, to the one named or as far as there is something to do."""
    names = list(PASSES)
    for name in names[names.index(work.done) + 1 if work.done else 0 :]:
        if (last and work.done == last) or work.is_stuck:
            break
        progress(name)
        try:
            work = replace(PASSES[name](work), done=name)
        except _TakesTooMuch as chain:
            return through(work.without(chain.following), last, progress)
    return work


class _TakesTooMuch(Exception):
    """A chain fails with what its epilogue takes in, and may not without."""

    def __init__(self, following: frozenset[fx.Node]):
        super().__init__(f"{len(following)} nodes in an epilogue")
        self.following = following


def _trace(work: Work) -> Work:
    traced = capture(work.module, work.args, work.kwargs, work.bound)
    return replace(work, traced=traced).says(trace=str(traced.graph))


def _lift(work: Work) -> Work:
    lifted = lift(work.traced, work.left)
    return replace(work, lifted=lifted, unfused=tuple(lifted.unfused)).says(lift=_shown_programs(lifted.regions))


def _derive(work: Work) -> Work:
    """Chains, then the rows that they have left, where those are asked for."""
    unfused = list(work.unfused)
    found = _derived(work, work.lifted.regions, unfused)
    fused = [f for f in found if not f.region.tentative or f.chain.beats_dense]
    lone = _lone_rows(work.traced, fused, len(work.lifted.regions)) if work.rows else work.lone
    fused += _derived(work, lone.regions, unfused)
    work = replace(work, lone=lone, fused=tuple(fused), unfused=tuple(unfused))
    programs = _shown_programs((*work.lifted.regions, *lone.regions))
    return work.says(lift=programs, derive="\n\n".join(_show_chain(f.chain, {}) for f in fused))


def _plan(work: Work) -> Work:
    first = {kind: f for kind, f in _kinds(work.fused).items() if not f.plan}
    names = dict(zip(first, _kernel_names(work, list(first.values()))))
    needed = _undecided(work.lone, work.traced)
    plans = lru_cache(maxsize=None)(lambda kind: _planned(first[kind], names[kind], work.traced, needed))
    work = replace(work.each(lambda f: f if f.plan else replace(f, plan=plans(id(f.chain)))), needed=needed)
    if needed.keys() - work.bound.keys():
        return work
    kinds = list(_kinds(work.fused).values())
    letters = [Names(f.plan, f.region.display).axes for f in kinds]
    shown = (_show_chain(f.chain, named) for f, named in zip(kinds, letters))
    return work.says(
        derive="\n\n".join(shown), plan="\n\n".join(show_plan(f.plan, named) for f, named in zip(kinds, letters))
    )


def _emit(work: Work) -> Work:
    """A file for each chain. Where layers share it, each calls it with its own tensors."""
    source = _source(work.module, work.title)
    first = _kinds(work.fused)
    files = lru_cache(maxsize=None)(lambda kind: emit_kernel(first[kind].region, first[kind].plan, source))

    def step(f: Fused) -> Fused:
        return f if f.kernel else replace(first[id(f.chain)], kernel=files(id(f.chain))).for_region(f.region, f.reads)

    work = work.each(step)
    return work.says(emit="\n\n".join(f.kernel.text for f in _kinds(work.fused).values()))


def _patch(work: Work) -> Work:
    regions = tuple(f.region for f in work.fused)
    materialised = dict.fromkeys(reason for region in regions for reason in region.materialised)
    patched = patch(work.traced, regions, [f.kernel for f in work.fused], work.lifted.broadcast)
    title = _source(work.module, work.title).title
    work = replace(work, patched=patched, unfused=(*work.unfused, *materialised))
    return work.says(patch=module_text(title, [patched]))


PASSES: dict[str, Callable[[Work], Work]] = {
    "trace": _trace,
    "lift": _lift,
    "derive": _derive,
    "plan": _plan,
    "emit": _emit,
    "patch": _patch,
}


def _shown_programs(regions: Iterable[Region]) -> str:
    return "\n\n".join(show_program(r.program) for r in regions)


def _derived(work: Work, regions: Iterable[Region], unfused: list[Reason]) -> list[Fused]:
    """A chain for each region, the same one for regions of the same meaning."""
    first: dict[Hashable, Fused] = {meaning_of(f.region)[0]: f for f in work.known}

    def step(region: Region) -> Fused:
        meaning, tensors = meaning_of(region)
        if meaning not in first:
            chain = derive(region.program, work.masked_rows, lambda c: c.beats_dense or not region.tentative)
            first[meaning] = Fused(region, chain, tensors)
        return first[meaning].for_region(region, tensors)

    return _each(regions, step, lambda r: r, unfused)


def _kinds(fused: Iterable[Fused]) -> dict[int, Fused]:
    """The first that has each chain, by the chain's identity."""
    first: dict[int, Fused] = {}
    for f in fused:
        first.setdefault(id(f.chain), f)
    return first


def _lone_rows(traced: TracedModule, fused: list[Fused], first: int) -> Rows:
    """The lone rows of what no chain has taken, as regions numbered from `first`."""
    taken = frozenset().union(*({*f.region.inside, *f.region.outputs} for f in fused))
    return lift_rows(traced, taken, first)


def _undecided(lone: Rows, traced: TracedModule) -> dict[Dimension, Site | None]:
    """Dimensions whose sizes decide whether rows lie together, by the line of the rows."""
    return {d: site_of(node) for size, node in lone.undecided.items() for d in traced.dimensions_of(size)}


def _refused(lone: Rows, fused: list[Fused]) -> dict[fx.Node, str]:
    """Why nodes of lone rows are in no kernel; that of a later stage stands at the end of its rows."""
    kept = [f.region for f in fused]
    failed = [r for r in lone.regions if r not in kept]
    nodes = [n for r in failed for n in (*r.inside, *r.outputs)]
    return lone.refused | dict.fromkeys(nodes, "what it is computed with can't be fused")


def _each(items, step: Callable, region_of: Callable, unfused: list[Reason]) -> list:
    """Applies a stage to every chain; a chain that fails becomes a reason at its line."""
    out = []
    for item in items:
        try:
            out.append(step(item))
        except (NotDerivable, NotPlannable, NotEmittable) as reason:
            region = region_of(item)
            if region.tentative:
                continue
            if region.following and not isinstance(reason.__cause__, NeedsFixed):
                raise _TakesTooMuch(region.following) from reason
            unfused.append(Reason(str(reason), site_of(region.outputs[0])))
    return out


def _planned(item: Fused, name: str, traced: TracedModule, needed: dict[Dimension, Site | None]) -> ChainPlan:
    try:
        return plan(item.chain, name, traced.example)
    except NeedsFixed as sizes:
        if item.region.tentative:  # parameters have fixed the widths already: these are lengths
            raise NotPlannable(str(sizes)) from sizes
        dimensions = frozenset().union(*(traced.dimensions_of(s) for s in sizes.sizes))
        for dimension in dimensions:
            needed.setdefault(dimension, site_of(item.region.outputs[0]))
        raise NotPlannable(str(sizes)) from sizes


def _kernel_names(work: Work, fused: list[Fused]) -> list[str]:
    """The innermost module class around a chain, in snake case, numbered where it repeats."""
    names: list[str] = []
    module = work.module
    function = module.forward if isinstance(module, nn.Module) else module
    taken = set(inspect.signature(function).parameters)
    for item in fused:
        stack = item.region.outputs[0].meta.get("nn_module_stack") or {}
        owner = list(stack.values())[-1][1] if stack else type(module)
        text = owner if isinstance(owner, str) else owner.__name__
        text = text.split(".")[-1] if isinstance(module, nn.Module) else module.__name__
        base = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()
        base = re.sub(r"[^a-z0-9_]", "", base).strip("_") or "chain"  # torch names no op otherwise
        base = f"{base}_chain" if base in taken or not _is_free(base) else base
        name, k = base, 2
        while name in work.taken.union(names):
            name, k = f"{base}_{k}", k + 1
        names.append(name)
    return names


# What the emitted files call their own.
_OWN_NAMES = {
    "apply",
    "function",
    "functools",
    "hashlib",
    "inspect",
    "launch",
    "math",
    "operator",
    "reference",
    "rewritten",
    "self",
    "tl",
    "torch",
}
_OWN_NAMES |= {"forward_ad", "triton", "warnings"}
_OWN_NAMES |= {"dense", "has_tma", "json", "laid_out", "lies_in_rows", "lying", "milliseconds", "os", "prepared"}


def _is_free(name: str) -> bool:
    """Whether a kernel may have the name."""
    is_taken = name in _OWN_NAMES or name in helper_names() or keyword.iskeyword(name) or hasattr(builtins, name)
    return name.isidentifier() and not is_taken


def _show_chain(chain: Chain, letters: dict[Axis, str]) -> str:
    lines = [f"{d.show(letters)}    (sweep {d.sweep + 1})" for d in chain.definitions]
    return "\n".join([*lines, *(show_output(o, letters) for o in chain.outputs), *chain.derivation])


def _source(module: Callable, title: str) -> Source:
    target = type(module) if isinstance(module, nn.Module) else module
    try:
        text = inspect.getsource(target)
        first = inspect.getsourcelines(target)[1]
        file = Path(inspect.getsourcefile(target) or "").name
        where = f"{file}:{first}-{first + len(text.splitlines()) - 1}"
    except (OSError, TypeError):
        text, file, where = repr(target), "", target.__name__
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Source(
        title or f"`{target.__name__}` with its reduction chains fused.",
        where,
        digest,
        f"flashlight-rewrite {file}" if file else "rewriter.rewrite(...)",
    )


__all__ = ["Rewritten", "Work", "completed", "rewrite_module", "through"]
