"""Pages that people look at: one of a run, one that compares runs; each is one file that loads nothing."""

from fastedit.report.colours import method_colours
from fastedit.report.comparison import comparison_page
from fastedit.report.page import REPORT, Section, expected_page_bytes, write_page
from fastedit.report.run import run_page
from fastedit.report.saved import saved_page

__all__ = [
    "REPORT",
    "Section",
    "comparison_page",
    "expected_page_bytes",
    "method_colours",
    "run_page",
    "saved_page",
    "write_page",
]
