"""Every lifting rule against torch: what a node's local lift means is what the op computes."""

from __future__ import annotations

import pytest
import torch

from rewriter.lift import local  # noqa: F401  (fills the registry)
from rewriter.lift.registry import REFUSED as NEVER
from rewriter.lift.registry import RULES
from tests import (  # noqa: F401  (they add to the cases)
    lift_cases_functions,
    lift_cases_norms,
    lift_cases_reductions,
    lift_cases_shapes,
)
from tests.lift_cases import CASES, aten, b, f, i, p
from tests.lifting import call, check_call, lifted_call

# Rules that say no, and names that are no ATen op (`x.float()` traces as `to`).
REFUSING = {*NEVER, "native_dropout"}
UNSEEN = {"float", "half", "bfloat16", "double", "bool", "long", "int"}


def test_every_name_has_a_case():
    assert set(CASES) == set(RULES) - REFUSING - UNSEEN
    assert not any(hasattr(aten, name) for name in UNSEEN)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_rule_means_what_the_op_computes(name, dynamic):
    torch.manual_seed(0)
    failed = []
    for made in CASES[name]():
        try:
            check_call(made, dynamic)
        except Exception as error:
            failed.append(f"{made}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


# What is refused, and why


TWO = torch.tensor([True, False, True])
REFUSED = {
    "a strided view": call(aten.as_strided.default, f(3, 5), [2, 2], [1, 2]),
    "a diagonal in the first dimensions": call(aten.diag_embed.default, f(3, 5), 0, 0, 1),
    "the diagonal of a matrix by its other name": call(aten.diag.default, f(5, 5)),
    "dropout in training": call(aten.dropout.default, f(3, 5), 0.5, True),
    "padding by reflection": call(aten.pad.default, f(3, 5), [1, 1], "reflect"),
    "indexing by a mask": call(aten.index.Tensor, f(3, 5), [TWO]),
    "double precision": call(aten.exp.default, f(3, 5).double()),
    "a sort": call(aten.sort.default, f(3, 5)),
    "the largest few": call(aten.topk.default, f(3, 5), 2),
    "a shift by a tensor": call(aten.bitwise_left_shift.Tensor, i(3), i(3, least=0)),
    "a power of integers": call(aten.pow.Tensor_Tensor, i(3), i(3, least=0)),
    "an angle": call(aten.atan2.default, f(3), f(3)),
    "a convolution": call(aten.conv1d.default, f(2, 6, 5), f(4, 6, 3)),
    "a convolution with steps": call(aten.conv1d.default, f(2, 6, 5), f(4, 6, 1), None, [2]),
    "a convolution with borders": call(aten.conv1d.default, f(2, 6, 5), f(4, 6, 1), None, [1], [1]),
    "statistics of the batch": call(
        aten.batch_norm.default, f(2, 4, 3), p(4), f(4), f(4), p(4), True, 0.1, 1e-5, False
    ),
    "a running sum": call(aten.cumsum.default, f(3, 5), 1),
    "random numbers": call(aten.rand_like.default, f(3, 5)),
    "attention with dropout": call(
        aten.scaled_dot_product_attention.default, f(2, 3, 8), f(2, 7, 8), f(2, 7, 5), None, 0.1
    ),
    "assignment that accumulates": call(aten.index_put.default, f(3), [TWO], torch.tensor(1.0), True),
    "assignment of a value for each element": call(aten.scatter.src, f(3, 5), 1, i(3, 2, least=0), f(3, 2)),
    "assignment of several values": call(aten.index_put.default, f(9), [i(2, least=0)], f(2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_lifted_says_why(name):
    made = REFUSED[name]
    lift, *_ = lifted_call(made, dynamic=False).values()
    assert lift.value is None
    assert str(made.op) in lift.reason


def test_a_bias_that_broadcasts():
    check_call(call(aten.baddbmm.default, f(3, 7), f(2, 3, 5), f(2, 5, 7), beta=2), dynamic=False)


def test_negative_padding_cuts():
    check_call(call(aten.constant_pad_nd.default, f(3, 7), [-1, -2]), dynamic=False)


def test_a_mask_of_one_row_is_not_a_mask_of_many():
    check_call(call(aten.masked_fill.Scalar, f(3, 5), b(1, 5), 0.0), dynamic=False)
