"""Every lifting rule against torch: what a node's local lift means is what the op computes."""

from __future__ import annotations

import pytest
import torch

from rewriter.lift import local  # noqa: F401  (fills the registry)
from rewriter.lift.registry import RULES
from tests import lift_cases_shapes  # noqa: F401  (adds to the cases)
from tests.lift_cases import CASES, aten, b, f, i
from tests.lifting import call, check_call, lifted_call

# Rules that say no, and names that are no ATen op (`x.float()` traces as `to`).
REFUSING = {"as_strided", "diagonal", "unfold", "native_dropout"}
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
