"""Reports: the contents of run directories as one static HTML file."""

from cppo.reports.html import render_report, tell_warnings, write_report
from cppo.reports.run_data import RunData, read_run
from cppo.reports.side_by_side import render_runs

__all__ = ["RunData", "read_run", "render_report", "render_runs", "tell_warnings", "write_report"]
