"""What was fused, what was not and why, as report.json and report.md."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.utils._pytree import tree_leaves

from rewriter.derive import Chain
from rewriter.emit import KernelFile, render
from rewriter.errors import Reason
from rewriter.ir import Const, Node, Param, apply, transform
from rewriter.ir.printer import show
from rewriter.lift import Region
from rewriter.patch import signature_of
from rewriter.trace import TracedModule
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import origin_of

if TYPE_CHECKING:
    from rewriter.hosts import Host, RewrittenModel


@dataclass(frozen=True)
class ChainReport:
    """One fused chain: where it was, which kernel does it, and what is no longer written.

    `modules` are the paths of the hosts in the model, of which each has the chain; none where the host is the model.
    Bytes are those of one call of a host: `bytes_saved` at the sizes given, `bytes_formula` at any.
    """

    name: str
    host: str
    modules: tuple[str, ...]
    file: str
    lines: tuple[int, ...]
    kernels: tuple[str, ...]
    passes: int
    derivation: tuple[str, ...]
    bytes_saved: int
    bytes_formula: str


@dataclass(frozen=True)
class Report:
    """Everything there is to say about one rewrite; `check` is the check's verdict in its JSON form."""

    title: str
    chains: tuple[ChainReport, ...]
    unfused: tuple[Reason, ...]
    specialised: tuple[Reason, ...]
    check: dict[str, Any] | None = None

    def json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "chains": [_chain_json(c) for c in self.chains],
            "unfused": [_reason_json(r) for r in self.unfused],
            "specialised": [_reason_json(r) for r in self.specialised],
            "check": self.check,
        }

    def files(self) -> dict[str, str]:
        """report.json and report.md as texts."""
        return {
            "report.json": json.dumps(self.json(), indent=2, ensure_ascii=False) + "\n",
            "report.md": render("report.md.jinja", report=self),
        }


def report_on(
    rewritten: RewrittenModel, title: str, left: tuple[Reason, ...], check: dict[str, Any] | None = None
) -> Report:
    """The report of a rewrite and what it `left` alone. It is written, so it names no folder of this machine."""
    unfused = tuple(map(_without_folder, left))
    chains = tuple(chain for host in rewritten.hosts for chain in _chains_of(host))
    fixed = dict.fromkeys(_without_folder(r) for host in rewritten.hosts for r in host.rewritten.traced.fixed)
    return Report(title, chains, unfused, tuple(fixed), check)


def _chains_of(host: Host) -> Iterator[ChainReport]:
    sizes = sizes_of(host.rewritten.traced)
    for f in host.rewritten.fused:
        yield chain_report(f.region, f.chain, f.kernel, host, sizes)


def _without_folder(reason: Reason) -> Reason:
    site = reason.site and replace(reason.site, file=os.path.basename(reason.site.file))
    return replace(reason, site=site)


@dataclass(frozen=True)
class Sizes:
    """How a person names the sizes of a traced program, and what they were."""

    names: dict[str, str]
    values: dict[str, int]

    def show(self, node: Node) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda m: self.names.get(m[0], m[0]), show(node))

    def value(self, node: Node) -> int:
        known = {Param(name): Const(value) for name, value in self.values.items()}
        return int(transform(node, lambda n: known.get(n, n)).value)


def sizes_of(traced: TracedModule) -> Sizes:
    """The sizes of the inputs: `q.shape[2]`, and what it is of the example."""
    names: dict[str, str] = {}
    values: dict[str, int] = {}
    texts = signature_of(traced).leaves
    for name, leaf in zip(traced.inputs, tree_leaves((traced.args, traced.kwargs)), strict=False):
        for d, extent in enumerate(shape_of(traced.placeholders[name].meta["val"]) if name else ()):
            if isinstance(extent, Param):
                names.setdefault(extent.name, f"{texts[name]}.shape[{d}]")
                values.setdefault(extent.name, leaf.shape[d])
    return Sizes(names, values)


def chain_report(region: Region, chain: Chain, kernel: KernelFile, host: Host, sizes: Sizes) -> ChainReport:
    origins = [origin_of(n) for n in (*region.inside, *region.outputs)]
    written = [_bytes(n) for n in region.wide if _is_written(n)]
    return ChainReport(
        name=kernel.name,
        host=host.shown,
        modules=tuple(filter(None, host.paths)),
        file=", ".join(sorted({os.path.basename(o.file) for o in origins if o.file})),
        lines=tuple(sorted({o.line for o in origins if o.line})),
        kernels=(f"kernels/{kernel.name}.py",),
        passes=kernel.plan.sweeps,
        derivation=chain.derivation,
        bytes_saved=sum(map(sizes.value, written)),
        bytes_formula=" + ".join(
            f"{count} * {text}" if count > 1 else text for text, count in Counter(map(sizes.show, written)).items()
        ),
    )


def _is_written(node: fx.Node) -> bool:
    """Whether eager allocates the value: a view is none, and a lone op that is the whole chain keeps it to itself."""
    return not any(r.alias_info for r in getattr(getattr(node.target, "_schema", None), "returns", ()))


def _bytes(node: fx.Node) -> Node:
    value = node.meta["val"]
    total: Node = Const(value.dtype.itemsize)
    for extent in shape_of(value):
        total = apply("mul", total, extent)
    return total


def _chain_json(chain: ChainReport) -> dict[str, Any]:
    return {
        "name": chain.name,
        "host": chain.host,
        "modules": list(chain.modules),
        "file": chain.file,
        "lines": list(chain.lines),
        "kernels": list(chain.kernels),
        "passes": chain.passes,
        "derivation": list(chain.derivation),
        "bytes_not_written": chain.bytes_saved,
        "bytes_not_written_at_any_size": chain.bytes_formula or "0",
    }


def _reason_json(reason: Reason) -> dict[str, Any]:
    return {"where": str(reason.site) if reason.site else "", "reason": reason.text}
