"""Reports: what a run directory holds, as one static HTML file."""

from cppo.reports.html import render_report, write_report
from cppo.reports.run_data import RunData, read_run

__all__ = ["RunData", "read_run", "render_report", "write_report"]
