"""The report as one self-contained HTML page that a manager reads and an engineer can check."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from workflows.reports.plot import quality_against_size
from workflows.reports.report import Report
from workflows.reports.summary import comparison, quality_row, verdict


def render_page(report: Report) -> bytes:
    """UTF-8 HTML without any outside resource; all text of users is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("workflows.reports") / "page.html.j2").read_text())
    return template.render(
        report=report,
        verdict=verdict(report),
        rows=comparison(report),
        plot=quality_against_size(report),
        quality_row=quality_row,
    ).encode()
