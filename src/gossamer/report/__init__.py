"""The report: one self-contained HTML page from the rows of a comparison."""

from gossamer.report.build import build, render

__all__ = ["build", "render"]
