"""The report: one self-contained HTML page from results and the pictures that go with them."""

from shivelight.report.page import ReportFigures, build_report

__all__ = ["ReportFigures", "build_report"]
