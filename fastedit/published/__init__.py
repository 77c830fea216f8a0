"""The rows of ``docs/results.md``: what they measured, shipped with the package, and how to run one anew."""

from fastedit.published.case import Case
from fastedit.published.rerun import Comparison, Reproduction, reproduce, row_named
from fastedit.published.rows import PublishedRow, published_rows

__all__ = ["Case", "Comparison", "PublishedRow", "Reproduction", "published_rows", "reproduce", "row_named"]
