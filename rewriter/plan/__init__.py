"""Stage plan: a chain → the kernels that compute it."""

from rewriter.plan.fills import Fill
from rewriter.plan.kernel import Candidate, ChainPlan, Config, Dot, KernelPlan, Loop, Sweep, padded
from rewriter.plan.maps import BlockMap
from rewriter.plan.plan import NeedsFixed, NotPlannable, plan

__all__ = [
    "BlockMap",
    "Candidate",
    "ChainPlan",
    "Config",
    "Dot",
    "Fill",
    "KernelPlan",
    "Loop",
    "NeedsFixed",
    "NotPlannable",
    "Sweep",
    "padded",
    "plan",
]
