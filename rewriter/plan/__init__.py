"""Stage plan: a chain → the kernels that compute it."""

from rewriter.plan.kernel import Candidate, ChainPlan, Config, Dot, KernelPlan, Loop, Sweep, padded
from rewriter.plan.plan import NeedsFixed, NotPlannable, plan

__all__ = [
    "Candidate",
    "ChainPlan",
    "Config",
    "Dot",
    "KernelPlan",
    "Loop",
    "NeedsFixed",
    "NotPlannable",
    "Sweep",
    "padded",
    "plan",
]
