"""Tile sizes that a kernel may have: a short list for each situation, the one to prefer first."""

from __future__ import annotations

from dataclasses import replace

import torch

from rewriter.ir import TRUE, Axis, Const, Load, walk
from rewriter.plan.kernel import Config, KernelPlan, padded
from rewriter.plan.parts import is_deep
from rewriter.plan.roles import lone_rows

LONGEST_TILE = 1024  # positions of one row in a tile
WIDE_TILE = 8192  # elements of a tile of one row that has features

# Of 16-bit operands, beside what is preferred.
HALF = (
    Config(128, 64, 8, 2),
    Config(128, 64, 4, 2),
    Config(64, 64, 4, 2),
    Config(128, 32, 4, 2),
    Config(64, 32, 4, 2),
    Config(64, 32, 8, 2),
    Config(32, 32, 4, 2),
)
# Of 16-bit operands that are contracted block by block: a large tile reads each block for more products.
LONG = (Config(128, 128, 8, 3), Config(64, 128, 4, 3), Config(128, 128, 8, 2), Config(64, 128, 4, 2))

# Of 16-bit operands: what was the fastest in sweeps on an H100 and an H200 of programs with masks, biases and softcaps.
MEASURED = (
    Config(128, 64, 4, 2),
    Config(64, 64, 4, 3),
    Config(64, 128, 4, 2),
    Config(128, 64, 4, 3),
    Config(128, 128, 8, 3),
    Config(128, 64, 8, 3),
)
# The same of wider features.
MEASURED_WIDE = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(128, 32, 8, 3))
# Of kernels that read a tensor of scores.
MEASURED_PAIRS = (
    Config(128, 64, 4, 2),
    Config(64, 64, 4, 2),
    Config(128, 32, 4, 3),
    Config(64, 32, 4, 3),
    Config(64, 64, 4, 3),
    Config(128, 128, 8, 3),
    Config(128, 64, 4, 3),
)
# Of narrow bands.
MEASURED_BAND = (
    Config(64, 32, 4, 2),
    Config(64, 64, 4, 2),
    Config(64, 64, 4, 3),
    Config(64, 32, 4, 3),
    Config(128, 64, 4, 2),
)
# Of contractions for distances: each pair finds its own among those of a whole tile, which takes registers.
SKEWED = (
    Config(64, 64, 8, 2),
    Config(64, 32, 8, 2),
    Config(64, 32, 4, 2),
    Config(32, 32, 4, 2),
    Config(64, 64, 4, 2),
)
# Of loops that are written out: every position of a tile of the stream takes registers for what they load.
UNROLLED = (
    Config(64, 32, 4, 2),
    Config(128, 32, 8, 2),
    Config(64, 16, 4, 2),
    Config(64, 32, 4, 3),
    Config(64, 64, 4, 2),
    Config(128, 32, 4, 2),
    Config(64, 32, 2, 2),
)
# Of kernels that take their tiles from lists, few for short documents and many for long ones.
MEASURED_LISTED = (
    Config(64, 32, 4, 2),
    Config(64, 64, 4, 2),
    Config(64, 64, 4, 3),
    Config(128, 64, 4, 2),
    Config(64, 128, 4, 2),
    Config(128, 64, 4, 3),
)


def contenders(plan: KernelPlan) -> tuple[Config, ...]:
    """Tiles of which estimates can't tell which is the fastest."""
    plain = plan.dots and all(r.unrolled for r in plan.loops) and not plan.long_axes and not has_deep_tiles(plan)
    if not plain or plan.dtype is torch.float32 or len(plan.rows) != 1:
        return ()
    return tuple(c for c in _measured(plan) if is_sound(c, plan))


def _measured(plan: KernelPlan) -> tuple[Config, ...]:
    if plan.loops:
        return UNROLLED
    if plan.skews:
        return SKEWED
    if max(padded(f) for f in plan.features) > 128:
        return MEASURED_WIDE
    if plan.is_band:
        return MEASURED_BAND
    if _is_listed(plan):
        return MEASURED_LISTED
    return MEASURED_PAIRS if _reads_pairs(plan) else MEASURED


def _is_listed(plan: KernelPlan) -> bool:
    """Whether lists of tiles come from what each position has, like the number of its document: short lists."""
    return bool(plan.maps) and all(m.ranges for m in plan.maps)


def _reads_pairs(plan: KernelPlan) -> bool:
    """Whether numbers are read for pairs of a row and a stream position."""
    loads = [n for n in walk(*plan.chain.roots) if isinstance(n, Load)]
    return any(n.free & set(plan.rows) and n.free & set(plan.streams) for n in loads)


def configs(plan: KernelPlan) -> tuple[Config, ...]:
    """Tiles for a kernel's situation. What fp32 gets was the best of a sweep on an H200, and is not weighed against
    others: products element by element read both operands from shared memory, and small tiles that spill nothing are
    slower.
    """
    first = preferred(plan)
    # Estimates are of whole streams: they say nothing of narrow bands, nor of how pairs find their distances.
    if has_deep_tiles(plan) or not plan.dots or plan.dtype is torch.float32 or plan.is_band or plan.skews:
        return (first,)
    deeper = LONG if any(d.long for d in plan.dots) else ()
    return tuple(c for c in dict.fromkeys(_as_high(c, plan) for c in (first, *HALF, *deeper)) if is_sound(c, plan))


def _as_high(config: Config, plan: KernelPlan) -> Config:
    """No higher than rows are many, where those are the members of a group and their number is known."""
    is_known = plan.grouped and plan.rows and isinstance(plan.rows[0].extent, Const)
    return replace(config, block_m=min(config.block_m, padded(plan.rows[0]))) if is_known else config


def is_sound(config: Config, plan: KernelPlan) -> bool:
    """What Triton 3.6 makes right code of on an H200: three stages where no feature is padded; of two accumulators, one
    of them narrower than 64, streams of 32 (the narrow one was wrong at 64 in 4 warps, and slower).
    """
    return (config.num_stages < 3 or not _is_padded(plan)) and (config.block_n <= 32 or not _is_mixed(plan))


def preferred(plan: KernelPlan) -> Config:
    """What is chosen unless estimates tell another to be faster."""
    width = max((padded(f) for f in plan.features), default=16)
    if has_deep_tiles(plan):
        return Config(16, 16, 4, 1)
    if not plan.dots and plan.rows and lone_rows(plan.chain, (*plan.grid, *plan.rows)):
        return Config(64, 32, 4, 2)  # the rows of a tile lie side by side in memory
    if any(r.whole for r in plan.loops):
        return Config(1, max(16, WIDE_TILE // width), 4, 1)  # a program has one row
    if not plan.dots:
        return (
            Config(16, 64, 4, 2) if plan.rows else Config(1, max(map(_whole, plan.streams), default=LONGEST_TILE), 4, 1)
        )
    if plan.loops or any(d.long for d in plan.dots):
        wide = 32 if plan.loops and _is_mixed(plan) else 64
        return Config(64, wide, 4, 2) if width <= 128 else Config(32, 32, 4, 2)
    if plan.dtype is torch.float32:
        return _single(width)
    if plan.skews:
        return Config(64, 64 if width <= 64 else 32, 8, 2)
    if plan.is_band and width <= 128:
        return Config(64, 32, 4, 2)
    if _is_listed(plan) and width <= 128:
        return Config(64, 64, 4, 2 if width <= 64 or _is_padded(plan) else 3)
    if width <= 64:
        return _narrow(plan, width)
    return _wide(plan) if width <= 128 else Config(64, 32, 4, 2)


def _is_mixed(plan: KernelPlan) -> bool:
    """Whether accumulators have several widths, one of them narrow."""
    values = {padded(a) for a in plan.features if a not in {d.axis for d in plan.dots}}
    return len(values) > 1 and min(values) < 64


def _single(width: int) -> Config:
    if width <= 64:
        return Config(64, 32, 4, 2)
    return Config(32, 32, 4, 2) if width <= 128 else Config(16, 16, 8, 2)


def _narrow(plan: KernelPlan, width: int) -> Config:
    if _is_padded(plan):
        return Config(64, 64, 4, 2)
    if _reads_pairs(plan):
        return Config(64, 64, 4, 2)
    return Config(64, 128, 4, 2) if width > 32 else Config(64, 64, 4, 3)


def _wide(plan: KernelPlan) -> Config:
    """Of 128 rows, 64 positions and 128 features registers are just enough where nothing else takes any."""
    if _is_padded(plan):
        return Config(128, 64, 4, 2)
    if _reads_pairs(plan):
        return Config(128, 32, 4, 3)
    is_masked = any(d.predicate is not TRUE for d in plan.chain.definitions)
    return Config(64, 64, 4, 3) if is_masked else Config(128, 64, 4, 2)


def _is_padded(plan: KernelPlan) -> bool:
    """Whether a tile reaches over the end of an axis that it keeps whole, or takes block by block."""
    return any(a.extent.value != padded(a) for a in plan.features) or any(
        a.extent.value % plan.sizes[a] for a in plan.long_axes
    )


def _whole(stream: Axis) -> int:
    """The power of two that holds a stream, or the longest tile."""
    return min(LONGEST_TILE, padded(stream)) if isinstance(stream.extent, Const) else LONGEST_TILE


def has_deep_tiles(plan: KernelPlan) -> bool:
    """Whether a tile has rows, stream and features at once: values of a weighted sum that each row has for itself."""
    rows, features = frozenset(plan.rows), frozenset(plan.features) - {d.axis for d in plan.dots}
    return any(is_deep(d, rows, features) for d in plan.chain.definitions)
