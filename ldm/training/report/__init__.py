"""`report.html`: one self-contained page about a run."""

from ldm.training.report.page import write_report

__all__ = ["write_report"]
