"""Small programs that give something else of a score than weighted values: losses, monoids, counts, statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from whole_path import assert_right, fused


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def labelled(rows: int, classes: int) -> tuple[torch.Tensor, ...]:
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    return r(rows, 8), r(classes, 8), r(classes + 40, 8), labels


def classes_in_two_pieces(x, first, second, labels):
    """Each piece is swept for the maximum, then for the sum: where full tiles end is told anew."""
    return F.cross_entropy(torch.cat((x @ first.T, x @ second.T), -1), labels, reduction="none")


PROGRAMS = {classes_in_two_pieces: labelled}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_small_program(program):
    inputs = PROGRAMS[program]
    result = fused(program, inputs(7, 70))
    for sizes in ((7, 70), (20, 33), (1, 100)):
        assert_right(result, program, inputs(*sizes))
