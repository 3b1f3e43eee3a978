"""Stage lift: FX graph → index notation, for what is wide."""

from rewriter.lift.local import lift_locally
from rewriter.lift.region import LiftResult, Region, lift

__all__ = ["LiftResult", "Region", "lift", "lift_locally"]
