"""Which modules of a model are rewritten: the smallest that hold a whole chain, alike ones once.

The model is traced as a whole, which tells where its chains are and which of their results anything reads. Each module
that holds one is then traced alone, as the model calls it. A model that does not trace as a whole gets what its parts
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rewriter.check.smaller import Call, other_sizes, short_sizes
from rewriter.emit import KernelFile
from rewriter.errors import Reason, RewriteError
from rewriter.load.weight import too_large, weighed
from rewriter.patch.forward import attribute_path
from rewriter.patch.state import own_tensors, parts_of, ties
from rewriter.pipeline import Fused, Rewritten, Work, completed, through
from rewriter.state import nothing_remembered, unchanged
from rewriter.trace.capture import tensors_of
from rewriter.trace.contexts import fake_tensors, quiet
from rewriter.trace.ones import enlarge
from rewriter.trace.record import ModuleCall, given_to_forward, record
from rewriter.trace.source import modules_of

TRACING = ("trace", "lift", "derive")
QUICK_WORK = 2e10  # operations of a run that is recorded: more take this machine seconds
RECORDED_LENGTH = 256  # of positions, where that is cut


@dataclass(frozen=True)
class Host:
    """A module with a new forward, and where the model holds those that are alike: "" is the model itself."""

    call: ModuleCall
    rewritten: Rewritten
    paths: tuple[str, ...]

    @property
    def shown(self) -> str:
        return self.rewritten.patched.name if self.rewritten.patched else type(self.call.module).__name__


@dataclass(frozen=True)
class RewrittenModel:
    """`hosts` have chains that are kernels now. `seen`: everything that was traced, where there may be more to say."""

    program: Callable
    hosts: tuple[Host, ...]
    seen: tuple[Rewritten, ...]
    unfused: tuple[Reason, ...]
    printed: dict[str, str]

    @property
    def kernels(self) -> list[KernelFile]:
        """One of each file."""
        return list({k.name: k for host in self.hosts for k in host.rewritten.kernels}.values())


def rewrite_model(
    program: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    title: str = "",
    masked_rows: str = "match",
    rows: bool = False,
    stop_after: str | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> RewrittenModel:
    """A module or function as its user has it. What does not get through a stage is reported and stays eager.

    rows: lone rows of what no chain has taken are lifted, too. Raises RewriteError where nothing of it traces.
    """
    whole = ModuleCall("", program, args, kwargs)
    search = _Search(whole, Work(program, args, kwargs, title, masked_rows, rows), stop_after or "", progress)
    return search.result(search.hosts_in(whole))


@dataclass
class _Search:
    """Goes from the model to its modules. `done`: calls that were rewritten, or could not be (None). `parts`: what was
    found in modules of a model that does not trace as a whole.
    """

    whole: ModuleCall
    work: Work
    stop_after: str
    progress: Callable[[str], None]
    done: list[tuple[ModuleCall, Work | None]] = field(default_factory=list)
    parts: list[tuple[ModuleCall, Work, list[Host]]] = field(default_factory=list)
    seen: list[Work] = field(default_factory=list)
    said: list[Reason] = field(default_factory=list)

    @cached_property
    def calls(self) -> dict[str, tuple[ModuleCall, ...]]:
        """Those of submodules, by path; of `nn.Linear` and its like its callers are rewritten."""
        module, given = self.whole.module, (self.whole.args, self.whole.kwargs)
        if not isinstance(module, nn.Module):
            return {}
        if not (given := _affordable(module, given)):
            return {}
        runs = _runs_without_data if _runs_without_data(module, given) else _runs
        elsewhere = other_sizes(given, lambda call: runs(module, call))
        with unchanged(module), nothing_remembered(module):
            enlarged = enlarge(module, *given)
        larger = (enlarged.args, enlarged.kwargs)
        larger = larger if enlarged.grown and not _too_large(module, larger) else None
        found = record(module, *given, elsewhere, larger)
        return {path: calls for path, calls in found.items() if not _is_plain_layer(calls[0].module)}

    def hosts_in(self, call: ModuleCall) -> list[Host]:
        """What is rewritten of a module: parts of it, or itself. Raises RewriteError where nothing traces."""
        stop = self.stop_after if self.stop_after in TRACING else "derive"
        try:
            found = through(self._begun(call), stop, self.progress)
        except RewriteError as error:
            hosts = self._hosts_below(call)
            if not hosts:
                raise
            self.said.append(Reason(f"{error.reason.text}: only parts of it are rewritten", error.reason.site))
            return hosts
        if self.stop_after in TRACING:
            self.seen.append(found)
            return []
        hosts = self._hosts_of(call, found)
        self.parts.append((call, found, hosts))
        return hosts

    def _hosts_of(self, call: ModuleCall, found: Work) -> list[Host]:
        """Of a module that traces."""
        if inner := self._inside(call, found, same_results=True):
            self.seen.append(found)
            return inner
        try:
            whole = completed(found, self.stop_after, self.progress)
        except RewriteError:
            if inner := self._inside(call, found, same_results=False):
                self.seen.append(found)
                return inner
            raise
        self.seen.append(whole)
        return [Host(call, whole.rewritten, (call.path,))]

    def _hosts_below(self, call: ModuleCall) -> list[Host]:
        """Those of what the module calls, as far as they trace."""
        hosts: list[Host] = []
        for path in self._called_by(call.path):
            for part in self.calls[path]:
                try:
                    found = self._known(part)
                    hosts += self.hosts_in(part) if found is None else found
                except RewriteError:
                    continue
        return _merged(h for h in hosts if h.rewritten.patched)

    def _known(self, call: ModuleCall) -> list[Host] | None:
        """What was found in a module that is alike, where this one has it."""
        for other, found, hosts in self.parts:
            if self._is_alike(call, other, found):
                return [replace(h, paths=tuple(call.path + p[len(other.path) :] for p in h.paths)) for h in hosts]
        return None

    def _called_by(self, path: str) -> list[str]:
        """Paths of the modules that a module's forward calls."""
        below = [p for p in self.calls if _is_in(p, path)]
        return [p for p in below if not any(_is_in(p, other) for other in below)]

    def _inside(self, call: ModuleCall, found: Work, same_results: bool) -> list[Host]:
        """Parts that hold every chain which the whole has; none where one of them is the module itself, or does not do.

        same_results: a part is too small if alone it has results of a chain that nothing in the whole reads.
        """
        held = self._holders(call, found.fused)
        if call.path in held:
            return []
        hosts: list[Host] = []
        for path, fused in held.items():
            outputs = max(len(_results(f)) for f in fused) if same_results else None
            ways = (self._at(p, outputs) for p in _upwards(path, call.path) if p in self.calls)
            smallest = next((way for way in ways if way), [])
            if not smallest:
                return []
            hosts += smallest
        return _merged(hosts)

    def _holders(self, call: ModuleCall, fused: Iterable[Fused]) -> dict[str, list[Fused]]:
        """Chains by the module that holds them and is called: of modules in one another, by the outer."""
        where = [(f, _holder(f, call.path)) for f in fused]
        where = [(f, next((p for p in _upwards(path, call.path) if p in self.calls), call.path)) for f, path in where]
        paths = {path for _, path in where}
        out: dict[str, list[Fused]] = {}
        for f, path in where:
            outer = min((p for p in paths if path == p or _is_in(path, p)), key=len)
            out.setdefault(outer, []).append(f)
        return out

    def _at(self, path: str, outputs: int | None) -> list[Host]:
        """A host for each form of call of the module at a path, where each has chains, of at most so many outputs."""
        works = [(call, self._rewritten(call, outputs)) for call in self.calls[path]]
        if not all(work or call.likely for call, work in works):
            return []
        return [Host(call, work.rewritten, (path,)) for call, work in works if work]

    def _rewritten(self, call: ModuleCall, outputs: int | None) -> Work | None:
        """None where it can't be, or its chains have more outputs."""
        place = next((k for k, (other, work) in enumerate(self.done) if self._is_alike(call, other, work)), None)
        if place is None:
            place = len(self.done)
            self.done.append((call, self._or_none(lambda: through(self._begun(call), "derive", self.progress))))
        call, work = self.done[place]
        if not work or not work.fused or (outputs and max(len(_results(f)) for f in work.fused) > outputs):
            return None
        if work.done == "derive":  # kernels get their names only now
            begun = replace(work, taken=self._taken, known=self._kernels)
            work = self._or_none(lambda: completed(begun, "", self.progress))
            self.done[place] = call, work
        return work if work and work.patched else None

    def _or_none(self, step: Callable[[], Work]) -> Work | None:
        try:
            return step()
        except RewriteError:
            return None

    def _begun(self, call: ModuleCall) -> Work:
        args, kwargs = given_to_forward(call) if call is self.whole else (call.args, call.kwargs)
        given = {"module": call.module, "args": args, "kwargs": kwargs}
        return replace(self.work, **given, taken=self._taken, known=self._kernels)

    @property
    def _kernels(self) -> tuple[Fused, ...]:
        """Everything that has been emitted."""
        works = [*self.seen, *(work for _, work in self.done if work)]
        return tuple(f for work in works for f in work.fused if f.kernel)

    @property
    def _taken(self) -> frozenset[str]:
        return frozenset(f.kernel.name for f in self._kernels)

    def _is_alike(self, call: ModuleCall, other: ModuleCall, work: Work | None) -> bool:
        """Whether what was made of one call does for another: all that a new forward assumes of its module is the same."""
        if type(call.module) is not type(other.module) or call.form != other.form:
            return False
        if any("forward" in vars(m) for m in call.module.modules()):  # what that does is written nowhere
            return call.module is other.module
        if work is None:
            return _tensors(call.module) == _tensors(other.module)
        if call.module is other.module:
            return True
        assumed = _assumed(other.module, work)
        if assumed is None or _assumed(call.module, work) != assumed:
            return False
        return not work.traced.constants or self._has_constants_of(call, work)

    def _has_constants_of(self, call: ModuleCall, work: Work) -> bool:
        """Whether the numbers that are written into a forward are the module's as well: an object of its may hold them."""
        found = self._or_none(lambda: through(self._begun(call), "trace"))
        if found is None or found.traced.constants.keys() != work.traced.constants.keys():
            return False
        return all(torch.equal(t, found.traced.constants[n]) for n, t in work.traced.constants.items())

    def result(self, hosts: list[Host]) -> RewrittenModel:
        """Without hosts whose every place is inside another's."""
        everywhere = [path for host in hosts for path in host.paths]
        inner = [h for h in hosts if all(any(_is_in(p, other) for other in everywhere) for p in h.paths)]
        kept = tuple(h for h in hosts if h.rewritten.patched and h not in inner)
        works = [*(w.rewritten for w in self.seen), *(h.rewritten for h in kept)]
        unfused = dict.fromkeys([*self.said, *(r for work in works for r in work.unfused)])
        printed = _joined(hosts) if hosts else dict(self.seen[-1].printed) if self.seen else {}
        return RewrittenModel(self.whole.module, kept, tuple(w.rewritten for w in self.seen), tuple(unfused), printed)


def _assumed(module: nn.Module, work: Work) -> tuple | None:
    """What the forward that was made of a work would assume of this module; None where it lacks something."""
    traced = replace(work.traced, module=module)
    held = _tensors(module)
    try:
        parts = parts_of(traced, work.patched.called if work.patched else ())
        return parts, [held[t.text] for t in own_tensors(traced)], ties(traced)
    except (AttributeError, KeyError):
        return None


def _tensors(module: nn.Module) -> dict[str, tuple]:
    return {attribute_path(path): (t.dtype, tuple(t.shape)) for path, t in tensors_of(module).items()}


def _is_in(path: str, outer: str) -> bool:
    """`layers.0.attn` is in `layers.0`, and everything but itself in ""."""
    return path != outer and path.startswith(f"{outer}." if outer else "")


def _joined(hosts: Iterable[Host]) -> dict[str, str]:
    """What the stages print, under the names of the modules where there are several."""
    hosts = list(hosts)
    stages = dict.fromkeys(stage for h in hosts for stage in h.rewritten.printed)

    def text(host: Host, stage: str) -> str:
        said = host.rewritten.printed.get(stage, "")
        return f"## {host.shown}: {', '.join(host.paths)}\n{said}" if any(host.paths) else said

    return {stage: "\n\n".join(text(h, stage) for h in hosts) for stage in stages}


def _affordable(module: nn.Module, call: Call) -> Call | None:
    """A call, or a shorter one where this machine would take long for it; None where that does not do either."""
    if _is_on_cpu(call) and weighed(module, call).work > QUICK_WORK:
        call = short_sizes(call, lambda short: _runs_without_data(module, short), RECORDED_LENGTH) or call
    if not _too_large(module, call):
        return call
    return short_sizes(call, lambda short: _runs_without_data(module, short) and not _too_large(module, short))


def _too_large(module: nn.Module, call: Call) -> bool:
    return _is_on_cpu(call) and bool(too_large(module, call))


def _is_on_cpu(call: Call) -> bool:
    return all(t.device.type == "cpu" for t in pytree.tree_leaves(call) if torch.is_tensor(t))


def _runs_without_data(module: nn.Module, call: Call) -> bool:
    with fake_tensors() as mode:
        return _runs(module, pytree.tree_map_only(torch.Tensor, mode.from_tensor, call))


def _runs(module: nn.Module, call: Call) -> bool:
    try:
        with torch.no_grad(), unchanged(module), nothing_remembered(module), quiet():
            module(*call[0], **call[1])
    except Exception:
        return False
    return True


def _is_plain_layer(module: nn.Module) -> bool:
    """`nn.Linear` and its like: torch's, and nothing in it."""
    return type(module).__module__.startswith("torch.") and not list(module.children())


def _holder(fused: Fused, root: str) -> str:
    """The path of the innermost module in which all of a chain's reductions and results are, whatever follows them."""
    nodes = fused.region.reducing.union(_results(fused))
    paths = [modules_of(n) for n in nodes]
    shared = paths[0] if paths else []
    for path in paths[1:]:
        same = (k for k, (a, b) in enumerate(zip(shared, path)) if a != b)
        shared = shared[: next(same, min(len(shared), len(path)))]
    inner = shared[-1] if shared else ""
    return ".".join(filter(None, (root, inner)))


def _results(fused: Fused) -> frozenset[fx.Node]:
    """What a chain would write by itself."""
    return fused.region.results or frozenset(fused.region.outputs)


def _upwards(path: str, root: str) -> list[str]:
    """`layers.0.attn`, `layers.0`, `layers`: below the root."""
    parts = path.split(".")
    paths = [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
    return [p for p in paths if _is_in(p, root)]


def _merged(hosts: Iterable[Host]) -> list[Host]:
    """One host for all places that share what was rewritten."""
    out: dict[int, Host] = {}
    for host in hosts:
        key = id(host.rewritten.traced)
        known = out.get(key)
        paths = dict.fromkeys((*(known.paths if known else ()), *host.paths))
        out[key] = replace(known or host, paths=tuple(paths))
    return list(out.values())
