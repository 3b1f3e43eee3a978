"""The stages in order. Each turns one value into the next; this file is the architecture.

    load → trace → lift → derive → plan → emit → patch → check → report
"""

from __future__ import annotations

import hashlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from torch import nn

from rewriter.derive import Chain, NotDerivable, derive
from rewriter.emit import KernelFile, NotEmittable, Source, emit_kernel
from rewriter.errors import ExitCode, Reason, RewriteError
from rewriter.ir.printer import show_output, show_program
from rewriter.lift import Region, lift
from rewriter.lift.region import site_of
from rewriter.patch import Patched, patch
from rewriter.plan import KernelPlan, NeedsFixed, NotPlannable, plan
from rewriter.trace import Dimension, TracedModule, capture


@dataclass(frozen=True)
class Fused:
    """One chain on its way through the stages."""

    region: Region
    chain: Chain
    plan: KernelPlan | None = None
    kernel: KernelFile | None = None


@dataclass(frozen=True)
class Rewritten:
    """A module rewritten: texts by relative name, and what there is to say."""

    traced: TracedModule
    fused: tuple[Fused, ...]
    patched: Patched | None
    unfused: tuple[Reason, ...]
    printed: dict[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> list[KernelFile]:
        return [f.kernel for f in self.fused if f.kernel]


def rewrite_module(
    module: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    title: str = "",
    stop_after: str | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    bound: frozenset[Dimension] = frozenset(),
) -> Rewritten:
    """trace → lift → derive → plan → emit → patch. What does not get through a stage is reported and stays eager.

    Planning finds which sizes a kernel keeps whole; where they are not fixed yet, tracing starts again with them `bound`.
    """
    printed: dict[str, str] = {}
    progress("trace")
    traced = capture(module, args, kwargs, bound)
    printed["trace"] = str(traced.graph)
    if stop_after == "trace":
        return Rewritten(traced, (), None, (), printed)
    progress("lift")
    lifted = lift(traced)
    printed["lift"] = "\n\n".join(show_program(r.program) for r in lifted.regions)
    unfused = list(lifted.unfused)
    if stop_after == "lift":
        return Rewritten(traced, (), None, tuple(unfused), printed)
    progress("derive")
    fused = _each(lifted.regions, lambda r: Fused(r, derive(r.program)), lambda r: r, unfused)
    printed["derive"] = "\n\n".join(_show_chain(f.chain) for f in fused)
    if stop_after == "derive":
        return Rewritten(traced, tuple(fused), None, tuple(unfused), printed)
    progress("plan")
    names = iter(_kernel_names(module, fused))
    needed: set[Dimension] = set()
    fused = _each(fused, lambda f: _planned(f, next(names), traced, needed), lambda f: f.region, unfused)
    if needed - bound:
        return rewrite_module(
            module, args, kwargs, title=title, stop_after=stop_after, progress=progress, bound=bound | needed
        )
    printed["plan"] = "\n\n".join(_show_plan(f.plan) for f in fused)
    if stop_after == "plan":
        return Rewritten(traced, tuple(fused), None, tuple(unfused), printed)
    progress("emit")
    source = _source(module, title)
    fused = _each(
        fused,
        lambda f: Fused(f.region, f.chain, f.plan, emit_kernel(f.region, f.plan, source)),
        lambda f: f.region,
        unfused,
    )
    printed["emit"] = "\n\n".join(f.kernel.text for f in fused)
    if stop_after == "emit" or not fused:
        return Rewritten(traced, tuple(fused), None, tuple(unfused), printed)
    progress("patch")
    patched = patch(traced, tuple(f.region for f in fused), [f.kernel for f in fused], source.title)
    printed["patch"] = patched.text
    return Rewritten(traced, tuple(fused), patched, tuple(unfused), printed)


def _each(items, step: Callable, region_of: Callable, unfused: list[Reason]) -> list:
    """Applies a stage to every chain; a chain that fails becomes a reason at its line."""
    out = []
    for item in items:
        try:
            out.append(step(item))
        except (NotDerivable, NotPlannable, NotEmittable) as reason:
            unfused.append(Reason(str(reason), site_of(region_of(item).outputs[0])))
    return out


def _planned(item: Fused, name: str, traced: TracedModule, needed: set[Dimension]) -> Fused:
    try:
        return Fused(item.region, item.chain, plan(item.chain, name))
    except NeedsFixed as sizes:
        dimensions = frozenset().union(*(traced.dimensions_of(s) for s in sizes.sizes))
        needed |= dimensions
        raise NotPlannable(str(sizes)) from sizes


def _kernel_names(module: Callable, fused: list[Fused]) -> list[str]:
    """The innermost module class around a chain, in snake case, numbered where it repeats."""
    names: list[str] = []
    for item in fused:
        stack = item.region.outputs[0].meta.get("nn_module_stack") or {}
        owner = list(stack.values())[-1][1] if stack else type(module)
        text = owner if isinstance(owner, str) else owner.__name__
        text = text.split(".")[-1] if isinstance(module, nn.Module) else module.__name__
        base = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower().strip("_") or "chain"
        name, k = base, 2
        while name in names:
            name, k = f"{base}_{k}", k + 1
        names.append(name)
    return names


def _show_chain(chain: Chain) -> str:
    lines = [d.show(chain.stream, {}) for d in chain.definitions]
    return "\n".join([*lines, *(show_output(o) for o in chain.outputs), *chain.derivation])


def _show_plan(plan: KernelPlan) -> str:
    config = plan.config
    return (
        f"{plan.name}: grid {', '.join(a.name for a in plan.grid)}; row {plan.row.name}; stream {plan.stream.name}; "
        f"features {', '.join(a.name for a in plan.features)}; tiles {config.block_m} x {config.block_n}, "
        f"{config.num_warps} warps, {config.num_stages} stages"
    )


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


@dataclass(frozen=True)
class Outcome:
    """What the command line writes and says."""

    files: dict[str, str]
    diagnostics: tuple[Reason, ...]
    code: ExitCode
    printed: str


def package_files(rewritten: Rewritten, title: str) -> dict[str, str]:
    """The importable part of OUT."""
    name = rewritten.patched.class_name
    files = {
        "__init__.py": f'"""{title}"""\n\nfrom .module import apply\n\n__all__ = ["apply"]\n',
        "module.py": rewritten.patched.text,
        "kernels/__init__.py": f'"""Triton kernels of `{name}`, one chain a file."""\n',
    }
    return files | {f"kernels/{k.name}.py": k.text for k in rewritten.kernels}


def run(loaded, options, progress: Callable[[str], None]) -> Outcome:
    """The whole command for a loaded model."""
    from rewriter.check.run import check_package
    from rewriter.emit.test_file import equivalence_test
    from rewriter.report import chain_report, report_files

    title = f"`{loaded.class_name}` of {Path(loaded.shown).name}, its reduction chains as Triton kernels."
    rewritten = rewrite_module(
        loaded.module, loaded.args, loaded.kwargs, title=title, stop_after=options.stop_after, progress=progress
    )
    unfused = [_shown(r, loaded) for r in rewritten.unfused]
    printed = _printed(rewritten.printed, options)
    if rewritten.patched is None:
        code = ExitCode.DONE if options.stop_after else ExitCode.NOTHING_TO_FUSE
        nothing = Reason("no chain of reductions keeps a wide tensor from being written", loaded.site(loaded.line))
        return Outcome({}, tuple(unfused) if options.stop_after else (nothing, *unfused), code, printed)
    files = package_files(rewritten, title)
    files["test_equivalence.py"] = equivalence_test(loaded, options)
    chains = [chain_report(f.region, f.chain, f.kernel, loaded.class_name) for f in rewritten.fused]
    verdict, code = None, ExitCode.DONE
    if options.check:
        progress("check")
        verdict = check_package(files, rewritten.kernels, loaded, options)
        code = ExitCode.DONE if verdict["ok"] else ExitCode.CHECK_FAILED
    progress("report")
    files |= report_files(title, chains, unfused, list(rewritten.traced.fixed), verdict)
    failed = [Reason(text, loaded.site(loaded.line)) for text in (verdict or {}).get("failures", [])]
    return Outcome(files, (*unfused, *failed), code, printed)


def _shown(reason: Reason, loaded) -> Reason:
    """Reasons in the user's file name it as the user did."""
    if reason.site and reason.site.file == str(loaded.file):
        return Reason(reason.text, loaded.site(reason.site.line))
    return reason


def _printed(printed: dict[str, str], options) -> str:
    if options.explain:
        return "\n".join(f"# {stage}\n{printed[stage]}" for stage in ("derive", "plan") if stage in printed) + "\n"
    if not options.print_ir and not options.stop_after:
        return ""
    wanted = [options.print_ir] if options.print_ir in printed else list(printed)
    if options.stop_after and not options.print_ir:
        wanted = [options.stop_after]
    return "\n".join(f"# {stage}\n{printed[stage]}" for stage in wanted if stage in printed) + "\n"


__all__ = ["Outcome", "Rewritten", "RewriteError", "package_files", "rewrite_module", "run"]
