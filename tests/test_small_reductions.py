"""Small programs that give something else of a score than weighted values: losses, monoids, counts, statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_path import assert_right, fused

from rewriter import rewrite


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def labelled(rows: int, classes: int) -> tuple[torch.Tensor, ...]:
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    return r(rows, 8), r(classes, 8), r(classes + 40, 8), labels


def classes_in_two_pieces(x, first, second, labels):
    """Each piece is swept for the maximum, then for the sum: where full tiles end is told anew."""
    return F.cross_entropy(torch.cat((x @ first.T, x @ second.T), -1), labels, reduction="none")


def pairs(m: int, n: int) -> tuple[torch.Tensor, ...]:
    return r(2, m, 8), r(2, n, 8)


def products(q, k):
    p = torch.sigmoid(q @ k.mT + 4)
    return (1 - p).prod(-1), torch.prod(p, 1)


def wins(q, k):
    """Beside the best key, what the other keys weigh."""
    s = q @ k.mT
    best = torch.zeros_like(s).scatter_(-1, s.argmax(-1, keepdim=True), 1.0)
    return torch.where(best == 1, s, s.exp()).sum(-1)


def best_taken(q, k):
    return k.take_along_dim((q @ k.mT).argmax(-1, keepdim=True), dim=1)


def whole_numbers(m: int, n: int) -> tuple[torch.Tensor, ...]:
    """Products of which are exact, and now and then equal."""
    return tuple(x.round() for x in pairs(m, n))


def mutual_best(q, k):
    """Scores of every row with the keys that rows found best are made in a tile, too, and never held."""
    s = q @ k.mT
    there = s.argmax(2)
    return there, s.argmax(1).gather(1, there) == torch.arange(q.shape[1])


def fixed_classes(x, weight, labels):
    logits = x @ weight.T
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 33).float(), reduction="none").sum(-1)


def labelled_of_33(rows: int, _: int) -> tuple[torch.Tensor, ...]:
    x, weight, _, labels = labelled(rows, 33)
    return x, weight, labels


PROGRAMS = {
    classes_in_two_pieces: labelled,
    fixed_classes: labelled_of_33,
    products: pairs,
    wins: pairs,
    best_taken: pairs,
    mutual_best: whole_numbers,
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_small_program(program):
    inputs = PROGRAMS[program]
    result = fused(program, inputs(7, 70))
    for sizes in ((7, 70), (20, 33), (1, 100)):
        assert_right(result, program, inputs(*sizes))


def test_scores_of_rows_that_were_found_are_not_held():
    result = fused(mutual_best, whole_numbers(7, 70))
    (text,) = (text for name, text in result.sources.items() if name.endswith("mutual_best.py"))
    assert "row_" not in text and [chain["passes"] for chain in result.report["chains"]] == [2]


class LateInteraction(nn.Module):
    """Its layer is normalised before it meets the other's: computed once, by itself, and not in a kernel for the norm."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, q, k):
        q, k = (F.normalize(self.linear(x), dim=-1) for x in (q, k))
        return (q @ k.mT).amax(-1).sum(1)


def test_a_layer_that_is_written_anyway_is_in_no_chain():
    torch.manual_seed(0)
    model = LateInteraction().eval()
    result = rewrite(model, pairs(7, 70))
    assert [chain["passes"] for chain in result.report["chains"]] == [1]
    with torch.no_grad():
        assert_right(result, model, pairs(20, 33))
