"""A run as one self-contained page: `write_report(folder)`."""

from tfnas.report.page import write_report

__all__ = ["write_report"]
