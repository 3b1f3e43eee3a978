"""Every program of the zoo through the whole path: traced once, run at other sizes through Triton's interpreter.

In fp16 they run where they are compiled, in `test_zoo_compiles.py`.
"""

from __future__ import annotations

import pytest
import torch
from zoo import programs
from zoo_checks import at_dtype, built, check_at, rewritten

ALL = programs()
FUSED = [p for p in ALL if p.fused]


def named(items):
    return [pytest.param(p, id=p.name) for p in items]


@pytest.mark.parametrize("program", named(FUSED))
def test_right_at_every_size_in_fp32(program):
    model = built(program, torch.float32)
    result = rewritten(program, model, torch.float32)
    assert result.report["chains"], result.report["unfused"]
    for sizes in (program.traced, *program.others):
        check_at(program, model, result, sizes, torch.float32)


@pytest.mark.parametrize("program", named([p for p in ALL if not p.fused]))
def test_left_alone(program):
    model = built(program, torch.float32)
    result = rewritten(program, model, torch.float32)
    assert not result.report["chains"] and not result.sources
    args = at_dtype(program.inputs(program.traced, model), torch.float32)
    torch.testing.assert_close(result.module(*args), model(*args))
