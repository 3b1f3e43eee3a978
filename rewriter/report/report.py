"""What was fused, what was not and why, as report.json and report.md."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from rewriter.derive import Chain
from rewriter.emit import KernelFile, render
from rewriter.errors import Reason
from rewriter.ir.printer import show
from rewriter.lift import Region
from rewriter.trace.source import origin_of


@dataclass(frozen=True)
class ChainReport:
    """One fused chain: where it was, which kernel does it, and what is no longer written (bytes as a formula)."""

    name: str
    host: str
    file: str
    lines: tuple[int, ...]
    kernels: tuple[str, ...]
    passes: int
    derivation: tuple[str, ...]
    bytes_saved: str


def chain_report(region: Region, chain: Chain, kernel: KernelFile, host: str) -> ChainReport:
    origins = [origin_of(n) for n in (*region.inside, *region.outputs)]
    lines = tuple(sorted({o.line for o in origins if o.line}))
    files = sorted({os.path.basename(o.file) for o in origins if o.file})
    saved = " + ".join(dict.fromkeys(_size(n) for n in region.wide))
    return ChainReport(
        kernel.name, host, ", ".join(files), lines, (f"kernels/{kernel.name}.py",), kernel.plan.sweeps, chain.derivation, saved
    )


def _size(node) -> str:
    from rewriter.ir import Const, apply
    from rewriter.trace.sizes import shape_of

    value = node.meta["val"]
    total = Const(value.dtype.itemsize)
    for extent in shape_of(value):
        total = apply("mul", total, extent)
    return show(total)


def report_files(
    title: str, chains: list[ChainReport], unfused: list[Reason], fixed: list[Reason], check: Any
) -> dict:
    """report.json and report.md as texts."""
    data = {
        "title": title,
        "chains": [_chain_json(c) for c in chains],
        "unfused": [_reason_json(r) for r in unfused],
        "specialised": [_reason_json(r) for r in fixed],
        "check": check,
    }
    return {
        "report.json": json.dumps(data, indent=2) + "\n",
        "report.md": render(
            "report.md.jinja", title=title, chains=chains, unfused=unfused, fixed=fixed, check=check
        ),
    }


def _chain_json(chain: ChainReport) -> dict[str, Any]:
    return {
        "name": chain.name,
        "host": chain.host,
        "file": chain.file,
        "lines": list(chain.lines),
        "kernels": list(chain.kernels),
        "passes": chain.passes,
        "derivation": list(chain.derivation),
        "bytes_not_written": chain.bytes_saved,
    }


def _reason_json(reason: Reason) -> dict[str, Any]:
    return {"where": str(reason.site) if reason.site else "", "reason": reason.text}
