"""Stage report: everything above → what a user reads."""

from rewriter.report.left import left_alone
from rewriter.report.report import ChainReport, Report, report_on

__all__ = ["ChainReport", "Report", "left_alone", "report_on"]
