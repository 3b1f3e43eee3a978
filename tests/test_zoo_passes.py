"""Programs of several passes, axes and outputs: right at every size in fp32, and how many sweeps and kernels they take.

A program says the fewest it could take, and why not fewer. `MORE` holds what planning takes today where that is more.
"""

from __future__ import annotations

import pytest
import torch
from zoo import Program, programs
from zoo_checks import built, check_at, kernels_of, rewritten

FUSED = [p for p in programs(part=2) if p.fused and not p.rows]
NOT_YET = {}
MORE = {}


def marked(program: Program):
    marks = [pytest.mark.xfail(strict=True, reason=NOT_YET[program.name])] if program.name in NOT_YET else []
    return pytest.param(program, id=program.name, marks=marks)


@pytest.mark.parametrize("program", map(marked, FUSED))
def test_right_in_as_few_sweeps_and_kernels_as_it_says(program):
    model = built(program, torch.float32)
    result = rewritten(program, model, torch.float32)
    assert result.report["chains"], result.report["unfused"]
    for sizes in (program.traced, *program.others[:1]):
        check_at(program, model, result, sizes, torch.float32)
    sweeps = sum(chain["passes"] for chain in result.report["chains"])
    assert (sweeps, kernels_of(result.sources)) == MORE.get(program.name, (program.passes, program.kernels))
