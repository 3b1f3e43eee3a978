"""Stage plan: a chain → the kernels that compute it."""

from rewriter.plan.kernel import Config, Dot, KernelPlan, padded
from rewriter.plan.plan import NeedsFixed, NotPlannable, plan

__all__ = ["Config", "Dot", "KernelPlan", "NeedsFixed", "NotPlannable", "padded", "plan"]
