"""A plan in words: the roles of axes in each kernel, and the candidates it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping

from rewriter.ir import Axis
from rewriter.plan.cost import LONG, SHORT
from rewriter.plan.estimates import KernelCost
from rewriter.plan.few import why_whole
from rewriter.plan.fills import Fill
from rewriter.plan.kernel import Candidate, ChainPlan, KernelPlan, Sweep

MOST_SHOWN = 8  # candidates, beside the best for each choice of kernels and rows


Letters = Mapping[Axis, str]


def show_plan(plan: ChainPlan, letters: Letters) -> str:
    """A line per kernel, and a table of the candidates, the chosen first.

    letters: short names of axes, where they have any.
    """
    kernels = (line for k in plan.kernels for line in (show_kernel(k, letters), *_shown_few(k, letters)))
    return "\n".join([*kernels, *show_candidates(plan, letters)])


def show_kernel(plan: KernelPlan, letters: Letters) -> str:
    config = plan.config
    streams = tuple(s.stream for s in plan.sweeps)
    roles = {"grid": plan.grid, "rows": plan.rows, "streams": streams, "features": plan.features}
    shown = "; ".join(f"{role} {_named(axes, letters)}" for role, axes in roles.items() if axes)
    mapped = "".join(f"; {text}" for text in dict.fromkeys(t for s in plan.sweeps for t in _left_out(s)))
    return (
        f"{plan.name}: {shown}; tiles {config.block_m} x {config.block_n}, "
        f"{config.num_warps} warps, {config.num_stages} stages{mapped}"
    )


def _show_fill(fill: Fill) -> list[str]:
    return [f"fills of {floor.value:g} last" for floor in dict.fromkeys(f for _, f in fill.floors)]


def _left_out(sweep: Sweep) -> list[str]:
    """What tells which tiles of a stream are left out, and why there is no map of them."""
    mapped = [f"a map of tiles by {sweep.mapped}" if sweep.map else sweep.mapped] if sweep.mapped else []
    return [*mapped, *(_show_fill(sweep.fill) if sweep.fill else [])]


def _shown_few(plan: KernelPlan, letters: Letters) -> list[str]:
    """What runs where rows are few, or why the same does."""
    if plan.few:
        said = f"  fewer than {plan.few.rows} rows of more than {plan.few.least} positions: the stream in parts"
        return [said, *(f"  {show_kernel(k, letters)}" for k in plan.few.kernels)]
    why = why_whole(plan)
    return [f"  few rows: the stream is not split ({why})"] if why and plan.sweeps else []


def _named(axes: tuple[Axis, ...], letters: Letters) -> str:
    return ", ".join(dict.fromkeys(letters.get(a, a.name) for a in axes))


def show_candidates(plan: ChainPlan, letters: Letters) -> list[str]:
    """The table: a line per kernel of each candidate.

    rows  streams  tile            ms     bound by  registers  spilled  KiB  at once
    """
    header = ("", "rows", "streams", "tile", "ms", "bound by", "registers", "spilled", "KiB", "at once", "")
    firsts = {tuple(k.rows for k in c.kernels): c for c in reversed(plan.candidates)}
    shown = [c for k, c in enumerate(plan.candidates) if k < MOST_SHOWN or c in firsts.values()]
    lines = [line for k, candidate in enumerate(shown) for line in _lines(candidate, "*" if k == 0 else "", letters)]
    left = len(plan.candidates) - len(shown)
    sizes = f"{LONG} rows and stream positions, {SHORT} of every other axis, where a size is not known"
    return [
        f"candidates, estimated for {sizes}; * is the one chosen",
        *_table([header, *lines]),
        *([f"and {left} more that are slower or do not fit"] if left else []),
    ]


def _lines(candidate: Candidate, mark: str, letters: Letters) -> list[tuple[str, ...]]:
    """Of several kernels, each on a line of its own; the reason stands on the first."""
    out = []
    for k, (kernel, cost) in enumerate(zip(candidate.kernels, candidate.costs)):
        out.append((mark if k == 0 else "+", *_cells(kernel, cost, letters), candidate.reason if k == 0 else ""))
    return out


def _cells(kernel: KernelPlan, cost: KernelCost, letters: Letters) -> tuple[str, ...]:
    config, held = kernel.config, cost.held
    return (
        _named(kernel.rows, letters),
        _named(kernel.streams, letters),
        f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages",
        f"{cost.seconds * 1e3:.3g}",
        cost.bound,
        str(held.registers.wanted),
        str(held.registers.spilled),
        f"{held.shared / 1024:.3g}",
        str(held.residents),
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
