"""Stage lift: FX graph → index notation, for what is wide."""

from rewriter.lift.local import lift_locally
from rewriter.lift.region import LiftResult, Region, lift
from rewriter.lift.rows import Rows, lift_rows

__all__ = ["LiftResult", "Region", "Rows", "lift", "lift_locally", "lift_rows"]
