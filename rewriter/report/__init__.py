"""Stage report: everything above → what a user reads."""

from rewriter.report.report import ChainReport, chain_report, report_files

__all__ = ["ChainReport", "chain_report", "report_files"]
