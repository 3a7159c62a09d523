"""The report: one self-contained HTML page from the rows of a comparison."""

from gossamer.report.build import build, render
from gossamer.report.receptive_fields import receptive_fields
from gossamer.report.run import from_run

__all__ = ["build", "from_run", "receptive_fields", "render"]
